"""One step of work: spans of one flat token axis, and the adapter moves that go with them."""

from __future__ import annotations

import enum
from collections.abc import Iterator
from dataclasses import dataclass, field

from .request import AdapterRef, Request

LOW_RANK = 16
"""On a GPU adapters of more ranks take other kernels, as does every other adapter in a step with one."""


class Phase(enum.IntEnum):
    """Order of the phases along the token axis."""

    TRAIN = 0
    EVAL = 1
    PREFILL = 2
    DECODE = 3


@dataclass(slots=True)
class Span:
    """Consecutive positions [start, start + length) of one request in one step."""

    request: Request
    start: int
    length: int
    phase: Phase
    slot: int | None = None
    """Device slot of the request's adapter; None when no position of the span is adapted."""

    @property
    def stop(self) -> int:
        return self.start + self.length

    @property
    def samples(self) -> bool:
        """Whether the span reaches the sequence's last known token, so that its last row yields a new one."""
        return self.stop == len(self.request.tokens)

    def segments(self) -> Iterator[tuple[int, int]]:
        """Adapted parts as (first, last + 1) rows relative to the span's first row."""
        for lo, hi in self.request.adapted:
            lo, hi = max(lo, self.start), min(hi, self.stop)
            if lo < hi:
                yield lo - self.start, hi - self.start


@dataclass(frozen=True, slots=True)
class AdapterMove:
    """Put an adapter into a device slot."""

    ref: AdapterRef
    slot: int
    empties: tuple[int, ...] = ()
    """Slots to empty first, `slot` among them if it has a tenant; no request uses their tenants any more.

    More than one when the bytes of several small adapters make room for a large one.
    """


@dataclass(frozen=True, slots=True)
class TrainPart:
    """The training work of one step: so many rows through so many decoder layers."""

    rows: int
    forward: int
    """Layers run forward."""
    backward: int
    """Layers run backward, the output head counted as the first of them."""
    head: int = 0
    """Rows that go through the output head and the loss."""


@dataclass(slots=True)
class Batch:
    """What scheduling decided for one step. Decode spans have length 1."""

    spans: list[Span] = field(default_factory=list)
    loads: list[AdapterMove] = field(default_factory=list)
    """Loads to start now; they complete later and never delay this batch."""
    preempted: list[Request] = field(default_factory=list)
    train: TrainPart | None = None
    step: int = 0

    @property
    def num_tokens(self) -> int:
        return sum(s.length for s in self.spans)

    def __bool__(self) -> bool:
        return bool(self.spans)
