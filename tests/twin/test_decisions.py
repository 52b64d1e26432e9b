"""One trace through the real engine and, with the step times it took, through the twin: the same decisions, all of
them, in the same order. Tokens, KV, adapters and gradients are real on the one side and absent on the other.
"""

from __future__ import annotations

import os
import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import pytest

from multigraft.calibration.drive import Drive, sized
from multigraft.core.batch import Batch
from multigraft.core.config import TrainingConfig
from multigraft.core.region import Scope
from multigraft.core.request import AdapterRef, Request
from multigraft.engine import parts
from multigraft.engine.core import EngineCore
from multigraft.engine.offline import make_config
from multigraft.scheduling.steptime import FEATURES, StepShape, StepTimeModel
from multigraft.twin.profile import Deployment, LoadTimes, Memory, Profile
from multigraft.twin.simulate import simulate
from multigraft.twin.workload import Adapter, Arrival, TrainingJob, Workload, by_time
from tests.engine.peft_cases import Case, write_adapter
from tests.tiny import build_checkpoint

TICK = 2.0**-20
"""Times are multiples of it, so that their sums are exact."""
RANKS = (4, 8, 16, 4, 8, 16, 4, 8)
NAMES = tuple(f"a{i}" for i in range(len(RANKS)))


def decisions(batch: Batch) -> tuple[object, ...]:
    """Requests go by their number, which ends their id."""
    spans = [(_number(s.request), s.start, s.length, s.phase.name, s.slot) for s in batch.spans]
    loads = [(m.ref.name, m.slot, m.empties) for m in batch.loads]
    return spans, loads, [_number(r) for r in batch.preempted], batch.train


def decided(batch: Batch) -> bool:
    return bool(batch or batch.loads or batch.preempted or batch.train)


def _number(request: Request) -> int:
    return int(request.id.rpartition("-")[2])


Turn = tuple[float, list[tuple[StepShape, float]]]
"""Its seconds, and the steps that the training share was told of in it, with theirs."""


@dataclass
class Recorder:
    """Notes each turn of the engine until the last request has ended: what was decided, how long it took, what was
    heard of before it.

    The clock goes from schedule() to schedule(). What the engine hears of bears the time of the schedule() that
    follows.
    """

    core: EngineCore
    num_requests: int
    clock: float = 0.0
    decisions: list[tuple[object, ...]] = field(default_factory=list)
    turns: list[Turn] = field(default_factory=list)
    """Those that had something to do."""
    arrivals: dict[int, float] = field(default_factory=dict)
    starts: dict[str, float] = field(default_factory=dict)
    """Of jobs."""
    loads: list[tuple[str, float]] = field(default_factory=list)
    """Name and seconds, in the order in which they began."""

    def __post_init__(self) -> None:
        self._heard: list[tuple[str, object]] = []
        self._told: list[tuple[StepShape, float]] = []
        self._began: dict[str, tuple[int, float]] = {}
        self._busy, self._over, self._last = False, False, time.monotonic()
        core = self.core
        self._listen(core.scheduler, "add", lambda request: self._heard.append(("add", _number(request))))
        self._listen(core.scheduler, "adapter_loaded", lambda uid: self._heard.append(("loaded", uid)))
        self._listen(core.trainer, "start", lambda job, *_: self._heard.append(("start", job.id)))
        self._listen(core._clock, "observe", lambda shape, seconds: self._told.append((shape, seconds)))

    def _listen(self, owner: object, name: str, note: Callable[..., None]) -> None:
        method = getattr(owner, name)

        def listening(*args: object) -> None:
            note(*args)
            method(*args)

        setattr(owner, name, listening)

    def scheduled(self, batch: Batch) -> None:
        now = time.monotonic()
        ticks = round((now - self._last) / TICK) * TICK
        if self._over:
            return
        self.clock += ticks
        if self._busy:
            self.turns.append((ticks, self._told))
        in_flight, s = self.core._in_flight is not None, self.core.scheduler
        self._busy, self._told, self._last = bool(batch or batch.train or in_flight), [], now
        for what, which in self._heard:
            if what == "add":
                self.arrivals[which] = self.clock
            elif what == "start":
                self.starts[which] = self.clock
            else:
                index, start = self._began.pop(which)
                self.loads[index] = (self.loads[index][0], self.clock - start)
        self._heard.clear()
        self._over = len(self.arrivals) == self.num_requests and not (s.num_running or s.num_waiting or in_flight)
        for move in batch.loads:
            self._began[move.ref.uid] = (len(self.loads), self.clock)
            self.loads.append((move.ref.name, -1.0))
        if decided(batch) and not self._over:
            self.decisions.append(decisions(batch))


