"""The best set-up by readable models: fitted to what the twin says of a few hundred set-ups, asked in microseconds."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from multigraft.core.errors import CapacityExceeded, InvalidRequest
from multigraft.core.region import Scope
from multigraft.twin.profile import Profile
from multigraft.twin.report import STARVED
from multigraft.twin.workload import SLO, Workload

from .choice import Choice, Space, climbed, demands_of, part
from .loads import Estimate, estimate
from .placement import Demand
from .rules import Model, fit_best
from .search import ATTAINED, Outcome, Progress, no_memory, try_out

FEATURES = (
    *Estimate._fields,
    "adapters",
    "rate_sum",
    "rate_std",
    "rank_max",
    "rank_mean",
    "rank_std",
    "prefill_share",
    "prompt_rate",
    "output_rate",
    "max_loras",
    "kv_tokens",
    "max_num_seqs",
    "max_num_batched_tokens",
    "train_priority",
    "training",
)
TARGETS = ("served", "attained", "ttft", "itl", "trained")
"""Share of the arriving tokens that is served in time; of the requests, that meet the SLO: both with the profile's
margin; mean latencies in seconds; tokens trained a second."""
EXAMPLES = 400
SPARE = 0.05
"""By which predicted shares must be better than they have to: about what the models err by."""
ASKED = 300
"""Choices that the models are asked for, at most; drawn at random."""
SPEEDS = (0.5, 1.0, 2.0)
"""Examples are of the workloads as they are, and at half and twice their rates."""
MAX_LOAD = 2.0
"""Of examples."""


@dataclass(frozen=True, slots=True)
class Fitted:
    """One target's model."""

    kind: str
    model: Model
    error: float
    """Mean absolute error in cross-validation."""


@dataclass(frozen=True, slots=True)
class Advice:
    choice: Choice
    predicted: dict[str, float]
    """By target, and throughput in tokens a second with the margin."""
    why: dict[str, str]
    """The part of each target's model that decided."""


