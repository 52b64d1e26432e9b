"""The best set-up by search: the twin tries many briefly and the better ones for longer."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

from multigraft.core.errors import CapacityExceeded
from multigraft.twin.profile import Profile
from multigraft.twin.report import Report, report
from multigraft.twin.simulate import simulate
from multigraft.twin.workload import SLO, Workload

from .choice import Choice, Space, beginning, climbed, demands_of, part
from .loads import estimate

ATTAINED = 0.9
"""Share of the requests that must meet the SLO."""
KEPT = 3
"""One choice in so many goes on to the next round, which is so many times longer."""
ROUNDS = 3
FIRST = 81
"""Choices in the first round, at most; drawn at random."""
HOPELESS = 1.5
"""Beyond this load by the step-time model a choice is not simulated."""

Progress = Callable[[str, int, int], None]
"""Called with what is being done, how many are done, and of how many."""


@dataclass(frozen=True, slots=True)
class Outcome:
    """A choice and what the twin says of it."""

    choice: Choice
    report: Report
    """At the profile's speed."""
    slo: SLO
    slower: Report | None = None
    """With every step longer by the profile's margin, where it has one."""

    @property
    def judged(self) -> Report:
        """The report that decides whether it holds: the worse of the two."""
        reports = [self.report] if self.slower is None else [self.slower, self.report]
        return max(reports, key=lambda r: shortfall(r, self.slo))

    @property
    def feasible(self) -> bool:
        """Nothing starves, and the SLO is attained, with the margin."""
        return self.shortfall == 0

    @property
    def on_edge(self) -> bool:
        """Whether it holds at the profile's speed, and not with the margin."""
        return not self.feasible and shortfall(self.report, self.slo) == 0

    @property
    def shortfall(self) -> float:
        """How far from feasible: 0 when it is."""
        return shortfall(self.judged, self.slo)

    @property
    def rank(self) -> tuple[float, ...]:
        """The least is best: feasible first, then served and trained tokens to three digits, then latency."""
        r = self.report
        return (self.shortfall, -float(f"{r.throughput + r.train_throughput:.3g}"), r.itl.mean + r.ttft.mean)


def shortfall(r: Report, slo: SLO) -> float:
    """How far a server is from serving everyone in time: 0 when it does."""
    short = max(0.0, 1 - r.throughput / max(r.arriving, 1e-9)) if r.starved else 0.0
    short += r.failed / max(r.requests, 1)
    return short + (max(0.0, ATTAINED - r.attained) if slo != SLO() else 0.0)


def try_out(choice: Choice, workload: Workload, profile: Profile, seconds: float | None = None) -> Outcome:
    """What the twin says of a choice for the workload, or for its first seconds."""
    share = part(workload, choice.num_adapters)
    tried = share if seconds is None else beginning(share, seconds)
    deployment = choice.deployment(share, profile)
    slower = report(simulate(tried, profile.slower(), deployment)) if profile.margin else None
    return Outcome(choice, report(simulate(tried, profile, deployment)), workload.slo, slower)


def search(
    workload: Workload,
    profile: Profile,
    space: Space | None = None,
    *,
    seed: int = 0,
    progress: Progress | None = None,
    tried: dict[Choice, Outcome] | None = None,
) -> Outcome:
    """Successive halving over the choices of `space`; CapacityExceeded, with what binds, when none is feasible.

    Each round keeps the best third, and the best for each number of adapters: in a short run, too many adapters look
    good that starve in a long one. From the best of the last round it climbs on, one step at a time. tried: is filled
    with all that was simulated to the end.
    """
    space = space or Space.of(workload, profile)
    tried = {} if tried is None else tried
    choices = space.choices(workload, profile)
    if not choices:
        raise CapacityExceeded(no_memory(workload, profile))
    random.Random(seed).shuffle(choices)
    choices = _promising(choices, workload, profile)
    outcomes: list[Outcome] = []
    for round_ in range(ROUNDS):
        seconds = workload.duration / KEPT ** (ROUNDS - 1 - round_)
        outcomes = []
        for done, choice in enumerate(choices):
            if progress:
                progress(f"{len(choices)} set-ups for {seconds:.0f} s each", done, len(choices))
            last = round_ == ROUNDS - 1
            outcomes.append(try_out(choice, workload, profile, None if last else seconds))
        choices = [outcome.choice for outcome in _kept(outcomes)]
    tried |= {outcome.choice: outcome for outcome in outcomes}
    best = min(outcomes, key=lambda outcome: outcome.rank)
    best = improved(best, workload, profile, space, progress, tried)
    if not best.feasible:
        raise CapacityExceeded(
            f"No set-up of one server serves even {best.choice.num_adapters} of {len(workload.adapters)} adapters of "
            f"workload {workload.name!r}: {binding(best)}."
        )
    return best


