"""How well the twin predicts the real engine: held-out workloads, served by the engine in this process and simulated.

Calibrates the engine, then runs each workload for --seconds of arrivals through it (random adapters, ServeGen's rates,
some with a fine-tuning job beside them) and through the twin, under the same configuration. Prints the plain relative
error and the halved SMAPE of the published twins, for every workload, and ends in one JSON line.

Engines differ: on two CPU cores one's steps took 15 % longer than another's in the same minutes; and machines whose
processors are shared are faster now and slower then. So calibration is of the same engine, and goes on between the
runs: all of its steps tell the profile, and those before and behind a run how fast it was then: decode steps, which
wait for memory, and what prompts and training add, which waits for arithmetic, each at its own speed. The twin
simulates that; errors "as calibrated", at the profile's own speed, are told, too. A run during which the speed changed
or other processes computed is repeated up to twice; the least disturbed one counts, whatever it says.

    python -m benchmarks.twin_accuracy MODEL DATA_FOLDER [--seconds 24] [--smoke] [--save] [--keep FOLDER]
    python -m benchmarks.twin_accuracy random-8b DATA_FOLDER --device cuda --max-num-seqs 256 --slots 32 \
        --max-num-batched-tokens 2048 --kv-gib 8 --adapter-gib 6 --train-memory-gib 24 --microbatch 4096 \
        --workloads 7 --seconds 6 --calibrate-seconds 60 --between 4 --attempts 1

MODEL: a folder or a .gguf file; random-8b and random-smollm2 are Llama-3.1-8B and SmolLM2-135M with random weights.
DATA_FOLDER holds servegen-m-small; without it arrivals are gamma. Where a machine is lent for minutes only, several
processes with cores of their own each run a part and are shown together:

    taskset -c 0,1 python -m benchmarks.twin_accuracy random-smollm2 DATA_FOLDER --part 0 2 --save
    taskset -c 2,3 python -m benchmarks.twin_accuracy random-smollm2 DATA_FOLDER --part 1 2 --save
    python -m benchmarks.twin_accuracy --join 2      the last two lines of results/twin_accuracy.jsonl
"""

from __future__ import annotations

import argparse
import dataclasses
import gzip
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from operator import attrgetter
from pathlib import Path
from random import Random
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks.common import LLAMA_8B, SMOLLM2_135M, finish, saved_rows, until_cut
from multigraft.calibration.calibrate import Calibration
from multigraft.calibration.drive import Drive, sized
from multigraft.calibration.points import Timed
from multigraft.core.config import EngineConfig, TrainingConfig
from multigraft.engine import parts as engine_parts
from multigraft.engine.core import EngineCore
from multigraft.engine.neighbours import others_seconds
from multigraft.engine.offline import make_config
from multigraft.kernels.openmp import release_pool
from multigraft.scheduling.steptime import FEATURES, TRAIN, StepShape, StepTimeModel
from multigraft.scheduling.training import TrainingShare
from multigraft.twin.compare import compare, macro_f1, starvation
from multigraft.twin.describe import describe
from multigraft.twin.profile import Profile
from multigraft.twin.report import Report, report
from multigraft.twin.simulate import simulate
from multigraft.twin.workload import Workload

OTHERS, CHANGE = 0.05, 0.1
"""Cores that other processes may take of a run, and by how much the machine's speed may change over it."""
OF_PROMPTS = [i for i, name in enumerate(FEATURES) if "prefill" in name]
"""Terms of the step-time model that steps of decode rows alone do not have."""
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


@dataclass
class Slowness:
    """How many times as long as the profile says steps take now."""

    decodes: float
    """Of decode rows alone, and what other steps have in common with them."""
    prompts: float
    """What prompts add to a step, and training, which waits for arithmetic, too."""

    def of(self, model: StepTimeModel) -> StepTimeModel:
        """The model at this speed."""
        terms = enumerate(model.weights)
        weights = (w * (self.prompts if i in OF_PROMPTS or i >= TRAIN else self.decodes) for i, w in terms)
        return replace(model, weights=tuple(weights))

    @classmethod
    def seen(cls, steps: Sequence[Timed], model: StepTimeModel) -> Slowness:
        without = cls(1.0, 0.0).of(model)
        decodes = sum(t / model.predict(s) for s, t in steps if not s.prefill_rows)
        decodes /= sum(not s.prefill_rows for s, _ in steps)
        prompts = [(s, t) for s, t in steps if s.prefill_rows]
        common = sum(without.predict(s) for s, _ in prompts)
        added = sum(model.predict(s) for s, _ in prompts) - common
        return cls(decodes, (sum(t for _, t in prompts) - decodes * common) / added)


