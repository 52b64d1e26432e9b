"""How long a step takes, from what is in it. Bounds training under latency targets, drives the twin and the planner.

No clock and no tensors: whoever measures gives the seconds.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from operator import mul
from typing import Any

from multigraft.core.batch import LOW_RANK, Batch, Phase
from multigraft.core.errors import InvalidRequest

REFINE_RATE = 0.02
"""Share of a step's surprise that goes into the correction: about 50 steps to follow a change."""
ROUNDS, SMALL_ERROR = 10, 0.03
"""Of a fit: how often it is weighed anew, and relative errors that count by their squares."""
TURNS, CLEARLY = 6, 0.9
"""How often a fit decides anew which steps wait for the host, and what share of the errors that must leave."""
ROW_KNOTS = (0, 16, 64, 256, 1024)
"""The cost of a row may differ between these row counts: few rows wait for weights, many for arithmetic."""


@dataclass(slots=True)
class StepShape:
    """What determines a step's duration. Sizes of adapters are in bytes, which are rank times what a rank weighs."""

    prefill_spans: int = 0
    prefill_rows: int = 0
    prefill_attention: int = 0
    """Sum over prefill spans of new positions times the context each one sees."""
    prefill_context: int = 0
    """Positions before the spans, whose KV is read."""
    prefill_adapted: int = 0
    """Rows that an adapter acts on."""
    prefill_adapters: int = 0
    prefill_adapter_bytes: int = 0
    prefill_adapter_work: int = 0
    """Sum over adapted rows of their adapter's bytes."""
    decode_rows: int = 0
    decode_context: int = 0
    """KV positions that decode rows read."""
    decode_adapted: int = 0
    decode_adapters: int = 0
    decode_adapter_bytes: int = 0
    decode_adapter_work: int = 0
    """As for prefill."""
    max_rank: int = 0
    """Of the adapters."""
    samples: int = 0
    """Rows that go through the output head."""
    train_rows: int = 0
    train_forward: int = 0
    """Train rows times layers run forward."""
    train_backward: int = 0
    train_layers: int = 0
    """Layers run with train rows, in either direction."""
    train_head: int = 0
    """Train rows that go through the output head and the loss: with a small model and many tokens to choose from, as
    much work as a third of its layers."""

    @classmethod
    def of(cls, batch: Batch) -> StepShape:
        """To be taken between schedule() and commit(), which moves what the spans refer to."""
        shape = cls()
        decode_context = decode_rows = decode_adapted = decode_work = nbytes = 0
        slot: int | None = None  # of the span before: spans lie by phase, then by slot
        in_decode = False
        for span in batch.spans:
            if span.phase is Phase.DECODE:
                if not in_decode:
                    in_decode, slot = True, None
                decode_rows += 1
                decode_context += span.start + 1
                if span.slot is not None:
                    decode_adapted += 1
                    if span.slot != slot:
                        slot = span.slot
                        assert span.request.adapter is not None
                        nbytes = span.request.adapter.nbytes
                        shape.max_rank = max(shape.max_rank, span.request.adapter.rank)
                        shape.decode_adapters += 1
                        shape.decode_adapter_bytes += nbytes
                    decode_work += nbytes
                continue
            n, start = span.length, span.start
            shape.prefill_spans += 1
            shape.prefill_rows += n
            shape.prefill_attention += n * start + n * (n + 1) // 2
            shape.prefill_context += start
            shape.samples += span.samples
            if span.slot is not None:
                assert span.request.adapter is not None
                nbytes = span.request.adapter.nbytes
                adapted = sum(hi - lo for lo, hi in span.segments())
                shape.prefill_adapted += adapted
                shape.prefill_adapter_work += nbytes * adapted
                if span.slot != slot:
                    slot = span.slot
                    shape.max_rank = max(shape.max_rank, span.request.adapter.rank)
                    shape.prefill_adapters += 1
                    shape.prefill_adapter_bytes += nbytes
        shape.decode_rows, shape.decode_context, shape.decode_adapted = decode_rows, decode_context, decode_adapted
        shape.decode_adapter_work = decode_work
        shape.samples += decode_rows
        if batch.train is not None:
            shape.train_rows = batch.train.rows
            shape.train_forward = batch.train.rows * batch.train.forward
            shape.train_backward = batch.train.rows * batch.train.backward
            shape.train_layers = batch.train.forward + batch.train.backward
            shape.train_head = batch.train.head
        return shape

    def features(self) -> tuple[float, ...]:
        """In the order of FEATURES. Linear in decode_context, which is all that changes while the same rows decode.

        Steps with prompts take other kernels on a GPU than steps that only decode, and so may cost more for all that
        they do; likewise steps in which an adapter has more than LOW_RANK ranks.
        """
        s = self
        rows = s.prefill_rows + s.decode_rows
        row_costs = _row_costs(rows)
        has_prefill = 1.0 if s.prefill_rows else 0.0
        has_adapters = 1.0 if s.decode_adapted or s.prefill_adapters else 0.0
        is_wide = 1.0 if s.max_rank > LOW_RANK else 0.0
        return (
            1.0 if rows else 0.0,
            has_prefill,
            has_prefill if s.decode_rows else 0.0,
            has_adapters,
            has_adapters * has_prefill,
            *row_costs,
            *(row_costs if s.prefill_rows else _NO_ROWS),
            s.prefill_spans,
            s.prefill_attention,
            s.prefill_context,
            s.prefill_adapted,
            s.prefill_adapters,
            s.prefill_adapter_bytes,
            s.prefill_adapter_work,
            s.decode_rows,
            s.decode_context,
            s.decode_adapted,
            s.decode_adapters,
            s.decode_adapters * has_prefill,
            s.decode_adapter_bytes,
            s.decode_adapter_work,
            is_wide * (s.prefill_adapted + s.decode_adapted),
            is_wide * (s.prefill_adapters + s.decode_adapters),
            s.samples,
            s.train_forward,
            s.train_backward,
            s.train_layers,
            s.train_head,
            1.0 if s.train_layers else 0.0,
            s.train_layers,
        )