def improved(
    start: Outcome,
    workload: Workload,
    profile: Profile,
    space: Space,
    progress: Progress | None = None,
    tried: dict[Choice, Outcome] | None = None,
) -> Outcome:
    """What climbing from a choice reaches, judged by the twin. tried: as of search."""
    tried = {} if tried is None else tried
    tried[start.choice] = start

    def rank(choice: Choice) -> tuple[float, ...]:
        if progress:
            progress("neighbours of the best", 0, 0)
        if choice not in tried:
            tried[choice] = try_out(choice, workload, profile)
        return tried[choice].rank

    return tried[climbed(start.choice, rank, space, workload, profile)]


def over_the_edge(tried: Mapping[Choice, Outcome]) -> Outcome | None:
    """The one that would be the best of these without the margin, if the margin rejects it."""
    choice = min(tried, key=lambda choice: replace(tried[choice], slower=None).rank)
    return tried[choice] if tried[choice].on_edge else None


def _kept(outcomes: Sequence[Outcome]) -> list[Outcome]:
    ranked = sorted(outcomes, key=lambda outcome: outcome.rank)
    best_of_each: dict[int, Outcome] = {}
    for outcome in ranked:
        best_of_each.setdefault(outcome.choice.num_adapters, outcome)
    better = ranked[: -(-len(ranked) // KEPT)]
    return better + [outcome for outcome in best_of_each.values() if outcome not in better]


def _promising(choices: Sequence[Choice], workload: Workload, profile: Profile) -> list[Choice]:
    """The first FIRST of them that planner.loads does not call hopeless; when it does so of all, the least hopeless."""
    by_num = {num: part(workload, num) for num in {choice.num_adapters for choice in choices}}
    demands = {num: demands_of(share) for num, share in by_num.items()}
    found: list[Choice] = []
    least, spare = math.inf, choices[0]
    for choice in choices:
        num = choice.num_adapters
        try:
            load = estimate(demands[num], profile, choice.deployment(by_num[num], profile), workload.slo).load
        except CapacityExceeded:
            continue
        if load <= HOPELESS:
            found.append(choice)
        if load < least:
            least, spare = load, choice
        if len(found) == FIRST:
            break
    return found or [spare]


def no_memory(workload: Workload, profile: Profile) -> str:
    return (
        f"No set-up holds the largest adapters and the longest requests of workload {workload.name!r}: the binding "
        f"limit is the {profile.memory.total / 2**30:.1f} GiB that the profile has for KV and adapters."
    )


def binding(outcome: Outcome) -> str:
    """What keeps a choice from being feasible, in words."""
    r, choice = outcome.judged, outcome.choice
    margin = " with the margin" if outcome.on_edge else ""
    if r.failed:
        return f"{r.failed} requests are refused as too long"
    if r.starved:
        return f"{r.throughput:.0f} of {r.arriving:.0f} arriving tokens/s are served{margin}: {_short_of(r, choice)}"
    ttft, itl = outcome.slo.ttft, outcome.slo.itl
    late = [
        f"{name} is {value:.3g} s for one request in ten or more, promised {target:g} s"
        for name, value, target in (("TTFT", r.ttft.p90, ttft), ("ITL", r.itl.p90, itl))
        if target is not None and value > target
    ]
    return f"{r.attained:.0%} of the requests meet the SLO{margin} ({'; '.join(late) or 'both targets together'})"


def _short_of(r: Report, choice: Choice) -> str:
    assert r.resources is not None
    if r.resources.running_max >= choice.max_num_seqs:
        return f"the binding limit is max_num_seqs = {choice.max_num_seqs}"
    if r.resources.kv_usage_max > 0.95:
        return "the binding limit is the KV cache"
    if choice.num_adapters > choice.max_loras and r.resources.slots_used > 0.95 * choice.max_loras:
        return f"the binding limit is max_loras = {choice.max_loras}"
    return "the binding limit is the time of a step"