def against(steps: Sequence[Timed], model: StepTimeModel) -> float:
    """How many times as long as predicted the steps took, all together."""
    return sum(t for _, t in steps) / sum(model.predict(s) for s, _ in steps)


@dataclass
class Run:
    workload: Workload
    """With the adapters' sizes."""
    measured: Report
    steps: list[Timed]
    number: int
    """Of the workload's runs."""
    around: list[Timed] = field(default_factory=list)
    """Designed steps before and behind it."""
    disturbance: float = 0.0
    """Up to 1 is calm."""


class Machine:
    """Runs workloads, and measures between them how fast the engine is."""

    def __init__(self, core: EngineCore, calibration: Calibration, config: EngineConfig, folder: Path, between: float):
        self._core, self._calibration, self._config, self._folder = core, calibration, config, folder
        self._between = between
        self._model = calibration.profile(config).steps
        self._before = self._look()

    def run(self, workload: Workload, number: int) -> Run:
        core = self._core
        core.scheduler.training = TrainingShare(self._config.training)  # the twin's knows nothing either
        self._unregister()
        for adapter in workload.adapters:
            core.parts.store.register(adapter.name, self._folder / f"r{adapter.rank}")
        sizes = sized(workload, core)
        drive = Drive(core, sizes, seed=number)
        steps = Steps(drive)
        begun, others = time.monotonic(), others_seconds()
        found = Run(sizes, report(drive.run(timeout=600), "measured"), [], number)
        share = (others_seconds() - others) / (time.monotonic() - begun)
        found.steps = list(zip(steps.shapes, steps.seconds, strict=False))
        before, behind = self._before, self._look()
        self._before, found.around = behind, before + behind
        was, then = (against(looked, self._model) for looked in (before, behind))
        found.disturbance = max(share / OTHERS, (max(was, then) / min(was, then) - 1) / CHANGE)
        return found

    def _look(self) -> list[Timed]:
        self._unregister()
        self._calibration.register()
        return [step for _, point in self._calibration.measure_steps(self._between) for step in point]

    def _unregister(self) -> None:
        """Also what is on the device."""
        store = self._core.parts.store
        for info in store.list():
            store.unregister(info.name)


def keep(
    folder: Path, runs: Sequence[Run], profile: Profile, calibration: Calibration, measured: dict[str, Any]
) -> None:
    """For benchmarks.twin_again."""
    folder.mkdir(parents=True, exist_ok=True)
    profile.save(folder / "profile.json")
    (folder / "measured.json").write_text(json.dumps(measured))
    calibration.save(folder / "points.jsonl.gz")
    with gzip.open(folder / "live.jsonl.gz", "wt") as file:
        for run in runs:
            for shape, seconds in run.steps:
                line = {"workload": run.workload.name, "seconds": seconds, **dataclasses.asdict(shape)}
                file.write(json.dumps(line) + "\n")


