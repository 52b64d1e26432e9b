"""One trace through the real engine and, with the step times it took, through the twin: the same decisions, all of
them, in the same order. Tokens, KV and adapters are real on the one side and absent on the other.
"""

from __future__ import annotations

import os
import random
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import pytest

from multigraft.calibration.drive import Drive, sized
from multigraft.core.batch import Batch
from multigraft.core.region import Scope
from multigraft.core.request import AdapterRef, Request
from multigraft.engine import parts
from multigraft.engine.core import EngineCore
from multigraft.engine.offline import make_config
from multigraft.scheduling.steptime import FEATURES, StepTimeModel
from multigraft.twin.profile import Deployment, LoadTimes, Memory, Profile
from multigraft.twin.simulate import simulate
from multigraft.twin.workload import Adapter, Arrival, Workload, by_time
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
    return spans, loads, [_number(r) for r in batch.preempted]


def _number(request: Request) -> int:
    return int(request.id.rpartition("-")[2])


@dataclass
class Recorder:
    """Notes each turn of the engine: what was decided, how long it took, what the scheduler heard of before it.

    The clock advances by the seconds that the engine reports for each step, and by the time that passed where there
    was no step. What the scheduler hears of bears the time of the schedule() that follows.
    """

    core: EngineCore
    clock: float = 0.0
    turns: list[tuple[object, ...]] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    launches: list[float] = field(default_factory=list)
    """Turns with a batch that took no step's results in."""
    arrivals: dict[int, float] = field(default_factory=dict)
    loads: list[tuple[str, float]] = field(default_factory=list)
    """Name and seconds, in the order in which they began."""

    def __post_init__(self) -> None:
        self._heard: list[tuple[str, object]] = []
        self._began: dict[str, tuple[int, float]] = {}
        self._stepped, self._launched, self._last = False, False, time.monotonic()
        scheduler = self.core.scheduler
        add, loaded = scheduler.add, scheduler.adapter_loaded

        def hear_add(request: Request) -> None:
            self._heard.append(("add", _number(request)))
            add(request)

        def hear_loaded(uid: int) -> None:
            self._heard.append(("loaded", uid))
            loaded(uid)

        scheduler.add, scheduler.adapter_loaded = hear_add, hear_loaded  # type: ignore[method-assign]

    def ran(self, batch: Batch, seconds: float) -> None:
        self._stepped = True
        ticks = round(seconds / TICK) * TICK
        self.clock += ticks
        self.seconds.append(ticks)

    def scheduled(self, batch: Batch) -> None:
        now = time.monotonic()
        if not self._stepped:
            ticks = round((now - self._last) / TICK) * TICK
            self.clock += ticks
            if self._launched:
                self.launches.append(ticks)
        self._stepped, self._launched, self._last = False, bool(batch), now
        for what, which in self._heard:
            if what == "add":
                self.arrivals[which] = self.clock
            else:
                index, start = self._began.pop(which)
                self.loads[index] = (self.loads[index][0], self.clock - start)
        self._heard.clear()
        for move in batch.loads:
            self._began[move.ref.uid] = (len(self.loads), self.clock)
            self.loads.append((move.ref.name, -1.0))
        if batch or batch.loads or batch.preempted:
            self.turns.append(decisions(batch))


class Recorded:
    """The twin's timing from a recording."""

    def __init__(self, recorder: Recorder):
        self.seconds, self.loads, self.launches = map(iter, (recorder.seconds, recorder.loads, recorder.launches))

    def step(self, batch: Batch) -> float:
        return next(self.seconds, 0.0)  # the engine has stopped before it tells of its last step

    def launch(self) -> float:
        return next(self.launches)

    def load(self, ref: AdapterRef) -> float:
        name, seconds = next(self.loads)
        assert name == ref.name and seconds >= 0
        return seconds


def a_workload(num: int, seed: int, gap: float, longest: int, names: Sequence[str] = NAMES) -> Workload:
    """Bursts and lulls, skewed adapters, both scopes, some prompts with a prefix in common."""
    rng = random.Random(seed)
    adapters = [Adapter(name=name, scope=Scope.PREFILL if i % 3 == 2 else Scope.ALL) for i, name in enumerate(names)]
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
    model: Path, adapters: Path, workload: Workload, *, overlap: bool = False, **settings: object
) -> tuple[Recorder, list[object], int]:
    """The engine's recording, the twin's decisions, and how often requests were preempted.

    overlap: the CPU engine keeps a step in flight, as on CUDA.
    """
    config = make_config(str(model), device="cpu", lora_dir=adapters, enable_prefix_caching=True, **settings)
    engine = EngineCore(parts.build(config))
    if overlap:
        engine._may_lag = lambda step: True  # type: ignore[method-assign]
    drive = Drive(engine, sized(workload, engine))
    recorder = Recorder(engine)
    drive.scheduled, drive.ran = recorder.scheduled, recorder.ran  # type: ignore[method-assign]
    engine.start()
    try:
        drive.run(timeout=200)
    finally:
        engine.stop(10)
        engine.parts.store.close()
    assert engine.error is None and all(s.complete for s in drive.record.served)
    seen = [r._replace(time=recorder.arrivals[i]) for i, r in enumerate(workload.requests)]
    pages, bank = engine.scheduler.pages, engine.parts.bank
    deployment = Deployment(
        scheduler=config.scheduler,
        max_loras=config.adapters.max_loras,
        adapter_bytes=bank.capacity_bytes,
        kv_pages=pages.num_pages,
        page_size=pages.page_size,
        max_model_len=engine.parts.max_model_len,
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
    )
    turns: list[object] = []

    def on_batch(batch: Batch) -> None:
        if batch or batch.loads or batch.preempted:
            turns.append(decisions(batch))

    replayed = replace(sized(workload, engine), requests=tuple(seen))
    record = simulate(replayed, profile, deployment, timing=Recorded(recorder), on_batch=on_batch)
    assert record.preemptions == drive.record.preemptions
    return recorder, turns, record.preemptions or 0


def compare(recorder: Recorder, turns: list[object]) -> None:
    for i, (real, simulated) in enumerate(zip(recorder.turns, turns, strict=False)):
        assert simulated == real, f"turn {i} of {len(recorder.turns)}"
    assert len(turns) == len(recorder.turns)


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
