"""The planner's set-up against the best there is, on held-out workloads.

By default the twin tries every set-up of a grid: how much of the best one's throughput do the search and the models
reach, the latter alone and improved by the twin, and how long does it take? With --measure the real engine runs the
set-ups of a small grid, in this process and with random adapters, and says how good the one is that the twin would
choose of them, with the profile's margin (search) and without it (no margin); the profile is of this machine, which
should be quiet. The best is the best of those that hold.

    python -m benchmarks.planner [--profile FILE] [--workloads 6] [--save]
    python -m benchmarks.planner --measure MODEL --profile FILE --workloads 3 --duration 8 --output 20 --rate R [--save]

R: such that what arrives is about what the machine can serve, for there the set-ups that hold end.
"""

from __future__ import annotations

import argparse
import gc
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks.common import finish
from multigraft.calibration.calibrate import write_adapter
from multigraft.calibration.drive import Drive
from multigraft.core.errors import CapacityExceeded
from multigraft.engine.core import EngineCore
from multigraft.engine.offline import make_config
from multigraft.engine.parts import build
from multigraft.kernels.openmp import release_pool
from multigraft.planner.choice import Choice, Space, part
from multigraft.planner.models import Models
from multigraft.planner.search import Outcome, improved, search, try_out
from multigraft.twin.describe import describe
from multigraft.twin.profile import Profile
from multigraft.twin.report import Report, report
from multigraft.twin.workload import Arrival, Workload
from tests.planner.instances import cpu

WAYS = ("search", "no margin", "models", "confirmed")
Judge = Callable[[Choice, Workload], Outcome]


def held_out(seed: int, rate: float, duration: float, output: int) -> Workload:
    """24 adapters of skewed rates, with a base rate that grows from workload to workload. output: mean length."""
    return describe(
        {
            "name": f"held out {seed}",
            "duration": duration,
            "seed": seed,
            "slo": {"ttft": 8, "itl": 0.3},
            "adapters": [{"name": "a", "count": 24, "rank": [8, 16, 32], "rate": rate, "zipf": 0.5}],
            "prompt": {"lognormal": [160, 100], "max": 600},
            "output": {"lognormal": [output, output * 2 / 3], "max": 3 * output},
        }
    )


def grid(measured: bool) -> Space:
    """What is tried exhaustively: small where each try takes the workload's duration."""
    return Space(
        num_adapters=(12, 16, 20, 24) if measured else (6, 12, 16, 20, 24),
        max_loras=(24,) if measured else (4, 8, 16, 24),
        adapter_memory=(1.0,),
        max_num_seqs=(4, 24) if measured else (8, 16, 32, 64),
        max_num_batched_tokens=(512,) if measured else (256, 512, 1024, 2048),
    )


class Measured:
    """Judges by the real engine in this process, built anew for each set-up with the settings that a plan would give
    the server. No HTTP: two cores would share their time with the client."""

    def __init__(self, model: str, profile: Profile, folder: Path):
        self.model, self.profile, self.folder = model, profile, folder
        self._known: dict[tuple[str, Choice], Outcome] = {}

    def __call__(self, choice: Choice, workload: Workload) -> Outcome:
        key = (workload.name, choice)
        if key not in self._known:
            self._known[key] = Outcome(choice, self._run(choice, workload), workload.slo)
            r = self._known[key].report
            print(f"{workload.name}: {choice}: {r.throughput:.0f} tokens/s, starved {r.starved}", flush=True)
        return self._known[key]

    def _run(self, choice: Choice, workload: Workload) -> Report:
        share = part(workload, choice.num_adapters)
        settings = choice.flags(share, self.profile)
        del settings["train_priority"]  # nothing is trained
        parts = build(make_config(self.model, device="cpu", max_model_len=self.profile.max_model_len, **settings))
        for adapter in share.adapters:
            folder = self.folder / f"r{adapter.rank}"
            if not folder.exists():
                write_adapter(folder, parts.sites, adapter.rank, parts.loaded.dtype)
            parts.store.register(adapter.name, folder)
        release_pool()
        core = EngineCore(parts)
        core.start()
        try:
            Drive(core, warm_up(share)).run(timeout=60)
            return report(Drive(core, share, seed=1).run(timeout=600), "measured")
        finally:
            core.stop(30)
            parts.store.close()
            del core, parts
            gc.collect()  # before the next engine takes as much memory


def warm_up(workload: Workload) -> Workload:
    """A few requests without adapter."""
    requests = tuple(Arrival(0.1 * i, None, 64 * i + 1, 4) for i in range(5))
    return replace(workload, requests=requests, jobs=())


