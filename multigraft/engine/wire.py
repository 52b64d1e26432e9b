"""What rank 0 tells the other ranks, as one array of int32: no object crosses a process.

A step is told whole, so that the other ranks keep no state of requests: the first row of each span's header, then the
spans' tokens, pages and adapted ranges, one after another.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

import numpy as np

from multigraft.core.batch import Batch, Phase, Span
from multigraft.core.region import Ranges
from multigraft.core.request import SamplingParams

STOP, STEP, LOAD, UNLOAD = range(4)
"""First number of a message. LOAD and UNLOAD are followed by a slot."""

_NONE = -1
_FIELDS = 9
_PLAIN, _SCORED = SamplingParams(), SamplingParams(prompt_logprobs=0)


class _Tokens:
    """The tokens of one span, indexed as those of its request."""

    def __init__(self, first: int, tokens: list[int], length: int):
        self._first, self._tokens, self._length = first, tokens, length

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return self._tokens[index.start - self._first : index.stop - self._first]
        return self._tokens[(index + self._length if index < 0 else index) - self._first]


@dataclass(frozen=True, slots=True)
class _Request:
    """As much of a request as running a span of it takes; stands in for core.request.Request."""

    id: int
    tokens: _Tokens
    pages: list[int]
    prompt_len: int
    adapted: Ranges
    sampling: SamplingParams


def encode(batch: Batch, late_rows: Sequence[int], num_late: int) -> np.ndarray:
    """A STEP. late_rows: for each span, LateTokens.row; num_late: how many late tokens there are."""
    header, ids, pages, adapted = [STEP, num_late, len(batch.spans)], [], [], []
    for span, late_row in zip(batch.spans, late_rows, strict=True):
        request = span.request
        ranges = request.adapted if span.slot is not None else ()
        header += (
            span.start,
            span.length,
            span.phase,
            _NONE if span.slot is None else span.slot,
            len(request.tokens),
            request.prompt_len if request.sampling.prompt_logprobs is None else -request.prompt_len,
            len(request.pages),
            len(ranges),
            late_row,
        )
        ids.append(request.tokens[span.start : span.stop])
        pages.append(request.pages)
        adapted += chain.from_iterable(ranges)
    return np.fromiter(chain(header, chain.from_iterable(ids), chain.from_iterable(pages), adapted), np.int32)


def decode(message: np.ndarray) -> tuple[Batch, dict[str, int], int]:
    """(the batch, late rows by request id, number of late tokens) of a STEP."""
    at = 0

    def take(count: int) -> list[int]:
        nonlocal at
        at += count
        return message[at - count : at].tolist()

    _, num_late, num_spans = take(3)
    headers = [take(_FIELDS) for _ in range(num_spans)]
    tokens = [take(h[1]) for h in headers]
    pages = [take(h[6]) for h in headers]
    spans, rows = [], {}
    for i, (start, length, phase, slot, num_tokens, prompt_len, _, num_ranges, late_row) in enumerate(headers):
        ends = take(2 * num_ranges)
        request = _Request(
            id=str(i),
            tokens=_Tokens(start, tokens[i], num_tokens),
            pages=pages[i],
            prompt_len=abs(prompt_len),
            adapted=tuple(zip(ends[::2], ends[1::2], strict=True)),
            sampling=_PLAIN if prompt_len > 0 else _SCORED,
        )
        if late_row != _NONE:
            rows[request.id] = late_row
        spans.append(Span(request, start, length, Phase(phase), None if slot == _NONE else slot))  # type: ignore[arg-type]
    return Batch(spans), rows, num_late