def say(what: str, share: float) -> None:
    print(what, end="\x1b[K\r", file=sys.stderr)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?")
    parser.add_argument("data", type=Path, nargs="?")
    parser.add_argument("--keep", type=Path, metavar="FOLDER", help="gets what benchmarks.twin_again reads")
    parser.add_argument("--seconds", type=float, default=12.0)
    parser.add_argument("--calibrate-seconds", type=float, default=120.0)
    parser.add_argument("--between", type=float, default=12.0, help="seconds of designed steps between two runs")
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
        args.seconds, args.calibrate_seconds, args.between = 3.0, 5.0, 1.0
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
    runs: list[Run] = []
    with tempfile.TemporaryDirectory() as adapters, until_cut():
        parts = engine_parts.build(config)
        core = EngineCore(parts)
        calibration = Calibration(core, Path(adapters), Random(0), say)
        release_pool()  # the engine's thread has the cores to itself
        core.start()
        calibration.all(args.calibrate_seconds)
        machine = Machine(core, calibration, config, Path(adapters), args.between)
        capacity = capacity_of(calibration.profile(config), config)
        found = [w for w in workloads(args.seconds, capacity, args.data, args.microbatch) if args.only in w.name]
        if not found:
            parser.error(f"no workload has {args.only!r} in its name")
        count = min(len(found), 3 if args.smoke else args.workloads or len(found))
        chosen = found[:: len(found) // count][:count]
        for workload in chosen[args.part[0] :: args.part[1]] if args.part else chosen:
            mine: list[Run] = []
            while len(mine) < args.attempts and (not mine or mine[-1].disturbance > 1):
                mine.append(machine.run(workload, len(mine)))
            runs.append(min(mine, key=attrgetter("disturbance")))
            r = runs[-1].measured
            print(
                f"{workload.name}: {r.throughput:.0f} tok/s; {len(mine)} runs, {runs[-1].disturbance:.2f}", flush=True
            )
        core.stop(30)
    if not runs:
        sys.exit("cut off before the first workload was through")
    profile = calibration.profile(config)
    rows = [row(run, profile, config) for run in runs]
    show(rows)
    settings = {
        "model": args.model if args.model in RANDOM else Path(args.model).name,
        "hardware": dict(profile.hardware),
        "seconds": args.seconds,
        "capacity": capacity,
        "only": args.only,
        "part": args.part,
        "microbatch": args.microbatch,
        "profile_errors": dict(profile.errors),
        **summary(rows),
    }
    if args.keep is not None:
        keep(args.keep, runs, profile, calibration, settings | {"rows": rows})
    finish("twin_accuracy", settings, rows, save=args.save)


def summary(rows: list[dict[str, Any]]) -> dict[str, Any]:
    predicted, actual = ("".join(r[key] for r in rows) for key in ("twin_starvation", "starvation"))
    return {
        "workloads": len(rows),
        "starvation_macro_f1": round(macro_f1([c == "1" for c in predicted], [c == "1" for c in actual]), 4),
        "starved_share": round(actual.count("1") / len(actual), 4),
        "worst": {m: max(abs(r[f"{m}_error"]) for r in rows) for m in GOALS},
        "mean": {m: statistics.mean(abs(r[f"{m}_error"]) for r in rows) for m in GOALS},
        "mean_as_calibrated": {m: statistics.mean(abs(r[f"{m}_error_as_calibrated"]) for r in rows) for m in GOALS},
        "mean_halved_smape": {m: statistics.mean(r[f"{m}_smape"] for r in rows) for m in GOALS},
        "goals": GOALS,
    }


def row(run: Run, profile: Profile, config: EngineConfig) -> dict[str, Any]:
    slowness = Slowness.seen(run.around, profile.steps)
    now = replace(profile, steps=slowness.of(profile.steps))
    twin, as_calibrated = (report(simulate(run.workload, p, deployment(p, config))) for p in (now, profile))
    measured = run.measured
    found: dict[str, Any] = {"workload": measured.workload, "requests": measured.requests}
    found |= {"slowness_decodes": slowness.decodes, "slowness_prompts": slowness.prompts}
    for d in compare(twin, measured):
        found |= {d.metric: d.measured, f"{d.metric}_error": d.relative, f"{d.metric}_smape": d.smape}
    found |= {f"{d.metric}_error_as_calibrated": d.relative for d in compare(as_calibrated, measured)}
    served = [step for step in run.steps if not step[0].train_layers]
    model_error = 1 / against(served, now.steps) - 1 if served else None
    assert measured.resources is not None and twin.resources is not None
    found |= {"loads": measured.resources.loads, "twin_loads": twin.resources.loads, "step_time_error": model_error}
    found |= {"starved": measured.starved_adapters, "twin_starved": twin.starved_adapters}
    found |= {"starvation": _flags(measured), "twin_starvation": _flags(twin)}
    found |= {"trained": measured.train_throughput, "twin_trained": twin.train_throughput}
    found |= {"run": run.number, "disturbance": run.disturbance}
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
