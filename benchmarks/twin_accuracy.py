"""How well the twin predicts the real engine: held-out workloads, served by the engine in this process and simulated.

Calibrates first, or takes --profile. Then each workload runs for --seconds of arrivals through the engine (random
adapters, real rates and lengths) and through the twin, under the same configuration. Prints the plain relative error
and the halved SMAPE of the published twins, for every workload, and ends in one JSON line.

    python -m benchmarks.twin_accuracy MODEL_FOLDER DATA_FOLDER [--profile P] [--seconds 25] [--smoke] [--save]

DATA_FOLDER holds azure_llm_2023_conv.csv and servegen-m-small; without it arrivals are gamma and lengths lognormal.
"""

from __future__ import annotations

import argparse
import dataclasses
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks.common import finish
from multigraft.calibration.calibrate import calibrate, write_adapter
from multigraft.calibration.drive import Drive, sized
from multigraft.core.config import EngineConfig
from multigraft.engine import parts as engine_parts
from multigraft.engine.core import EngineCore
from multigraft.engine.offline import make_config
from multigraft.kernels.openmp import release_pool
from multigraft.scheduling.steptime import StepShape
from multigraft.twin.compare import compare, macro_f1, starvation
from multigraft.twin.describe import describe
from multigraft.twin.profile import Profile
from multigraft.twin.report import Report, report
from multigraft.twin.simulate import simulate
from multigraft.twin.workload import Workload

RANKS = (8, 16, 32, 64)
GOALS = {"throughput": 0.05, "ttft.mean": 0.10, "itl.mean": 0.10}


def workloads(seconds: float, capacity: float, data: Path | None) -> Iterator[Workload]:
    """capacity: tokens per second, prompts and outputs, that the twin serves at most. Loads are shares of it."""
    cases = [
        # adapters, ranks, scope, load, skew
        (4, [8], "all", 0.1, "servegen"),
        (4, [64], "all", 0.5, "gamma"),
        (8, [16], "prefill", 0.3, "servegen"),
        (8, [8, 64], "all", 0.9, "poisson"),
        (16, [8, 16, 32], "all", 0.5, "servegen"),
        (16, [32], "prefill", 0.8, "servegen"),
        (32, [8], "all", 0.7, "servegen"),
        (32, [16, 64], "prefill", 1.5, "gamma"),
        (64, [8, 16], "all", 0.4, "servegen"),
        (64, [8, 32], "all", 1.2, "servegen"),
        (96, [16], "prefill", 0.6, "poisson"),
        (128, [8], "all", 0.25, "servegen"),
        (128, [8, 16, 32, 64], "all", 0.8, "servegen"),
        (128, [8, 16], "all", 2.0, "gamma"),
    ]
    for number, (count, ranks, scope, load, arrivals) in enumerate(cases):
        group: dict[str, Any] = {"name": "a", "count": count, "rank": ranks, "scope": scope}
        process: Any = {"gamma": 3.0} if arrivals == "gamma" else "poisson"
        if arrivals == "servegen" and data is not None:
            process = {"servegen": str(data / "servegen-m-small"), "start": 36_000 + 600 * number}
        group |= {"arrivals": process, "zipf": 0 if arrivals == "servegen" and data is not None else 1.0}
        top = {"name": f"{count} x r{'/'.join(map(str, ranks))} {scope} {load:g} {arrivals}", "duration": seconds}
        top |= {"seed": number, "prompt": {"lognormal": [150, 150], "max": 900}, "output": {"lognormal": [40, 30]}}
        rate = max(load * capacity / 190, 8 / seconds) / count
        yield describe(top | {"adapters": [group | {"rate": rate}]})


def capacity_of(profile: Profile, config: EngineConfig) -> float:
    """Tokens per second under a backlog, by the twin: only to choose the loads."""
    top = {"duration": 1, "prompt": 150, "output": 40, "adapters": [{"name": "a", "count": 16, "rank": 16, "rate": 20}]}
    record = simulate(describe(top), profile, deployment(profile, config))
    return record.workload.tokens / record.seconds


def deployment(profile: Profile, config: EngineConfig) -> Any:
    return profile.deployment(
        scheduler=config.scheduler,
        max_loras=config.adapters.max_loras,
        adapter_bytes=int(config.adapters.adapter_memory_gib * 2**30),  # type: ignore[operator]
        kv_bytes=int(config.cache.kv_cache_gib * 2**30),  # type: ignore[operator]
        max_cpu_loras=config.adapters.max_cpu_loras,
        enable_prefix_caching=config.cache.enable_prefix_caching,
    )


class Steps:
    """Wraps a Drive as the engine's observer, and keeps shapes and seconds: to tell the model's error from the rest."""

    def __init__(self, drive: Drive):
        self.drive, self.shapes, self.seconds = drive, [], []  # type: ignore[var-annotated]
        self.scheduled_, self.ran_ = drive.scheduled, drive.ran
        drive.scheduled, drive.ran = self.scheduled, self.ran  # type: ignore[method-assign]

    def scheduled(self, batch: Any) -> None:
        if batch:
            self.shapes.append(StepShape.of(batch))
        self.scheduled_(batch)

    def ran(self, batch: Any, seconds: float) -> None:
        self.seconds.append(seconds)
        self.ran_(batch, seconds)


