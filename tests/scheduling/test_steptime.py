"""The step-time model: features counted by hand, the fit against scipy, predictions on steps it has not seen."""

from __future__ import annotations

import json
import random
import statistics

import numpy as np
import pytest
from scipy.optimize import nnls

from multigraft.core.batch import LOW_RANK, Batch, Phase, Span, TrainPart
from multigraft.core.errors import InvalidRequest
from multigraft.core.request import AdapterRef, Request, SamplingParams, Scope
from multigraft.scheduling import steptime
from multigraft.scheduling.steptime import FEATURES, HOST, StepShape, StepTimeModel, nonnegative_least_squares
from tests.scheduling.made_gpu import MadeGpu, served, training_point


def span(phase: Phase, start: int, length: int, tokens: int, ref: AdapterRef | None = None) -> Span:
    request = Request("r", range(tokens), SamplingParams(), max_len=tokens + 100, adapter=ref)
    return Span(request, start, length, phase, ref.uid if ref else None)


def test_shape_of_a_batch_counted_by_hand() -> None:
    small, big = AdapterRef("small", 1, 100, rank=8), AdapterRef("big", 2, 1000, rank=LOW_RANK + 1)
    prefill_only = AdapterRef("scoped", 3, 10, Scope.PREFILL)
    spans = [
        span(Phase.PREFILL, 0, 4, 4, small),
        span(Phase.PREFILL, 8, 2, 20, prefill_only),
        span(Phase.PREFILL, 0, 3, 3),
        span(Phase.DECODE, 9, 1, 10, small),
        span(Phase.DECODE, 19, 1, 20, small),
        span(Phase.DECODE, 4, 1, 5, big),
        span(Phase.DECODE, 6, 1, 7),
    ]
    shape = StepShape.of(Batch(spans=spans, train=TrainPart(rows=50, forward=3, backward=2, head=40)))
    assert shape == StepShape(
        prefill_spans=3,
        prefill_rows=9,
        prefill_attention=(1 + 2 + 3 + 4) + (9 + 10) + (1 + 2 + 3),
        prefill_context=8,
        prefill_adapted=6,
        prefill_adapters=2,
        prefill_adapter_bytes=110,
        prefill_adapter_work=4 * 100 + 2 * 10,
        decode_rows=4,
        decode_context=10 + 20 + 5 + 7,
        decode_adapted=3,
        decode_adapters=2,
        decode_adapter_bytes=1100,
        decode_adapter_work=2 * 100 + 1000,
        max_rank=LOW_RANK + 1,
        samples=2 + 4,
        train_rows=50,
        train_forward=150,
        train_backward=100,
        train_layers=5,
        train_head=40,
    )
    features = dict(zip(FEATURES, shape.features(), strict=True))
    assert features["rows_from_0"] == 13 and features["rows_from_16"] == 0
    assert (features["wide_adapted"], features["wide_adapters"]) == (9, 4)
    low = StepShape.of(Batch(spans=[s for s in spans if s.request.adapter is not big]))
    features = dict(zip(FEATURES, low.features(), strict=True))
    assert low.max_rank == 8 and (features["wide_adapted"], features["wide_adapters"]) == (0, 0)


def test_an_adapter_in_both_phases_counts_in_both() -> None:
    ref = AdapterRef("a", 1, 100)
    shape = StepShape.of(Batch(spans=[span(Phase.PREFILL, 0, 2, 9, ref), span(Phase.DECODE, 4, 1, 5, ref)]))
    assert (shape.prefill_adapters, shape.decode_adapters) == (1, 1)


@pytest.mark.parametrize("seed", range(20))
def test_fit_equals_scipys(seed: int) -> None:
    rng = np.random.default_rng(seed)
    a = rng.normal(size=(30, 8)) + 0.5
    b = a @ rng.normal(size=8) + rng.normal(size=30)
    want, _ = nnls(a, b)
    assert np.allclose(nonnegative_least_squares(a, b), want, atol=1e-8)
    for near in (want, rng.random(8), np.zeros(8), np.ones(8)):
        assert np.allclose(nonnegative_least_squares(a, b, near=near), want, atol=1e-8)


def random_shape(rng: random.Random) -> StepShape:
    prefill, decode = rng.choice([0, rng.randrange(1, 2000)]), rng.randrange(1, 256)
    adapters = rng.randrange(0, decode + 1)
    return StepShape(
        prefill_spans=bool(prefill),
        prefill_rows=prefill,
        prefill_attention=prefill * prefill // 2,
        decode_rows=decode,
        decode_context=decode * rng.randrange(1, 500),
        decode_adapted=adapters,
        decode_adapters=adapters,
        decode_adapter_bytes=adapters * 1000,
        samples=decode + bool(prefill),
    )


def worst_error(model: StepTimeModel, shapes: list[StepShape], seconds: list[float]) -> float:
    return max(abs(model.predict(s) / t - 1) for s, t in zip(shapes, seconds, strict=True))