def compare(workload: Workload, profile: Profile, space: Space, judge: Judge, models: Models | None) -> dict[str, Any]:
    start = time.perf_counter()
    everything = [judge(choice, workload) for choice in space.choices(workload, profile)]
    exhaustive_s = time.perf_counter() - start
    best = min(everything, key=lambda outcome: outcome.rank)
    chosen: dict[str, Choice | None]
    start = time.perf_counter()
    if models is None:  # what was measured is what there is to choose from
        tried = [try_out(outcome.choice, workload, profile) for outcome in everything]
        chosen = {"search": best_of(tried), "no margin": best_of([replace(outcome, slower=None) for outcome in tried])}
    else:
        tried, chosen = [], {"search": search(workload, profile, space).choice}
    search_s = time.perf_counter() - start
    row: dict[str, Any] = {
        "workload": workload.name,
        "choices": len(everything),
        "feasible": sum(outcome.feasible for outcome in everything),
        "best": best.report.throughput,
        "exhaustive_s": exhaustive_s,
        "search_s": search_s,
    }
    if tried:
        ratios = [t.report.throughput / m.report.throughput for t, m in zip(tried, everything, strict=True)]
        row["twin_error"] = statistics.mean(abs(ratio - 1) for ratio in ratios)
        row["same_verdict"] = sum(t.feasible == m.feasible for t, m in zip(tried, everything, strict=True))
        row["wrongly_feasible"] = sum(t.feasible > m.feasible for t, m in zip(tried, everything, strict=True))
        row["set_ups"] = [
            {
                "choice": str(m.choice),
                "measured": round(m.report.throughput, 1),
                "attained": round(m.report.attained, 3),
                "holds": m.feasible,
                "twin": round(t.report.throughput, 1),
                "twin_attained": round(t.report.attained, 3),
                "twin_holds": t.feasible,
                "on_edge": t.on_edge,
            }
            for t, m in zip(tried, everything, strict=True)
        ]
    if models is not None:
        start = time.perf_counter()
        try:
            alone = chosen["models"] = models.advise(workload, profile, space).choice
            row["models_s"] = time.perf_counter() - start
            chosen["confirmed"] = improved(try_out(alone, workload, profile), workload, profile, space).choice
        except CapacityExceeded:
            chosen["models"] = None
    for name, choice in chosen.items():
        outcome = choice and judge(choice, workload)
        row[name] = outcome.report.throughput / best.report.throughput if outcome else 0.0
        row[f"{name}_holds"] = bool(outcome and outcome.feasible)
        row[f"{name}_choice"] = str(choice)
    return row


def best_of(outcomes: Sequence[Outcome]) -> Choice | None:
    """As search: None when nothing holds."""
    best = min(outcomes, key=lambda outcome: outcome.rank)
    return best.choice if best.feasible else None


def show(rows: Sequence[dict[str, Any]]) -> None:
    ways = [way for way in WAYS if way in rows[0]]
    table = Table("workload", "set-ups", "feasible", "best tokens/s", *ways)
    for r in rows:
        shares = [
            f"{r[way]:.1%}{'' if r[f'{way}_holds'] else ' starving or late'}" if r[way] else "none holds"
            for way in ways
        ]
        table.add_row(str(r["workload"]), str(r["choices"]), str(r["feasible"]), f"{r['best']:.0f}", *shares)
    Console().print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--profile", type=Path)
    parser.add_argument("--measure", metavar="MODEL")
    parser.add_argument("--margin", type=float, help="in place of the profile's")
    parser.add_argument("--workloads", type=int, default=6)
    parser.add_argument("--duration", type=float, default=60.0)
    parser.add_argument("--rate", type=float, default=0.12, help="requests a second and adapter in the first workload")
    parser.add_argument("--output", type=int, default=60, help="mean tokens of an output")
    parser.add_argument("--examples", type=int, default=400)
    parser.add_argument("--save", action="store_true")
    args = parser.parse_args()
    if args.measure and not args.profile:
        parser.error("--measure needs the --profile that `multigraft calibrate` wrote on this machine")
    profile = Profile.load(args.profile) if args.profile else cpu()
    profile = profile if args.margin is None else replace(profile, margin=args.margin)
    space = grid(bool(args.measure))
    training = [held_out(seed, args.rate * (1 + seed / 4), args.duration, args.output) for seed in range(4)]
    models = None if args.measure else Models.fit(training, profile, examples=args.examples)
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        judge: Judge = lambda choice, workload: try_out(choice, workload, profile)  # noqa: E731
        if args.measure:
            judge = Measured(args.measure, profile, Path(folder))
        for k in range(args.workloads):
            workload = held_out(100 + k, args.rate * (1 + k / args.workloads), args.duration, args.output)
            rows.append(compare(workload, profile, space, judge, models))
    show(rows)
    fitted = models.by_target.items() if models else ()
    errors = {name: {"kind": f.kind, "mean_abs_error": round(f.error, 4)} for name, f in fitted}
    settings = {
        "profile": Path(profile.model).name,
        "hardware": dict(profile.hardware),
        "judge": "engine" if args.measure else "twin",
        "duration": args.duration,
        "margin": profile.margin,
        "profile_errors": dict(profile.errors),
    }
    finish("planner", settings | {"models": errors}, rows, save=args.save)


if __name__ == "__main__":
    main()