def measure(
    workload: Workload, config: EngineConfig, core: EngineCore, profile: Profile
) -> tuple[Report, Report, float]:
    """(twin, measured, error of the summed step times under the measured steps)."""
    sizes = sized(workload, core)
    drive = Drive(core, sizes)
    steps = Steps(drive)
    measured = report(drive.run(timeout=600), "measured")
    pairs = list(zip(steps.shapes, steps.seconds, strict=False))
    model_error = sum(profile.steps.predict(s) for s, _ in pairs) / sum(t for _, t in pairs) - 1
    return report(simulate(sizes, profile, deployment(profile, config))), measured, model_error


def register(parts: Any, folder: Path, workload: Workload) -> None:
    """The workload's adapters, cold, in place of those of the workload before."""
    for info in parts.store.list():
        parts.store.unregister(info.name)
    for adapter in workload.adapters:
        parts.store.register(adapter.name, folder / f"r{adapter.rank}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("data", type=Path, nargs="?")
    parser.add_argument("--profile", type=Path)
    parser.add_argument("--seconds", type=float, default=25.0)
    parser.add_argument("--calibrate-seconds", type=float, default=120.0)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--kv-gib", type=float, default=0.5)
    parser.add_argument("--adapter-gib", type=float, default=0.6)
    parser.add_argument("--max-num-seqs", type=int, default=32)
    parser.add_argument("--max-num-batched-tokens", type=int, default=512)
    parser.add_argument("--slots", type=int, default=16)
    parser.add_argument("--smoke", action="store_true", help="three short workloads: whether it runs, not how well")
    parser.add_argument("--save", action="store_true")
    args = parser.parse_args()
    if args.smoke:
        args.seconds, args.calibrate_seconds = 3.0, 5.0
    config = make_config(
        args.model,
        device=args.device,
        kv_cache_gib=args.kv_gib,
        adapter_memory_gib=args.adapter_gib,
        max_loras=args.slots,
        max_num_seqs=args.max_num_seqs,
        max_num_batched_tokens=args.max_num_batched_tokens,
    )
    if args.profile is not None:
        profile = Profile.load(args.profile)
    else:
        profile = calibrate(
            config,
            seconds=args.calibrate_seconds,
            progress=lambda what, _: print(what, end="\x1b[K\r", file=sys.stderr),
        )
    rows = []
    pairs: list[tuple[Report, Report]] = []
    with tempfile.TemporaryDirectory() as folder:
        parts = engine_parts.build(config)
        for rank in RANKS:
            write_adapter(Path(folder) / f"r{rank}", parts.sites, rank, parts.loaded.dtype)
        release_pool()  # the engine's thread has the cores to itself
        core = EngineCore(parts)
        core.start()
        found = list(workloads(args.seconds, capacity_of(profile, config), args.data))
        for workload in found[:: len(found) // 3] if args.smoke else found:
            register(parts, Path(folder), workload)
            begun = time.monotonic()
            twin, measured, model_error = measure(workload, config, core, profile)
            pairs.append((twin, measured))
            rows.append(row(twin, measured, model_error))
            print(f"{workload.name}: {len(workload.requests)} requests, {time.monotonic() - begun:.0f} s", flush=True)
        core.stop(30)
    show(rows)
    predicted, actual = (starvation(reports) for reports in zip(*pairs, strict=True))
    settings = {
        "seconds": args.seconds,
        "profile_errors": dict(profile.errors),
        "starvation_macro_f1": round(macro_f1(predicted, actual), 4),
        "starved_share": round(sum(actual) / len(actual), 4),
        "worst": {m: max(abs(r[f"{m}_error"]) for r in rows) for m in GOALS},
        "mean": {m: statistics.mean(abs(r[f"{m}_error"]) for r in rows) for m in GOALS},
        "mean_halved_smape": {m: statistics.mean(r[f"{m}_smape"] for r in rows) for m in GOALS},
        "goals": GOALS,
    }
    finish("twin_accuracy", settings, rows, save=args.save)


def row(twin: Report, measured: Report, model_error: float) -> dict[str, Any]:
    found: dict[str, Any] = {"workload": measured.workload, "requests": measured.requests}
    for d in compare(twin, measured):
        found |= {d.metric: d.measured, f"{d.metric}_error": d.relative, f"{d.metric}_smape": d.smape}
    assert measured.resources is not None and twin.resources is not None
    found |= {"loads": measured.resources.loads, "twin_loads": twin.resources.loads, "step_time_error": model_error}
    found |= {"starved": measured.starved_adapters, "twin_starved": twin.starved_adapters}
    return found | {"measured_queueing": dataclasses.asdict(measured.queueing)["mean"]}


def show(rows: list[dict[str, Any]]) -> None:
    table = Table(
        "workload", "tok/s", "error", "TTFT, ms", "error", "ITL, ms", "error", "loads", "steps' error", "starved"
    )
    for r in rows:
        table.add_row(
            r["workload"],
            f"{r['throughput']:.0f}",
            f"{r['throughput_error']:+.1%}",
            f"{1e3 * r['ttft.mean']:.0f}",
            f"{r['ttft.mean_error']:+.1%}",
            f"{1e3 * r['itl.mean']:.1f}",
            f"{r['itl.mean_error']:+.1%}",
            f"{r['loads']} / {r['twin_loads']}",
            f"{r['step_time_error']:+.1%}",
            f"{r['starved']} / {r['twin_starved']}",
        )
    Console(width=150).print(table)


if __name__ == "__main__":
    main()
