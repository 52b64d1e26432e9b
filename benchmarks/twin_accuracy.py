"""How well the twin predicts the real engine: held-out workloads, served by the engine in this process and simulated.

Calibrates first, unless the file --profile is there, and saves the profile in it, and beside it what it was fit to and
the steps of the runs.
Then each workload runs for --seconds of arrivals through the engine (random adapters, ServeGen's rates, some with a
fine-tuning job beside them) and through the twin, under the same configuration.
Prints the plain relative error and the halved SMAPE of the published twins, for every workload, and ends in one JSON
line. A workload during which the machine was slow, by fixed steps timed before and behind it, or other processes
computed, is run again up to twice; the least disturbed run counts, whatever it says.

    python -m benchmarks.twin_accuracy MODEL DATA_FOLDER [--profile P] [--seconds 12] [--smoke] [--save]
    python -m benchmarks.twin_accuracy random-8b DATA_FOLDER --device cuda --max-num-seqs 256 --slots 32 \
        --max-num-batched-tokens 2048 --kv-gib 8 --adapter-gib 6 --train-memory-gib 8 --microbatch 1024 \
        --workloads 8 --seconds 6 --calibrate-seconds 60 --attempts 1

MODEL: a folder or a .gguf file; random-8b and random-smollm2 are Llama-3.1-8B and SmolLM2-135M with random weights.
DATA_FOLDER holds servegen-m-small; without it arrivals are gamma. Where a machine is lent for minutes only, several
processes with cores of their own each run a part, with one profile, and are shown together:

    taskset -c 0,1 python -m benchmarks.twin_accuracy random-smollm2 DATA_FOLDER --profile P --part 0 2 --save
    taskset -c 2,3 python -m benchmarks.twin_accuracy random-smollm2 DATA_FOLDER --profile P --part 1 2 --save
    python -m benchmarks.twin_accuracy --join 2      the last two lines of results/twin_accuracy.jsonl
"""

from __future__ import annotations

import argparse
import dataclasses
import gc
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from operator import itemgetter
from pathlib import Path
from random import Random
from typing import Any, TypeVar

import torch
from rich.console import Console
from rich.table import Table

from benchmarks.common import LLAMA_8B, SMOLLM2_135M, finish, saved_rows, until_cut
from multigraft.calibration.calibrate import calibrate, write_adapter
from multigraft.calibration.drive import Drive, sized
from multigraft.calibration.points import PointRunner
from multigraft.calibration.speed import TOLERANCE, probe, slowness
from multigraft.core.config import EngineConfig, TrainingConfig
from multigraft.engine import parts as engine_parts
from multigraft.engine.core import EngineCore
from multigraft.engine.neighbours import others_seconds
from multigraft.engine.offline import make_config
from multigraft.kernels.openmp import release_pool
from multigraft.scheduling.steptime import StepShape
from multigraft.twin.compare import compare, macro_f1, starvation
from multigraft.twin.describe import describe
from multigraft.twin.profile import Profile
from multigraft.twin.report import Report, report
from multigraft.twin.simulate import simulate
from multigraft.twin.workload import Workload

T = TypeVar("T")
OTHERS = 0.05
"""Cores that other processes may take of a run."""
RANKS = (8, 16, 32, 64)
RANDOM = {"random-8b": LLAMA_8B, "random-smollm2": SMOLLM2_135M}
GOALS = {"throughput": 0.05, "output_throughput": 0.05, "ttft.mean": 0.10, "itl.mean": 0.10}


def workloads(seconds: float, capacity: float, data: Path | None, microbatch: int) -> Iterator[Workload]:
    """capacity: tokens per second, prompts and outputs, that the twin serves at most. Loads are shares of it."""
    cases = [
        # adapters, ranks, scope, load, arrivals, a fine-tuning job beside it
        (4, [8], "all", 0.1, "servegen", False),
        (4, [64], "all", 0.5, "gamma", False),
        (8, [16], "prefill", 0.3, "servegen", True),
        (8, [8, 64], "all", 0.9, "poisson", False),
        (16, [8, 16, 32], "all", 0.5, "servegen", True),
        (16, [32], "prefill", 0.8, "servegen", False),
        (32, [8], "all", 0.7, "servegen", False),
        (32, [16, 64], "prefill", 1.5, "gamma", False),
        (64, [8, 16], "all", 0.2, "servegen", True),
        (64, [8, 32], "all", 1.2, "servegen", False),
        (96, [16], "prefill", 0.6, "poisson", False),
        (96, [8, 64], "all", 1.5, "servegen", True),
        (128, [8], "all", 0.25, "servegen", False),
        (128, [8, 16, 32, 64], "all", 0.8, "servegen", False),
        (128, [8, 16], "all", 2.0, "gamma", False),
    ]
    for number, (count, ranks, scope, load, arrivals, trains) in enumerate(cases):
        group: dict[str, Any] = {"name": "a", "count": count, "rank": ranks, "scope": scope}
        process: Any = {"gamma": 3.0} if arrivals == "gamma" else "poisson"
        if arrivals == "servegen" and data is not None:
            process = {"servegen": str(data / "servegen-m-small"), "start": 36_000 + 600 * number}
        group |= {"arrivals": process, "zipf": 0 if arrivals == "servegen" and data is not None else 1.0}
        name = f"{count} x r{'/'.join(map(str, ranks))} {scope} {load:g} {arrivals}{' + job' if trains else ''}"
        top = {"name": name, "duration": seconds, "seed": number}
        top |= {"prompt": {"lognormal": [150, 150], "max": 900}, "output": {"lognormal": [40, 30]}}
        if trains:
            top["jobs"] = [{"name": "job", "tokens": 1_000_000, "microbatch": microbatch}]
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
        training=config.training,
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