@dataclass(frozen=True, slots=True)
class Models:
    by_target: dict[str, Fitted]
    slo: SLO

    @classmethod
    def fit(
        cls,
        workloads: Sequence[Workload],
        profile: Profile,
        *,
        examples: int = EXAMPLES,
        seconds: float | None = None,
        seed: int = 0,
        progress: Progress | None = None,
    ) -> Models:
        """From so many simulations of random choices for the workloads, which must have one SLO, or their first
        seconds."""
        slo = workloads[0].slo
        assert all(workload.slo == slo for workload in workloads)
        rng = random.Random(seed)
        rows, results = [], []
        while len(rows) < examples:
            if progress:
                progress("examples for the models", len(rows), examples)
            workload = faster(rng.choice(workloads), rng.choice(SPEEDS))
            choice = Space.of(workload, profile).draw(rng)
            share = part(workload, choice.num_adapters)
            try:
                x = features(choice, demands_of(share), share, profile)
            except CapacityExceeded:
                continue
            if x[0] > MAX_LOAD:  # what is hopeless anyway would outweigh all else
                continue
            rows.append(x)
            results.append(_targets(try_out(choice, workload, profile, seconds)))
        table, y = np.array(rows), np.array(results)
        return cls({name: Fitted(*fit_best(FEATURES, table, y[:, k])) for k, name in enumerate(TARGETS)}, slo)

    def predict(self, x: Sequence[float]) -> dict[str, float]:
        """By target, from features."""
        return {name: fitted.model.predict(x) for name, fitted in self.by_target.items()}

    def advise(self, workload: Workload, profile: Profile, space: Space | None = None, *, seed: int = 0) -> Advice:
        """The choice with most throughput of those predicted to serve everyone within the SLO.

        CapacityExceeded, with the rule that decided, when there is none.
        """
        if workload.slo != self.slo:
            raise InvalidRequest(f"The models are fitted for {self.slo} and the workload wants {workload.slo}.")
        space = space or Space.of(workload, profile)
        choices = space.choices(workload, profile)
        if not choices:
            raise CapacityExceeded(no_memory(workload, profile))
        seen: dict[Choice, list[float]] = {}

        def rank(choice: Choice) -> tuple[float, ...]:
            share = part(workload, choice.num_adapters)
            try:
                x = seen[choice] = features(choice, demands_of(share), share, profile)
            except CapacityExceeded:
                return (math.inf,)
            return self._rank(x)

        start = min(random.Random(seed).sample(choices, min(ASKED, len(choices))), key=rank)
        choice = climbed(start, rank, space, workload, profile)
        if rank(choice)[0] > 0:
            why = f": {self._why(seen[choice])}" if choice in seen else ""
            raise CapacityExceeded(f"By the models no set-up serves workload {workload.name!r} within its SLO{why}.")
        x = seen[choice]
        predicted = self.predict(x)
        predicted["throughput"] = min(1.0, predicted["served"]) * _arriving(x)
        return Advice(choice, predicted, self._why(x))

    def explain(self, choice: Choice, workload: Workload, profile: Profile) -> dict[str, str]:
        """What the models say of a choice, and why, by target."""
        share = part(workload, choice.num_adapters)
        return self._why(features(choice, demands_of(share), share, profile))

    def _rank(self, x: Sequence[float]) -> tuple[float, ...]:
        """As Outcome.rank, from features; of equal throughput to two digits, what is farthest from its limits."""
        p = self.predict(x)
        short = max(0.0, STARVED + SPARE - p["served"])
        if self.slo != SLO():
            short += max(0.0, ATTAINED + SPARE - p["attained"])
        throughput = min(1.0, p["served"]) * _arriving(x) + p["trained"]
        load, longest = x[FEATURES.index("load")], x[FEATURES.index("largest_step_s")]
        return (short, -float(f"{throughput:.2g}"), load + longest / (self.slo.itl or 1.0))

    def _why(self, x: Sequence[float]) -> dict[str, str]:
        return {name: f"{fitted.kind}: {fitted.model.why(x)}" for name, fitted in self.by_target.items()}


def _arriving(x: Sequence[float]) -> float:
    return x[FEATURES.index("prompt_rate")] + x[FEATURES.index("output_rate")]


def _targets(outcome: Outcome) -> list[float]:
    r, judged = outcome.report, outcome.judged
    served = sum(a.served * a.requests for a in judged.adapters) / max(1, sum(a.requests for a in judged.adapters))
    return [served, judged.attained, r.ttft.mean, r.itl.mean, r.train_throughput]


def faster(workload: Workload, speed: float) -> Workload:
    """The same requests at so many times the rate."""
    requests = tuple(request._replace(time=request.time / speed) for request in workload.requests)
    return replace(workload, requests=requests)


def features(choice: Choice, demands: Sequence[Demand], share: Workload, profile: Profile) -> list[float]:
    """In the order of FEATURES. share: what the server gets of the workload, and demands_of it.

    CapacityExceeded when the choice breaks a limit outright.
    """
    deployment = choice.deployment(share, profile)
    rates = np.array([d.rate for d in demands])
    ranks = np.array([d.rank for d in demands if d.rank] or [0])
    prefill = sum(d.rate for d in demands if d.scope is Scope.PREFILL)
    estimated = estimate(demands, profile, deployment, share.slo)
    return [
        *estimated,
        choice.num_adapters,
        float(rates.sum()),
        float(rates.std()),
        float(ranks.max()),
        float(ranks.mean()),
        float(ranks.std()),
        float(prefill / rates.sum()),
        sum(d.rate * d.prompt_len for d in demands),
        sum(d.rate * d.output_len for d in demands),
        choice.max_loras,
        deployment.kv_tokens,
        choice.max_num_seqs,
        choice.max_num_batched_tokens,
        choice.train_priority,
        float(bool(share.jobs)),
    ]