_NO_ROWS = (0,) * len(ROW_KNOTS)


@lru_cache(2**14)  # no step has more rows than the token budget
def _row_costs(rows: int) -> tuple[int, ...]:
    """Rows between each knot and the next."""
    return tuple(max(0, min(rows, end) - start) for start, end in zip(ROW_KNOTS, (*ROW_KNOTS[1:], rows), strict=True))


FEATURES = (
    "step",
    "has_prefill",
    "has_prefill_and_decode",
    "has_adapters",
    "has_adapters_and_prefill",
    *(f"rows_from_{knot}" for knot in ROW_KNOTS),
    *(f"rows_with_prefill_from_{knot}" for knot in ROW_KNOTS),
    "prefill_spans",
    "prefill_attention",
    "prefill_context",
    "prefill_adapted",
    "prefill_adapters",
    "prefill_adapter_bytes",
    "prefill_adapter_work",
    "decode_rows",
    "decode_context",
    "decode_adapted",
    "decode_adapters",
    "decode_adapters_with_prefill",
    "decode_adapter_bytes",
    "decode_adapter_work",
    "wide_adapted",
    "wide_adapters",
    "samples",
    "train_forward",
    "train_backward",
    "train_layers",
    "train_head",
    "host_train_step",
    "host_train_layers",
)
"""Terms of the model."""
HOST = FEATURES.index("host_train_step")
"""From here on they are of the host's time, before that of the device's."""

TRAIN = FEATURES.index("train_forward")
"""From here on they are of training."""

_CONTEXT, _LAYERS = FEATURES.index("decode_context"), FEATURES.index("train_layers")