class Machine:
    """How much a run was disturbed, in units of what is still calm."""

    def __init__(self, core: EngineCore):
        self._runner = PointRunner(core, Random(0))
        self._probes = [probe(self._runner) for _ in range(5)]

    def watch(self, run: Callable[[], T]) -> tuple[T, float]:
        """(what it returns, disturbance)."""
        self._probes.append(probe(self._runner))
        begun, others = time.monotonic(), others_seconds()
        found = run()
        share = (others_seconds() - others) / (time.monotonic() - begun)
        self._probes.append(probe(self._runner))
        slow = max(slowness(self._probes)[-2:]) - 1
        return found, max(share / OTHERS, slow / (TOLERANCE - 1))


def measure(
    workload: Workload, config: EngineConfig, core: EngineCore, profile: Profile, seed: int, kept: Path | None
) -> tuple[Report, Report, float | None]:
    """(twin, measured, error of the summed step times under the measured steps without training, if there are any).

    kept: gets the steps, a JSON line for each.
    """
    sizes = sized(workload, core)
    drive = Drive(core, sizes, seed=seed)
    steps = Steps(drive)
    measured = report(drive.run(timeout=600), "measured")
    pairs = list(zip(steps.shapes, steps.seconds, strict=False))
    if kept is not None:
        with kept.open("a") as file:
            for shape, seconds in pairs:
                line = {"workload": workload.name, "run": seed, "seconds": seconds, **dataclasses.asdict(shape)}
                file.write(json.dumps(line) + "\n")
    pairs = [(s, t) for s, t in pairs if not s.train_layers]
    model_error = sum(profile.steps.predict(s) for s, _ in pairs) / sum(t for _, t in pairs) - 1 if pairs else None
    return report(simulate(sizes, profile, deployment(profile, config))), measured, model_error


