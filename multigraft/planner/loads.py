"""What adapters take of a GPU, from the step-time model alone: microseconds an adapter, no simulation.

A mode is a step time T. At T a demand of `rate` requests a second has rate * output_len * T rows in every decode step
(Little's law), rate * T prompts begin in it, and it takes part at all with the probability 1 - exp(-rows) of a Poisson
count. So for a given T everything adds up over adapters, and a GPU serves its adapters without starvation, and with
inter-token latency T, when at some T no longer than the target a step's work takes no longer than T, and rows, KV
tokens and slots suffice.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from multigraft.core.errors import CapacityExceeded
from multigraft.core.region import Scope
from multigraft.scheduling.steptime import FEATURES, ROW_KNOTS, StepTimeModel

from .placement import Array, Demand

RESOURCES = ("step time", "rows in a step", "running requests", "KV cache", "adapter slots", "adapters in host memory")
NUM_STEP_TIMES = 8
ROW_TERMS = slice(FEATURES.index("rows_from_0"), FEATURES.index("rows_from_0") + len(ROW_KNOTS))


@dataclass(frozen=True, kw_only=True)
class Server:
    """One GPU as it will be run."""

    model: StepTimeModel
    bytes_per_rank: float
    """Of an adapter on the device."""
    max_num_seqs: int
    max_num_batched_tokens: int
    slots: int
    kv_tokens: int
    max_adapters: int = 1024
    """In host memory."""
    max_itl_s: float = 0.1
    """Target of inter-token latency, mean."""
    train_share: float = 0.0
    """Of the time."""
    headroom: float = 0.9
    """Share of the time that may be planned; the rest is for arrivals that come in bursts."""


class ServerLoads:
    """Loads of demands on one server; see the module."""

    resources = RESOURCES

    def __init__(self, demands: Sequence[Demand], server: Server):
        self.demands, self.server = demands, server
        self._prompt = np.array([d.prompt_len for d in demands], dtype=float)
        self._output = np.array([d.output_len for d in demands], dtype=float)
        self._rate = np.array([d.rate for d in demands], dtype=float)
        self._everywhere = np.array([d.scope is Scope.ALL for d in demands])
        self._bytes = np.array([d.rank for d in demands]) * server.bytes_per_rank
        self._weights = np.array(server.model.weights) * server.model.correction
        fixed = self._weights[[FEATURES.index(name) for name in ("step", "has_adapters", "has_prefill")]].sum()
        if fixed >= server.max_itl_s * server.headroom:
            raise CapacityExceeded(
                f"A step takes at least {fixed * 1e3:.1f} ms before any token, so a target of "
                f"{server.max_itl_s * 1e3:.1f} ms between tokens cannot be kept: the binding limit is step time."
            )
        self.step_times: Array = np.geomspace(min(2 * fixed, server.max_itl_s), server.max_itl_s, NUM_STEP_TIMES)
        self._fixed = fixed
        self._lines = [self._linearised(t) for t in self.step_times]

    def uses(self, which: Sequence[int], shares: Sequence[float] | Array) -> Array:
        index = np.asarray(which, dtype=int)
        rate = self._rate[index] * np.asarray(shares, dtype=float)
        if not len(index):
            return np.zeros((0, len(self.step_times), len(RESOURCES)))
        return np.stack([self._uses(index, rate, k) for k in range(len(self.step_times))], axis=1)

    def itl_s(self, sums: Array) -> Array:
        """(GPUs, modes, resources) to (GPUs,): inter-token latency to expect; infinite where the load does not fit."""
        full = sums.max(axis=-1)
        return np.where(full <= 1, self.step_times, np.inf).min(axis=-1)

    def _uses(self, index: np.ndarray, rate: Array, k: int) -> Array:
        server, t = self.server, float(self.step_times[k])
        slope, capacity, max_rows, other_rows = self._lines[k]
        features, rows, running, slots = self._features(index, rate, t)
        features[:, FEATURES.index("decode_adapted_times_bytes")] *= other_rows
        work = (features @ self._weights + rows * slope) / capacity
        kv = running * (self._prompt[index] + self._output[index] / 2)
        length = kv.sum() / max(running.sum(), 1e-12)
        return np.stack(
            [
                work,
                rows / max_rows,
                running / _poisson_mean(server.max_num_seqs),
                kv / (_poisson_mean(server.kv_tokens / length) * length),
                slots / max(server.slots, 1e-9),
                np.full(len(index), 1 / server.max_adapters),
            ],
            axis=1,
        )

    def _features(self, index: np.ndarray, rate: Array, t: float) -> tuple[Array, Array, Array, Array]:
        """Per step of length t: features but for rows, fixed terms and the foreign rows of the product; rows; running
        requests; slots."""
        prompt, output, nbytes = self._prompt[index], self._output[index], self._bytes[index]
        everywhere = self._everywhere[index]
        chunks = np.ceil(prompt / self.server.max_num_batched_tokens)
        begun = rate * t
        decoding = begun * np.maximum(output - 1, 0)
        in_prefill, in_decode = -np.expm1(-begun * chunks), -np.expm1(-decoding)
        terms = {
            "prefill_spans": begun * chunks,
            "prefill_attention": begun * prompt * (prompt + 1) / 2,
            "prefill_context": begun * prompt * (chunks - 1) / 2,
            "prefill_adapters": in_prefill,
            "prefill_adapter_bytes": in_prefill * nbytes,
            "prefill_adapter_work": begun * prompt * nbytes,
            "decode_rows": decoding,
            "decode_context": decoding * (prompt + output / 2),
            "decode_adapted": decoding * everywhere,
            "decode_adapters": in_decode * everywhere,
            "decode_adapter_bytes": in_decode * nbytes * everywhere,
            "decode_adapted_times_bytes": in_decode * nbytes * everywhere,
            "samples": begun * output,
        }
        features = np.zeros((len(index), len(FEATURES)))
        for name, values in terms.items():
            features[:, FEATURES.index(name)] = values
        # Slots are held while adapters load, too, and freed late: counted as if requests ran twice as long.
        slots = -np.expm1(-2 * (begun * chunks + decoding * everywhere))
        return features, begun * prompt + decoding, begun * chunks + decoding, slots

    def _linearised(self, t: float) -> tuple[float, float, float, float]:
        """At the rate of this mix of demands that fills a step of length t: seconds a row, seconds a step for all that
        grows with demand, rows in a step at most, adapted decode rows in a step.

        The cost of rows is piecewise linear; the line is the lowest over it, from 0 to the next knot, at that rate.
        """
        server = self.server
        budget = t * server.headroom * (1 - server.train_share) - self._fixed
        everything = np.arange(len(self.demands))
        low, high = 0.0, 1e9
        for _ in range(60):
            scale = (low * high) ** 0.5 if low else high / 10
            features, rows, running, _ = self._features(everything, self._rate * scale, t)
            adapted = features[:, FEATURES.index("decode_adapted")].sum()
            features[:, FEATURES.index("decode_adapted_times_bytes")] *= adapted
            work = float(features.sum(axis=0) @ self._weights) + self._row_seconds(float(rows.sum()))
            held = work <= budget and running.sum() <= server.max_num_seqs
            held = held and rows.sum() <= server.max_num_batched_tokens
            low, high = (scale, high) if held else (low, scale)
            if low and high / low < 1.001:
                break
        x = float(rows.sum())
        end = min(next((knot for knot in ROW_KNOTS if knot >= 1.5 * x), np.inf), server.max_num_batched_tokens)
        knots = [knot for knot in ROW_KNOTS if knot < end] + [end]
        slope, intercept = min(self._lines_over(knots), key=lambda line: line[1] + line[0] * x)
        return slope, max(budget - intercept, 1e-12), end, max(adapted, 1.0)

    def _row_seconds(self, rows: float) -> float:
        ends = [*ROW_KNOTS[1:], np.inf]
        widths = [max(0.0, min(rows, end) - start) for start, end in zip(ROW_KNOTS, ends, strict=True)]
        return float(self._weights[ROW_TERMS] @ widths)

    def _lines_over(self, knots: Sequence[float]) -> list[tuple[float, float]]:
        """(slope, intercept) of lines through two knots of the row cost that lie under none of the knots."""
        cost = [self._row_seconds(knot) for knot in knots]
        lines = []
        for i, a in enumerate(knots):
            for j in range(i + 1, len(knots)):
                slope = (cost[j] - cost[i]) / (knots[j] - a)
                intercept = cost[i] - slope * a
                if all(intercept + slope * k >= c - 1e-12 for k, c in zip(knots, cost, strict=True)):
                    lines.append((slope, intercept))
        return lines


def _poisson_mean(most: float) -> float:
    """The mean at which a Poisson count stays under `most` but for one time in forty: mean + 2 sqrt(mean) = most."""
    return max(((1 + most) ** 0.5 - 1) ** 2, 1e-9)