class Recorded:
    """The twin's timing from a recording."""

    def __init__(self, recorder: Recorder):
        self.turns, self.loads = iter(recorder.turns), iter(recorder.loads)

    def turn(self, batch: Batch) -> Turn:
        seconds, told = next(self.turns, (0.0, []))  # the engine may stop before it schedules again
        for shape, _ in told:  # on the CPU each step is told of in its own turn
            assert shape == StepShape.of(batch)
        return seconds, told

    def load(self, ref: AdapterRef) -> float:
        name, seconds = next(self.loads)
        assert name == ref.name and seconds >= 0
        return seconds


def a_workload(num: int, seed: int, gap: float, longest: int, names: Sequence[str] = NAMES) -> Workload:
    """Bursts and lulls, skewed adapters, both scopes, some prompts with a prefix in common."""
    rng = random.Random(seed)
    adapters = [
        Adapter(name=name, rank=RANKS[i], scope=Scope.PREFILL if i % 3 == 2 else Scope.ALL)
        for i, name in enumerate(names)
    ]
    requests, now = [], 0.0
    for _ in range(num):
        now += rng.choice([0.0, 0.0, rng.expovariate(1 / gap), 4 * gap])
        most = 1 + min(rng.randrange(len(names)), rng.randrange(len(names)))
        adapter = rng.choice([None, *names[:most]])
        prefix = (rng.randrange(2),) if rng.random() < 0.1 else ()
        prompt = rng.randrange(1, longest) + 512 * len(prefix)
        requests.append(Arrival(now, adapter, prompt, rng.randrange(1, 100), prefix))
    return Workload(name="decisions", adapters=tuple(adapters), requests=by_time(requests))


def run_both(
    model: Path,
    adapters: Path,
    workload: Workload,
    *,
    overlap: bool = False,
    training: TrainingConfig | None = None,
    **settings: object,
) -> tuple[Recorder, list[object], int]:
    """The engine's recording, the twin's decisions, and how often requests were preempted.

    overlap: the CPU engine keeps a step in flight, as on CUDA.
    """
    config = make_config(str(model), device="cpu", lora_dir=adapters, enable_prefix_caching=True, **settings)
    config = replace(config, training=training or config.training)
    engine = EngineCore(parts.build(config))
    if overlap:
        engine._may_lag = lambda step: True  # type: ignore[method-assign]
    drive = Drive(engine, sized(workload, engine))
    recorder = Recorder(engine, len(workload.requests))
    drive.scheduled = recorder.scheduled  # type: ignore[method-assign]
    engine.start()
    try:
        drive.run(timeout=200)
    finally:
        engine.stop(10)
        engine.parts.store.close()
    assert engine.error is None and all(s.complete for s in drive.record.served)
    seen = [r._replace(time=recorder.arrivals[i]) for i, r in enumerate(workload.requests)]
    jobs = [replace(job, start=recorder.starts[job.name]) for job in workload.jobs]
    pages, bank = engine.scheduler.pages, engine.parts.bank
    deployment = Deployment(
        scheduler=config.scheduler,
        max_loras=config.adapters.max_loras,
        adapter_bytes=bank.capacity_bytes,
        kv_pages=pages.num_pages,
        page_size=pages.page_size,
        max_model_len=engine.parts.max_model_len,
        training=config.training,
    )
    profile = Profile(
        model="tiny",
        hardware={},
        versions={},
        steps=StepTimeModel((0.0,) * len(FEATURES)),
        loads=LoadTimes(),
        memory=Memory(total=0),
        max_model_len=engine.parts.max_model_len,
        overlap=overlap,
        num_layers=engine.parts.loaded.model.config.num_hidden_layers,
        train_rows=engine.trainer.memory.max_rows,
    )
    turns: list[object] = []

    def on_batch(batch: Batch) -> None:
        if decided(batch):
            turns.append(decisions(batch))

    replayed = replace(sized(workload, engine), requests=tuple(seen), jobs=tuple(jobs))
    record = simulate(replayed, profile, deployment, timing=Recorded(recorder), on_batch=on_batch)
    assert record.preemptions == drive.record.preemptions
    return recorder, turns, record.preemptions or 0