def register(parts: Any, folder: Path, workload: Workload) -> None:
    """The workload's adapters, cold, in place of those of the workload before."""
    for info in parts.store.list():
        parts.store.unregister(info.name)
    for adapter in workload.adapters:
        parts.store.register(adapter.name, folder / f"r{adapter.rank}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?")
    parser.add_argument("data", type=Path, nargs="?")
    parser.add_argument("--profile", type=Path)
    parser.add_argument("--seconds", type=float, default=12.0)
    parser.add_argument("--calibrate-seconds", type=float, default=120.0)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--kv-gib", type=float, default=0.5)
    parser.add_argument("--adapter-gib", type=float, default=0.6)
    parser.add_argument("--max-num-seqs", type=int, default=32)
    parser.add_argument("--max-num-batched-tokens", type=int, default=512)
    parser.add_argument("--slots", type=int, default=16)
    parser.add_argument("--max-model-len", type=int, default=2048)
    parser.add_argument("--train-memory-gib", type=float)
    parser.add_argument("--microbatch", type=int, default=256, help="rows of a pass of the fine-tuning jobs")
    parser.add_argument("--workloads", type=int, help="so many of them, evenly chosen")
    parser.add_argument("--only", default="", metavar="WORD", help="those with this in their names: job, prefill, r64")
    parser.add_argument("--part", type=int, nargs=2, metavar=("I", "N"), help="the Ith of N parts of these, from 0 on")
    parser.add_argument("--join", type=int, metavar="LINES", help="of results/twin_accuracy.jsonl, in place of a run")
    parser.add_argument("--attempts", type=int, default=3, help="runs of a workload that was disturbed, at most")
    parser.add_argument("--smoke", action="store_true", help="three short workloads: whether it runs, not how well")
    parser.add_argument("--save", action="store_true")
    args = parser.parse_args()
    if args.smoke:
        args.seconds, args.calibrate_seconds = 3.0, 5.0
    if (args.model is None) == (args.join is None):
        parser.error("a model, or --join")
    if args.join:
        rows = saved_rows("twin_accuracy", args.join)
        show(rows)
        print(json.dumps(summary(rows)))
        return
    models = tempfile.TemporaryDirectory()
    if args.model in RANDOM:
        (Path(models.name) / "config.json").write_text(json.dumps(RANDOM[args.model]))
    config = make_config(
        models.name if args.model in RANDOM else args.model,
        load_format="dummy" if args.model in RANDOM else "auto",
        max_model_len=args.max_model_len,
        device=args.device,
        kv_cache_gib=args.kv_gib,
        adapter_memory_gib=args.adapter_gib,
        max_loras=args.slots,
        max_num_seqs=args.max_num_seqs,
        max_num_batched_tokens=args.max_num_batched_tokens,
    )
    config = replace(config, training=TrainingConfig(train_memory_gib=args.train_memory_gib))
    if args.profile is not None and args.profile.exists():
        profile = Profile.load(args.profile)
    else:
        profile = calibrate(
            config,
            seconds=args.calibrate_seconds,
            progress=lambda what, _: print(what, end="\x1b[K\r", file=sys.stderr),
            points_file=args.profile and args.profile.with_suffix(".points.jsonl"),
        )
        if args.profile is not None:
            profile.save(args.profile)
        gc.collect()  # the engine that calibrated; its memory is needed
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
    everything = workloads(args.seconds, capacity_of(profile, config), args.data, args.microbatch)
    found = [workload for workload in everything if args.only in workload.name]
    if not found:
        parser.error(f"no workload has {args.only!r} in its name")
    count = min(len(found), 3 if args.smoke else args.workloads or len(found))
    chosen = found[:: len(found) // count][:count]
    kept = args.profile and args.profile.with_suffix(f".live{args.part[0] if args.part else ''}.jsonl")
    rows = []
    with tempfile.TemporaryDirectory() as folder, until_cut():
        parts = engine_parts.build(config)
        for rank in RANKS:
            write_adapter(Path(folder) / f"r{rank}", parts.sites, rank, parts.loaded.dtype)
        release_pool()  # the engine's thread has the cores to itself
        core = EngineCore(parts)
        core.start()
        machine = Machine(core)
        for workload in chosen[args.part[0] :: args.part[1]] if args.part else chosen:
            begun, runs = time.monotonic(), []
            while len(runs) < args.attempts and (not runs or runs[-1][1] > 1):
                register(parts, Path(folder), workload)
                runs.append(machine.watch(partial(measure, workload, config, core, profile, len(runs), kept)))
            (twin, measured, model_error), disturbance = min(runs, key=itemgetter(1))
            rows.append(row(twin, measured, model_error) | {"runs": len(runs), "disturbance": disturbance})
            errors = ", ".join(f"{m} {rows[-1][f'{m}_error']:+.1%}" for m in GOALS)
            seconds = time.monotonic() - begun
            print(f"{workload.name}: {errors}; {len(runs)} runs, {disturbance:.2f}, {seconds:.0f} s", flush=True)
        core.stop(30)
    if not rows:
        sys.exit("cut off before the first workload was through")
    show(rows)
    settings = {
        "model": args.model if args.model in RANDOM else Path(args.model).name,
        "hardware": dict(profile.hardware),
        "seconds": args.seconds,
        "only": args.only,
        "part": args.part,
        "microbatch": args.microbatch,
        "profile_errors": dict(profile.errors),
        **summary(rows),
    }
    finish("twin_accuracy", settings, rows, save=args.save)


def summary(rows: list[dict[str, Any]]) -> dict[str, Any]:
    predicted, actual = ("".join(r[key] for r in rows) for key in ("twin_starvation", "starvation"))
    return {
        "workloads": len(rows),
        "starvation_macro_f1": round(macro_f1([c == "1" for c in predicted], [c == "1" for c in actual]), 4),
        "starved_share": round(actual.count("1") / len(actual), 4),
        "worst": {m: max(abs(r[f"{m}_error"]) for r in rows) for m in GOALS},
        "mean": {m: statistics.mean(abs(r[f"{m}_error"]) for r in rows) for m in GOALS},
        "mean_halved_smape": {m: statistics.mean(r[f"{m}_smape"] for r in rows) for m in GOALS},
        "goals": GOALS,
    }


def row(twin: Report, measured: Report, model_error: float | None) -> dict[str, Any]:
    found: dict[str, Any] = {"workload": measured.workload, "requests": measured.requests}
    for d in compare(twin, measured):
        found |= {d.metric: d.measured, f"{d.metric}_error": d.relative, f"{d.metric}_smape": d.smape}
    assert measured.resources is not None and twin.resources is not None
    found |= {"loads": measured.resources.loads, "twin_loads": twin.resources.loads, "step_time_error": model_error}
    found |= {"starved": measured.starved_adapters, "twin_starved": twin.starved_adapters}
    found |= {"starvation": _flags(measured), "twin_starvation": _flags(twin)}
    found |= {"trained": measured.train_throughput, "twin_trained": twin.train_throughput}
    return found | {"measured_queueing": dataclasses.asdict(measured.queueing)["mean"]}


def _flags(report_: Report) -> str:
    """1 for each adapter that starves, in order, and 0 for each other."""
    return "".join(str(int(starved)) for starved in starvation([report_]))


def show(rows: list[dict[str, Any]]) -> None:
    table = Table(
        "workload", "tok/s", "error", "TTFT, ms", "error", "ITL, ms", "error", "loads", "steps", "starved", "trained"
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
            "" if r["step_time_error"] is None else f"{r['step_time_error']:+.1%}",
            f"{r['starved']} / {r['twin_starved']}",
            f"{r['trained']:.0f} / {r['twin_trained']:.0f}",
        )
    Console(width=150).print(table)


if __name__ == "__main__":
    main()