@dataclass(slots=True)
class StepTimeModel:
    """seconds = correction * max(device, host), either of them a sum of weights * features, no weight negative.

    Training's kernels are launched one by one: with few rows a GPU is done with them before the host has launched the
    next ones (3 ms a layer of Llama-8B on an H200, which computes 3,000 rows in that time), and what the step serves is
    computed meanwhile. Where the host computes, all adds up and its terms weigh nothing.
    """

    weights: tuple[float, ...]
    """Seconds for each unit, in the order of FEATURES."""
    correction: float = 1.0
    """Follows the machine as it runs; see refine."""

    def __post_init__(self) -> None:
        assert len(self.weights) == len(FEATURES) and min(self.weights) >= 0

    def predict(self, shape: StepShape, served: float | None = None) -> float:
        """Seconds of the step. served: as `served` gives it, where that is known."""
        s, served = shape, self.served(shape) if served is None else served
        return self.seconds(served, s.train_forward, s.train_backward, s.train_layers, s.train_head)

    def served(self, shape: StepShape) -> float:
        """The device's seconds for what the step serves, uncorrected: with it, `seconds` tells of any training."""
        return float(sum(map(mul, self.weights[:TRAIN], shape.features())))

    def seconds(self, served: float, forward: int = 0, backward: int = 0, layers: int = 0, head: int = 0) -> float:
        """Of a step with so much training beside, which are StepShape's train_forward and so on."""
        per_forward, per_backward, per_layer, per_head, host, host_per_layer = self.weights[TRAIN:]
        device = served + per_forward * forward + per_backward * backward + per_layer * layers + per_head * head
        return self.correction * (max(device, host + host_per_layer * layers) if layers else device)

    def growth(self, shape: StepShape) -> float:
        """Seconds by which each following step is longer while the same rows decode."""
        return self.correction * self.weights[_CONTEXT] * shape.decode_rows

    def refine(self, predicted: float, seconds: float) -> None:
        """Move the correction a little towards what a step really took; one outlier moves it by 1.4 % at most."""
        if predicted > 0 and seconds > 0:
            self.correction *= min(2.0, max(0.5, seconds / predicted)) ** REFINE_RATE

    @classmethod
    def fit(cls, shapes: Sequence[StepShape], seconds: Sequence[float]) -> StepTimeModel:
        """Least absolute relative errors, but for small ones, under non-negative weights (Huber's loss by iterated
        weights): spells in which the machine was slow do not count.

        Terms that never occur get weight 0, and so do the host's unless they explain the steps with training clearly
        better. 50 ms for the steps that TrainingShare looks at.
        """
        import numpy as np

        times = np.asarray(seconds, dtype=float)
        assert len(shapes) == len(times) > 0 and (times > 0).all()
        a = np.array([shape.features() for shape in shapes], dtype=float) / times[:, None]
        by_device, by_host = a[:, :HOST], a[:, HOST:]
        trained = np.array([shape.train_rows for shape in shapes])
        trains = trained > 0
        best = _fit_ones(by_device), np.zeros(len(FEATURES) - HOST)
        least = CLEARLY * np.abs(by_device @ best[0] - 1)[trains].sum()
        # Or a layer costs the host's time, and each step waits for the host or for the device: fit both, see which is
        # slower, again. At first the smaller passes wait for the host.
        by_device = np.where(np.arange(HOST) == _LAYERS, 0.0, by_device)
        waits = trains & (trained <= np.median(np.unique(trained[trains]))) if trains.any() else trains
        for _ in range(TURNS):
            if not waits.any() or waits.all():
                break
            pair = _fit_ones(by_device[~waits]), _fit_ones(by_host[waits])
            device, host = by_device @ pair[0], by_host @ pair[1]
            error = np.abs(np.maximum(device, host) - 1)[trains].sum()
            if error < least:
                least, best = error, pair
            before, waits = waits, host > device
            if (waits == before).all():
                break
        return cls(tuple(map(float, np.concatenate(best))))

    def to_json(self) -> dict[str, Any]:
        """Weights by name: a profile stays readable, and valid when terms are added."""
        return {"weights": dict(zip(FEATURES, self.weights, strict=True)), "correction": self.correction}

    @classmethod
    def from_json(cls, data: object) -> StepTimeModel:
        """InvalidRequest when it is not what to_json gives."""
        weights = data.get("weights") if isinstance(data, dict) else None
        if not isinstance(weights, dict) or not isinstance(data, dict):
            raise InvalidRequest(f"A step-time model needs an object 'weights', got {json.dumps(data)!r:.100}.")
        if unknown := weights.keys() - set(FEATURES):
            raise InvalidRequest(f"The step-time model has unknown terms {sorted(unknown)}; calibrate again.")
        values = [weights.get(name, 0.0) for name in FEATURES]
        values.append(data.get("correction", 1.0))
        for name, value in zip((*FEATURES, "correction"), values, strict=True):
            if not isinstance(value, int | float) or isinstance(value, bool) or not 0 <= value < math.inf:
                raise InvalidRequest(f"{name} in the step-time model is {value!r}; it must be a number, 0 or more.")
        return cls(tuple(map(float, values[:-1])), float(values[-1]))


def _fit_ones(a: Any) -> Any:
    """x >= 0 with which a x is 1 everywhere, as nearly as can be; a: (n, k)."""
    import numpy as np

    scale = np.linalg.norm(a, axis=0)
    scale[scale == 0] = 1.0
    a = a / scale
    weight, solution = np.ones(len(a)), None
    for _ in range(ROUNDS):
        solution = nonnegative_least_squares(a * weight[:, None], weight, near=solution)
        before, weight = weight, np.maximum(np.abs(a @ solution - 1), SMALL_ERROR) ** -0.5
        if (weight == before).all():
            break  # in the twin all errors are small
    return solution / scale


def nonnegative_least_squares(a: Any, b: Any, near: Any = None) -> Any:
    """x >= 0 that minimises |a x - b|, by the active-set method of Lawson and Hanson (1974, algorithm NNLS).

    a: (n, k) numpy array, columns of comparable length; b: (n,). near: the solution of a similar problem, from whose
    positive components the search begins.
    """
    import numpy as np

    k = a.shape[1]
    if len(a) > k + 1:  # the same problem in a few rows
        a, b = np.hsplit(np.linalg.qr(np.column_stack([a, b]), mode="r"), [k])
        b = b[:, 0]

    def solve(used: Any) -> Any:
        """Without the other components, of any sign."""
        x = np.zeros(k)
        x[used] = np.linalg.lstsq(a[:, used], b, rcond=None)[0]
        return x

    x, used = np.zeros(k), np.zeros(k, dtype=bool) if near is None else near > 0
    while used.any() and (x := solve(used)).min() < 0:
        used &= x > 0
    x = x * used
    tolerance = 1e-10 * max(1.0, float(np.abs(a.T @ b).max()))
    for _ in range(3 * k):
        gradient = np.where(used, -np.inf, a.T @ (b - a @ x))
        if used.all() or gradient.max() <= tolerance:
            break
        used[gradient.argmax()] = True
        while used.any():
            target = solve(used)
            blocked = used & (target <= 0)
            if not blocked.any():
                x = target
                break
            step = (x[blocked] / (x[blocked] - target[blocked])).min()  # as far as all stay non-negative
            x = x + step * (target - x)
            used &= x > 1e-15
            x[~used] = 0.0
    return x


assert len(StepShape().features()) == len(FEATURES)
