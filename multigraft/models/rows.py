"""A batch laid out along the token axis, on the host."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from multigraft.core.batch import Batch

NO_SLOT = -1


@dataclass(frozen=True, slots=True)
class Rows:
    """T rows in span order."""

    ids: np.ndarray
    """(T,) int64."""
    positions: np.ndarray
    """(T,) int64, of each row in its request."""
    slots: np.ndarray
    """(T,) int32: the device slot of the adapter that acts on the row, or NO_SLOT."""
    sampled: list[int]
    """Rows that yield a token: one for each span with `samples`, in span order."""
    scored: list[tuple[int, int, int]]
    """(span index, first position, number of rows): prompt rows asked for their log-probabilities, in order."""
    scored_rows: list[int]

    @classmethod
    def of(cls, batch: Batch) -> Rows:
        num_rows = batch.num_tokens
        ids = np.empty(num_rows, dtype=np.int64)
        positions = np.empty(num_rows, dtype=np.int64)
        slots = np.full(num_rows, NO_SLOT, dtype=np.int32)
        sampled: list[int] = []
        scored: list[tuple[int, int, int]] = []
        scored_rows: list[int] = []
        row = 0
        for i, span in enumerate(batch.spans):
            request, end = span.request, row + span.length
            if span.length == 1:
                ids[row], positions[row] = request.tokens[span.start], span.start
            else:
                ids[row:end] = request.tokens[span.start : span.stop]
                positions[row:end] = np.arange(span.start, span.stop)
            if span.slot is not None:
                for lo, hi in span.segments():
                    slots[row + lo : row + hi] = span.slot
            if span.samples:
                sampled.append(end - 1)
            if request.sampling.prompt_logprobs is not None and span.start < request.prompt_len - 1:
                num = min(span.stop, request.prompt_len - 1) - span.start
                scored.append((i, span.start, num))
                scored_rows += range(row, row + num)
            row = end
        return cls(ids, positions, slots, sampled, scored, scored_rows)
