"""Profile of a model on this machine: step times, load times and memory, measured on the engine itself."""

from __future__ import annotations

import gzip
import json
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from random import Random

import torch
from safetensors.torch import save_file

from multigraft.adapters.site import Site, SiteKind
from multigraft.core.config import EngineConfig
from multigraft.core.errors import CapacityExceeded
from multigraft.core.region import Scope
from multigraft.engine import parts as engine_parts
from multigraft.engine.core import EngineCore
from multigraft.engine.parts import EngineParts
from multigraft.kernels.openmp import release_pool
from multigraft.scheduling.steptime import StepShape, StepTimeModel
from multigraft.twin.profile import LoadTimes, Memory, Profile, these_versions, this_machine

from .jobs import random_job
from .load_times import measure_loads
from .points import DesignedShare, Plan, PointRunner, Timed, draw_point
from .speed import Probe, calm, probe, slower, slowness

RANKS = (8, 16, 32, 64)
SLOTS = 64
"""Adapters on the device while calibrating, unless the configuration asks for more."""
RANK_SUM = 256
"""Of the adapters of one rank: 32 of rank 8, 4 of rank 64."""
LOAD_ROUNDS, LOAD_SECONDS = 3, 30.0
"""At most so many, of which the one counts in which the machine was fastest; none begins after so long."""
TRAIN_SHARE, STEPS_SHARE = 0.25, 0.5
"""Of the measuring time that goes into steps with training, and at least into steps without."""
TRAIN_SIZES = (16, 4, 1, 8, 2)
"""A pass has the largest possible number of rows over these, in rounds of random order."""
TRAIN_ROUNDS = 3
"""At least, of which the first is not counted: it finds kernels that were never run with so many rows. With one round
counted, a size may be in no fitted point, and the terms of training take any value."""
TRAIN_PASSES = 2
"""Of a point's job, one in the first round: on a CPU a large pass takes seconds."""
FOLDS = 5
"""Each of so many parts of the points, drawn at random, tells the error of a fit to the others."""
COLD = 3
"""The first so many points are not counted."""

LATE = 0.9
"""Quantile of what points take longer than predicted that is the profile's margin."""

Predicted = tuple[StepShape, float, float]
"""A step, its seconds and those that were predicted."""
Point = tuple[Probe, list[Timed]]
"""The slower probe before and behind it (see speed), and its steps."""
Progress = Callable[[str, float], None]
"""Told what is being done, and the share that is done."""


def calibrate(
    config: EngineConfig, *, seconds: float = 200.0, seed: int = 0, progress: Progress, points_file: Path | None = None
) -> Profile:
    """Build the engine, measure for about so many seconds, and fit. Raises MultigraftError for what the user can mend.

    points_file: gets what the fit is made from, a JSON line for each group of steps.

    Start-up comes on top, and where load times and TRAIN_ROUNDS of TRAIN_SIZES leave steps that serve less than
    STEPS_SHARE of the seconds, so does the rest of that.
    """
    slots = max(SLOTS, config.adapters.max_loras)
    adapters = replace(config.adapters, max_loras=slots, max_cpu_loras=max(4 * SLOTS, config.adapters.max_cpu_loras))
    cache = replace(config.cache, enable_prefix_caching=True)  # contexts come from it
    progress("Loading the model", 0.0)
    parts = engine_parts.build(replace(config, adapters=adapters, cache=cache))
    core = EngineCore(parts)
    with tempfile.TemporaryDirectory() as folder:
        measured = Calibration(core, Path(folder), Random(seed), progress)
        release_pool()  # the engine's thread has the cores to itself
        core.start()
        try:
            measured.all(seconds)
        finally:
            core.stop(30)
            parts.store.close()
    progress("Fitting", 0.98)
    if points_file is not None:
        measured.save(points_file)
    return measured.profile(config)