def compare(recorder: Recorder, turns: list[object]) -> None:
    for i, (real, simulated) in enumerate(zip(recorder.decisions, turns, strict=False)):
        assert simulated == real, f"turn {i} of {len(recorder.decisions)}"
    assert len(turns) == len(recorder.decisions)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("decisions")
    model = build_checkpoint(root / "model", "llama", max_position_embeddings=1024)
    for i, (name, rank) in enumerate(zip(NAMES, RANKS, strict=True)):
        config = {"r": rank, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj", "down_proj"]}
        write_adapter(model, root / "adapters" / name, Case(name, config), seed=i)
    return root


@pytest.mark.parametrize(("fairness", "overlap"), [(True, False), (False, False), (True, True)])
def test_engine_and_twin_decide_alike(folder: Path, fairness: bool, overlap: bool) -> None:
    recorder, turns, preemptions = run_both(
        folder / "model",
        folder / "adapters",
        a_workload(110, seed=int(fairness), gap=0.004, longest=90),
        overlap=overlap,
        kv_cache_gib=0.00055,
        max_num_seqs=12,
        max_num_batched_tokens=96,
        max_loras=2,
        max_cpu_loras=3,
        fairness=fairness,
    )
    compare(recorder, turns)
    assert preemptions > 0 and len(recorder.loads) > len(RANKS), "the trace is too easy to show anything"


@pytest.mark.parametrize("overlap", [False, True])
def test_with_fine_tuning_they_decide_alike(folder: Path, overlap: bool) -> None:
    """The parts granted follow from all step times before: the share learns from them and makes up for them."""
    jobs = (
        TrainingJob(name="long", tokens=96 * 10**4, microbatch=96, start=0.02),
        TrainingJob(name="short", tokens=20 * 64, microbatch=64, start=0.3),
    )
    recorder, turns, _ = run_both(
        folder / "model",
        folder / "adapters",
        replace(a_workload(40, seed=7, gap=0.01, longest=90), jobs=jobs),
        overlap=overlap,
        training=TrainingConfig(ttft_slo_ms=200.0, tpot_slo_ms=30.0),
        kv_cache_gib=0.01,
        max_num_seqs=12,
        max_num_batched_tokens=96,
        max_loras=2,
        max_cpu_loras=3,
    )
    compare(recorder, turns)
    parts = {train for *_, train in recorder.decisions}
    assert len(parts) > 4 and {part.rows for part in parts if part} == {96, 160}, "both jobs, in parts of several sizes"


def test_a_different_decision_is_noticed(folder: Path) -> None:
    """The comparison can fail: a twin with one sequence slot less decides otherwise."""
    workload = a_workload(40, seed=3, gap=0.001, longest=60)
    settings = {"kv_cache_gib": 0.01, "max_num_seqs": 8, "max_num_batched_tokens": 64, "max_loras": 4}
    recorder, turns, _ = run_both(folder / "model", folder / "adapters", workload, **settings)
    compare(recorder, turns)
    with pytest.raises(AssertionError, match="turn"):
        compare(recorder, turns[1:])


@pytest.mark.skipif("SLOW" not in os.environ, reason="takes a minute; set SLOW to run it")
def test_smollm2_and_twin_decide_alike(smol_path: Path) -> None:
    folder = Path("examples/adapters")
    names = sorted(p.parent.name for p in folder.glob("*/adapter_config.json"))
    recorder, turns, preemptions = run_both(
        smol_path,
        folder,
        a_workload(80, seed=5, gap=0.2, longest=120, names=names),
        kv_cache_gib=0.018,
        max_num_seqs=12,
        max_num_batched_tokens=128,
        max_loras=2,
        max_cpu_loras=3,
    )
    compare(recorder, turns)
    assert preemptions > 0 and len(recorder.loads) > len(names)
