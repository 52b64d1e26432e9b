"""What rank 0 tells the other ranks, as one array of int32: no object crosses a process.

A step is told whole, so that the other ranks keep no state of requests: the first row of each span's header, then the
spans' tokens, pages and adapted ranges, one after another.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

import numpy as np

from multigraft.core.batch import Batch, Phase, Span
from multigraft.core.region import Ranges
from multigraft.core.request import SamplingParams
from multigraft.training.microbatch import Microbatch, Sample

STOP, STEP, LOAD, UNLOAD, JOIN, LEAVE, PASS, RIDE, FORWARD, BACKWARD, GATHER, UPDATE, CLEAR = range(13)
"""First number of a message. LOAD and UNLOAD are followed by a slot. From JOIN on they are of fine-tuning
(train_ranks.py); LEAVE, GATHER, UPDATE and CLEAR are followed by an adapter's key, RIDE, FORWARD and BACKWARD by a
number of layers."""

_NONE = -1
_FIELDS = 9
_SEED = 2**24
"""Seeds have 48 bits."""
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
    take = _reader(message)
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


def encode_join(key: int, config: Mapping[str, Any]) -> np.ndarray:
    """A JOIN: an adapter of a job comes, with this adapter_config.json."""
    return np.array([JOIN, key, *json.dumps(dict(config)).encode()], dtype=np.int32)


def decode_join(message: np.ndarray) -> tuple[int, dict[str, Any]]:
    """(key, config) of a JOIN."""
    return int(message[1]), json.loads(message[2:].astype(np.uint8).tobytes())


def encode_pass(microbatches: Sequence[Microbatch], keys: Sequence[int | None], *, keep: bool) -> np.ndarray:
    """A PASS. keys: of the microbatches' adapters, None without one."""
    numbers = [PASS, keep, microbatches[0].grad, len(microbatches)]
    for m, key in zip(microbatches, keys, strict=True):
        seed = divmod(m.seed, _SEED)
        numbers += [_NONE if key is None else key, m.objective.two_pass, *seed, len(m.samples)]
        for s in m.samples:
            trained = [i for i, weight in enumerate(s.weights) if weight]
            numbers += [len(s.tokens), s.prompt_len, len(trained), *s.tokens, *trained]
    return np.array(numbers, dtype=np.int32)


@dataclass(frozen=True, slots=True)
class ToldMicrobatch:
    """As much of a microbatch as running it takes; the samples' weights are 1 where something is learned."""

    key: int | None
    two_pass: bool
    seed: int
    samples: tuple[Sample, ...]


def decode_pass(message: np.ndarray) -> tuple[list[ToldMicrobatch], bool, bool]:
    """(the microbatches, keep, grad) of a PASS."""
    take = _reader(message)
    _, keep, grad, num = take(4)
    told = []
    for _ in range(num):
        key, two_pass, high, low, num_samples = take(5)
        samples = []
        for _ in range(num_samples):
            length, prompt_len, num_trained = take(3)
            tokens, trained = take(length), set(take(num_trained))
            weights = tuple(float(i in trained) for i in range(length))
            samples.append(Sample(tokens=tuple(tokens), weights=weights, prompt_len=prompt_len))
        told.append(ToldMicrobatch(None if key == _NONE else key, bool(two_pass), high * _SEED + low, tuple(samples)))
    return told, bool(keep), bool(grad)


def _reader(message: np.ndarray) -> Callable[[int], list[int]]:
    """Gives the message's next so many numbers."""
    at = 0

    def take(count: int) -> list[int]:
        nonlocal at
        at += count
        return message[at - count : at].tolist()

    return take