class Calibration:
    """Measures a started engine. The parts may be repeated and lie between other work of the engine, as its speed may
    change with the hours."""

    def __init__(self, core: EngineCore, folder: Path, rng: Random, progress: Progress):
        """folder: gets adapters, which stay in use. core: with prefix caching, from which contexts come."""
        self.core, self.rng, self.points = core, rng, list[Point]()
        self._progress, self._folder = progress, folder
        self._runner = PointRunner(core, rng)
        self._loads: LoadTimes | None = None
        kv = core.parts.runner.attention.kv  # type: ignore[attr-defined]
        for tensor in (kv.k, kv.v):
            tensor.fill_(0.01)  # pages never written would all be one page of zeros to the operating system
        parts, self._names = core.parts, dict[int, list[str]]()
        ranks = [rank for rank in RANKS if rank <= parts.config.adapters.max_lora_rank]
        for i, rank in enumerate(ranks):
            progress(f"Writing adapters of rank {rank}", 0.02 + 0.02 * i / len(ranks))
            nbytes = write_adapter(folder / f"r{rank}", parts.sites, rank, parts.loaded.dtype)
            if count := min(RANK_SUM // rank, parts.bank.capacity_bytes // nbytes):
                self._names[rank] = [f"calibration-{rank}-{n}" for n in range(count)]
        if not self._names:
            raise CapacityExceeded(
                f"Adapters of rank {ranks[0]} do not fit the adapter memory of {parts.bank.capacity_bytes} bytes; "
                "raise --adapter-memory-gib."
            )

    def all(self, seconds: float) -> None:
        self.register()
        begun = time.monotonic()
        self.measure_loads()
        self.measure_training(seconds * TRAIN_SHARE)
        self.measure_steps(max(begun + seconds - time.monotonic(), STEPS_SHARE * seconds))

    def register(self) -> None:
        """The adapters; those of a rank share one folder, but not their place in memory."""
        for rank, names in self._names.items():
            for name in names:
                self.core.parts.store.register(name, self._folder / f"r{rank}")

    def measure_loads(self) -> None:
        self._progress("Timing adapter loads", 0.05)
        rounds, probes, begun = [], [], time.monotonic()
        while not rounds or (len(rounds) < LOAD_ROUNDS and time.monotonic() - begun < LOAD_SECONDS):
            before = probe(self._runner)
            rounds.append(measure_loads(self.core, self._runner, list(self._names.values())))
            probes.append(slower(before, probe(self._runner)))
        factors = slowness(probes)
        self._loads = rounds[factors.index(min(factors))]

    def measure_steps(self, seconds: float) -> list[Point]:
        """The points, which come to those before. The first ones find cold caches and are not counted."""
        points: list[Point] = []
        begun, before = time.monotonic(), probe(self._runner)
        while (elapsed := time.monotonic() - begun) < seconds or len(points) < COLD + 2 * FOLDS:
            self._progress(f"Timing steps: {len(points)} groups", 0.32 + 0.66 * _done(elapsed, seconds))
            plans = draw_point(self.rng, list(self._names.values()), self.core)
            self._runner.warm_up(sorted({p.adapter for p in plans if p.adapter is not None}))
            timed, after = self._runner.run(plans), probe(self._runner)
            points.append((slower(before, after), timed))
            before = after
        self.points += points[COLD:]
        return points[COLD:]

    def measure_training(self, seconds: float) -> None:
        """Steps with a part of a training pass, alone and beside requests."""
        core, trainer = self.core, self.core.parts.trainer
        if trainer.memory.max_rows < 1:
            return  # fine-tuning is turned off
        was, core.scheduler.training = core.scheduler.training, (share := DesignedShare(self.rng))
        points: list[Point] = []
        begun, before = time.monotonic(), probe(self._runner)
        sizes: list[int] = []
        while (elapsed := time.monotonic() - begun) < seconds or len(points) < TRAIN_ROUNDS * len(TRAIN_SIZES):
            self._progress(f"Timing training: {len(points)} groups", 0.12 + 0.2 * _done(elapsed, seconds))
            sizes = sizes or self.rng.sample(TRAIN_SIZES, len(TRAIN_SIZES))
            rows = max(2, trainer.memory.max_rows // sizes.pop())
            passes = TRAIN_PASSES if len(points) >= len(TRAIN_SIZES) else 1
            job = random_job(core.parts, "calibration", tokens=rows * passes, microbatch=rows, rank=16)
            left = Future[None]()
            release_pool()
            core.post(partial(trainer.start, job, 1.0, lambda event: None, left))
            plans = [
                Plan(at=2 * i, context=0, new=self.rng.choice([1, 16, 128]), output=12, adapter=None, scope=Scope.ALL)
                for i in range(self.rng.choice([1, 4, 16]))
            ]
            self._runner.run(plans)
            left.result(300)
            timed, after = share.take(), probe(self._runner)
            points.append((slower(before, after), timed))
            before = after
        core.scheduler.training = was
        self.points += points[len(TRAIN_SIZES) :]

    def save(self, path: Path) -> None:
        """The points, a JSON line for each; compressed where the path ends in .gz."""
        with gzip.open(path, "wt") if path.suffix == ".gz" else path.open("w") as file:
            for slowest, timed in self.points:
                steps = [{"seconds": t, **asdict(shape)} for shape, t in timed]
                file.write(json.dumps({"probe": slowest, "steps": steps}) + "\n")

    def profile(self, config: EngineConfig) -> Profile:
        """From what was measured until now. config: the user's."""
        assert self._loads is not None
        counted = calm([slowest for slowest, _ in self.points])
        kept = [timed for (_, timed), ok in zip(self.points, counted, strict=True) if ok and timed]
        found = held_out_errors(kept, self.rng) | {"left_out": 1 - sum(counted) / len(counted)}
        parts, launches = self.core.parts, self._runner.launches
        loaded = parts.loaded
        return Profile(
            model=loaded.name,
            hardware=this_machine(torch.cuda.get_device_name(loaded.device) if loaded.device.type == "cuda" else None),
            versions=these_versions(),
            steps=fit(kept),
            loads=self._loads,
            memory=_memory(config, parts),
            max_model_len=loaded.max_model_len,
            overlap=loaded.device.type == "cuda",
            launch=statistics.median(launches) if launches else 0.0,
            num_layers=loaded.model.config.get_text_config().num_hidden_layers,
            train_rows=parts.trainer.memory.max_rows,
            errors=found,
            margin=max(found["late_prompts"], found["late_decodes"]),
        )


def _done(elapsed: float, seconds: float) -> float:
    return elapsed / seconds if elapsed < seconds else 1.0


def fit(points: Sequence[Sequence[Timed]]) -> StepTimeModel:
    return StepTimeModel.fit(*zip(*(step for point in points for step in point), strict=True))


def held_out_errors(points: Sequence[Sequence[Timed]], rng: Random) -> dict[str, float]:
    """Relative errors on points that were not fitted: of single steps, and of the points' whole times, where noise
    cancels."""
    order = rng.sample(points, len(points))
    found: list[list[Predicted]] = []
    for i in range(FOLDS):
        model = fit([point for j, point in enumerate(order) if j % FOLDS != i])
        found += [[(shape, seconds, model.predict(shape)) for shape, seconds in point] for point in order[i::FOLDS]]
    return errors(found)


def errors(points: Sequence[Sequence[Predicted]]) -> dict[str, float]:
    steps = [abs(predicted / seconds - 1) for point in points for _, seconds, predicted in point]
    sums = [abs(1 / (1 + _late(point)) - 1) for point in points]
    prompts = [[step for step in point if step[0].prefill_rows] for point in points]
    decodes = [[step for step in point if step[0].decode_rows and not step[0].prefill_rows] for point in points]
    trained = [e for e, point in zip(sums, points, strict=True) if any(shape.train_layers for shape, _, _ in point)]
    return {
        "held_out_steps": len(steps),
        "step_mean": statistics.mean(steps),
        "step_p50": statistics.median(steps),
        "step_p95": sorted(steps)[int(0.95 * len(steps))],
        "step_worst": max(steps),
        "point_mean": statistics.mean(sums),
        "point_worst": max(sums),
        "train_point_mean": statistics.mean(trained) if trained else 0.0,
        "late_prompts": lateness(prompts),
        "late_decodes": lateness(decodes),
    }


def lateness(points: Sequence[Sequence[Predicted]]) -> float:
    """By what share of its prediction a point takes longer: the quantile LATE of all points, or 0 if that is less."""
    late = sorted(_late(point) for point in points if point)
    return max(0.0, late[int(LATE * len(late))]) if late else 0.0


def _late(point: Sequence[Predicted]) -> float:
    """Relative to its prediction, signed."""
    return sum(seconds for _, seconds, _ in point) / sum(predicted for _, _, predicted in point) - 1


# Adapters ------------------------------------------------------------------------------------------------------


def write_adapter(folder: Path, sites: Sequence[Site], rank: int, dtype: torch.dtype, seed: int = 0) -> int:
    """A PEFT folder with small random factors on every linear of the decoder's layers; returns its bytes."""
    generator = torch.Generator().manual_seed(seed)
    tensors, targets = {}, set()
    for site in sites:
        if site.kind is not SiteKind.LINEAR or ".layers." not in f".{site.members[0]}":
            continue
        for path, out in zip(site.members, site.out_features, strict=True):
            for factor, shape in (("lora_A", (rank, site.in_features)), ("lora_B", (out, rank))):
                random = torch.randn(shape, generator=generator) * 0.01
                tensors[f"base_model.model.{path}.{factor}.weight"] = random.to(dtype)
            targets.add(path.rpartition(".")[2])
    folder.mkdir(parents=True)
    save_file(tensors, folder / "adapter_model.safetensors")
    fields = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": rank, "lora_alpha": rank, "bias": "none"}
    (folder / "adapter_config.json").write_text(json.dumps(fields | {"target_modules": sorted(targets)}))
    return sum(t.nbytes for t in tensors.values())


# Memory --------------------------------------------------------------------------------------------------------


def _memory(config: EngineConfig, parts: EngineParts) -> Memory:
    """From what the engine laid out here, and the rule by which it does."""
    page_bytes = parts.runner.attention.kv.nbytes // (parts.runner.attention.kv.num_pages + 1)  # type: ignore[attr-defined]
    one = replace(config, adapters=replace(config.adapters, max_loras=1, adapter_memory_gib=None))
    rank = min(engine_parts.DEFAULT_RANK, config.adapters.max_lora_rank)
    common = {
        "kv_token": page_bytes // config.cache.page_size,
        "adapter_rank": engine_parts.adapter_bytes(one, parts.sites, parts.loaded.dtype) // rank,
    }
    kv_bytes = float(parts.scheduler.pages.num_pages * page_bytes)
    if config.cache.kv_cache_gib is not None or parts.loaded.device.type == "cpu":
        return Memory(total=kv_bytes, **common)

    def activations(tokens: int, seqs: int) -> int:
        scheduler = replace(config.scheduler, max_num_batched_tokens=tokens, max_num_seqs=seqs)
        return engine_parts.activation_bytes(replace(config, scheduler=scheduler), parts.loaded)

    s = config.scheduler
    per_token = activations(1, 0) - activations(0, 0)
    per_seq = activations(0, 1) - activations(0, 0)
    return Memory(
        total=kv_bytes + parts.bank.capacity_bytes + per_token * s.max_num_batched_tokens + per_seq * s.max_num_seqs,
        per_adapter_byte=1.0,
        per_batched_token=per_token,
        per_seq=per_seq,
        **common,
    )