def test_fit_recovers_times_of_unseen_steps_and_survives_json() -> None:
    rng = random.Random(0)
    true = StepTimeModel(tuple(rng.random() * 1e-6 if rng.random() < 0.6 else 0.0 for _ in FEATURES))
    shapes = [random_shape(rng) for _ in range(300)]
    seconds = [true.predict(s) * rng.uniform(0.99, 1.01) + 1e-9 for s in shapes]
    model = StepTimeModel.fit(shapes[:200], seconds[:200])
    assert min(model.weights) >= 0
    assert worst_error(model, shapes[200:], seconds[200:]) < 0.03
    again = StepTimeModel.from_json(json.loads(json.dumps(model.to_json())))
    assert again == model


def test_slow_spells_do_not_count(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = random.Random(1)
    true = StepTimeModel(tuple(rng.random() * 1e-6 for _ in FEATURES))
    shapes = [random_shape(rng) for _ in range(400)]
    seconds = [true.predict(s) * (1.5 if i % 4 == 0 else 1.0) for i, s in enumerate(shapes)]
    clean = [true.predict(s) for s in shapes]

    assert worst_error(StepTimeModel.fit(shapes, seconds), shapes, clean) < 0.05
    monkeypatch.setattr(steptime, "ROUNDS", 1)
    assert worst_error(StepTimeModel.fit(shapes, seconds), shapes, clean) > 0.05, "least squares"


SIZES = (512, 1024, 2048, 4096, 8192)


def made_points(seed: int, serving: int, rounds: int) -> dict[int, list[list[tuple[StepShape, float]]]]:
    """Of the made GPU, by rows of a pass; 0: without training."""
    rng = random.Random(seed)
    points = {rows: [list(training_point(rng, rows, passes=3)) for _ in range(rounds)] for rows in SIZES}
    for _ in range(serving):
        gpu, shape = MadeGpu(rng), served(rng)
        gpu.run(shape)
        points.setdefault(0, []).append([(shape, gpu.run(shape)) for _ in range(6)])
    return points


def point_errors(model: StepTimeModel, points: dict[int, list[list[tuple[StepShape, float]]]]) -> dict[int, float]:
    """Mean relative error of the points' whole times."""
    return {
        rows: statistics.mean(abs(sum(model.predict(s) for s, _ in p) / sum(t for _, t in p) - 1) for p in of_size)
        for rows, of_size in points.items()
    }


@pytest.mark.parametrize("seed", range(4))
def test_training_that_waits_for_its_launches_is_told_from_training_that_computes(
    seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A calibration's worth of points of a GPU, two of each size of passes, predicts others; one sum does not."""
    points, others = made_points(seed, serving=100, rounds=2), made_points(seed + 100, serving=40, rounds=8)
    steps = list(zip(*(step for of_size in points.values() for point in of_size for step in point), strict=True))
    found = point_errors(StepTimeModel.fit(*steps), others)
    monkeypatch.setattr(steptime, "TURNS", 0)
    sum_only = point_errors(StepTimeModel.fit(*steps), others)
    assert max(found.values()) < 0.08
    assert max(sum_only.values()) > 2 * max(found.values())


def test_where_work_adds_up_nothing_waits_for_launches() -> None:
    """A CPU: a layer costs a little by itself and much by its rows."""
    rng = random.Random(0)
    weights = {"step": 0.02, "rows_from_0": 1e-3, "decode_context": 1e-6, "train_layers": 2e-3}
    weights |= {"train_forward": 2e-5, "train_backward": 5e-5}
    true = StepTimeModel(tuple(weights.get(name, 0.0) for name in FEATURES))
    shapes = [served(rng) for _ in range(200)]
    for rows in 4 * (64, 128, 256, 512, 1024):
        shapes += [shape for shape, _ in training_point(rng, rows, passes=2)]
    model = StepTimeModel.fit(shapes, [true.predict(s) * rng.lognormvariate(0, 0.1) for s in shapes])
    assert not any(model.weights[HOST:])
    assert statistics.mean(abs(model.predict(s) / true.predict(s) - 1) for s in shapes) < 0.03


def test_refine_follows_a_slower_machine_but_not_one_outlier() -> None:
    model = StepTimeModel((1.0,) * len(FEATURES))
    shape = StepShape(decode_rows=1, samples=1)
    was = model.predict(shape)
    model.refine(was, was * 1000)
    assert was < model.predict(shape) < was * 1.02
    for _ in range(500):
        model.refine(model.predict(shape), was * 1.3)
    assert model.predict(shape) == pytest.approx(was * 1.3, rel=0.01)


@pytest.mark.parametrize(
    ("data", "says"),
    [
        ([], "needs an object 'weights'"),
        ({"weights": {"step": -1.0}}, "step in the step-time model is -1.0"),
        ({"weights": {"step": float("nan")}}, "must be a number"),
        ({"weights": {"warp": 1.0}}, "unknown terms ['warp']"),
        ({"weights": {}, "correction": "x"}, "correction"),
    ],
)
def test_bad_json_is_refused(data: object, says: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        StepTimeModel.from_json(data)
    assert says in str(caught.value)
