"""How much training a step is granted: up to the latency targets, never beyond, and all of the time when idle."""

from __future__ import annotations

import random
import statistics
from dataclasses import dataclass

import pytest

from multigraft.core.batch import Batch, Phase, Span
from multigraft.core.config import TrainingConfig
from multigraft.core.request import Request, SamplingParams
from multigraft.scheduling.steptime import StepShape
from multigraft.scheduling.training import FIRST_FIT, HEADROOM, PROMPT_SHARE, TrainingShare, TrainWork
from tests.scheduling.made_gpu import MadeGpu, MadePass

WORK = TrainWork(rows=100, forward=30, backward=31)


@dataclass
class Model:
    """1 ms a decode row, 0.1 ms a prompt row, 4 ms a layer of training."""

    def predict(self, shape: StepShape) -> float:
        return 1e-3 * shape.decode_rows + 1e-4 * shape.prefill_rows + 4e-3 * shape.train_layers

    def refine(self, shape: StepShape, seconds: float) -> None: ...


def batch(decodes: int = 0, prompt: int = 0) -> Batch:
    def request(n: int) -> Request:
        return Request("r", [1] * n, SamplingParams(), max_len=n + 9)

    spans = [Span(request(prompt), 0, prompt, Phase.PREFILL)] if prompt else []
    return Batch(spans=spans + [Span(request(5), 4, 1, Phase.DECODE) for _ in range(decodes)])


def share(**config: float) -> TrainingShare:
    return TrainingShare(TrainingConfig(**config), Model())  # type: ignore[arg-type]


def layers(part) -> int:
    return 0 if part is None else part.forward + part.backward


@pytest.mark.parametrize(("decodes", "want"), [(0, 25), (1, 19), (40, 10), (77, 0), (200, 0)])
def test_parts_fill_the_time_that_the_targets_leave(decodes: int, want: int) -> None:
    """40 decodes take 40 of 80 ms: ten layers of 4 ms remain. An idle part lasts 100 ms."""
    s = share()
    part = s.grant(batch(decodes), WORK, 0)
    assert layers(part) == want
    assert s.granted_seconds == pytest.approx(4e-3 * want)
    if part is not None:
        total = Model().predict(StepShape(decode_rows=decodes, train_layers=want))
        assert total <= (HEADROOM * 0.1 if decodes else PROMPT_SHARE * 1.0) + 1e-9


def test_forward_layers_come_first() -> None:
    part = share(ttft_slo_ms=2000.0).grant(batch(), WORK, 0)
    assert (part.rows, part.forward, part.backward) == (100, 30, 20)


def test_prompts_and_waiting_requests_bound_it_by_the_first_target() -> None:
    assert layers(share().grant(batch(prompt=500), WORK, 0)) == 25
    assert layers(share(tpot_slo_ms=1e6).grant(batch(decodes=10), WORK, 1)) == 25
    assert layers(share(tpot_slo_ms=1e6).grant(batch(decodes=10), WORK, 0)) == 61
    assert share(ttft_slo_ms=1.0).grant(batch(prompt=500), WORK, 0) is None


def test_priority_scales_what_is_left_and_nothing_when_idle() -> None:
    assert layers(share(train_priority=0.5).grant(batch(decodes=40), WORK, 0)) == 5
    assert share(train_priority=0.0).grant(batch(decodes=1), WORK, 0) is None
    assert layers(share(train_priority=0.0).grant(batch(), WORK, 0)) == 25


def test_an_idle_step_is_granted_a_layer_however_slow() -> None:
    assert layers(share(ttft_slo_ms=1.0).grant(batch(), WORK, 0)) == 1


def test_steps_without_training_do_not_make_it_look_free() -> None:
    """A decode step of 3 rows takes 30 ms, a layer forward 10 and backward 20: as many as fit into 80 ms."""
    s = TrainingShare(TrainingConfig())

    def serve(steps: int) -> None:
        for i in range(steps):
            s.observe(StepShape(decode_rows=1 + i % 5, samples=1 + i % 5), 0.027 + 0.001 * (1 + i % 5))

    serve(1000)
    for direction, steps in (("train_forward", 2 * FIRST_FIT), ("train_backward", FIRST_FIT)):
        for _ in range(steps):
            assert s.model is not None and layers(s.grant(batch(decodes=3), WORK, 0)) == 1
            shape = StepShape(decode_rows=3, samples=3, train_rows=100, train_layers=1, **{direction: 100})
            s.observe(shape, 0.04 if direction == "train_forward" else 0.05)
    for idle in (0, 1000):
        serve(idle)
        assert layers(s.grant(batch(decodes=3), WORK, 0)) in (4, 5)
        assert layers(s.grant(batch(decodes=3), TrainWork(rows=100, forward=0, backward=31), 0)) in (2, 3)


def test_passes_that_wait_for_their_launches_and_others_fill_the_same_time() -> None:
    """Passes of 512 to 8,192 rows by turns on a GPU: parts take 80 ms with all, once all were seen."""
    rng = random.Random(0)
    s, gpu, decodes = TrainingShare(TrainingConfig()), MadeGpu(rng), batch(20)
    passes = [MadePass(rows) for rows in (512, 3072, 8192)]
    took: dict[int, list[float]] = {train.rows: [] for train in passes}
    for i in range(800):
        train = passes[i // 20 % 3]
        work = train.work
        part = s.grant(decodes, work, 0)
        assert part is not None
        shape, seconds = train.run(gpu, StepShape.of(decodes), part)
        s.observe(shape, seconds)
        if i >= 400 and part.forward + part.backward < work.forward + work.backward:
            took[train.rows].append(seconds)
    for seconds in took.values():
        assert statistics.median(seconds) == pytest.approx(HEADROOM * 0.1, rel=0.1)


def test_single_layers_until_the_first_fit() -> None:
    s = TrainingShare(TrainingConfig())
    for i in range(FIRST_FIT):
        assert s.model is None and layers(s.grant(batch(decodes=3), WORK, 0)) == 1
        s.observe(StepShape(decode_rows=3, samples=3, train_rows=100, train_forward=100 * i, train_layers=i), 0.01)
    assert s.model is not None and s.granted_seconds == 0.0
    assert s.grant(batch(decodes=3), None, 0) is None
