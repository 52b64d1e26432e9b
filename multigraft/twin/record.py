"""What became of a workload, simulated or measured: the material of a report."""

from __future__ import annotations

from array import array
from dataclasses import dataclass, field
from typing import NamedTuple

from .workload import Arrival, Workload


@dataclass(slots=True)
class Served:
    """One request's life. Times in seconds from the workload's start; None: it did not come to that."""

    request: Arrival
    started: float | None = None
    """When its first row was scheduled."""
    first: float | None = None
    """First token."""
    last: float | None = None
    """Last token so far."""
    num_tokens: int = 0
    """Output tokens so far."""
    error: str | None = None
    """Why it was refused or failed."""

    @property
    def complete(self) -> bool:
        return self.num_tokens == self.request.output_len


class Load(NamedTuple):
    adapter: str
    start: float
    seconds: float


class Sample(NamedTuple):
    """The state of the server at one time."""

    time: float
    running: int
    waiting: int
    kv_usage: float
    slots_used: int


@dataclass(slots=True, kw_only=True)
class Record:
    workload: Workload
    served: list[Served]
    """In the order of workload.requests."""
    gaps: array[float] = field(default_factory=lambda: array("d"))
    """Seconds between consecutive tokens of a request, each standing for gap_counts of them."""
    gap_counts: array[int] = field(default_factory=lambda: array("l"))
    loads: list[Load] | None = None
    """None, like what follows, when it is not known, as of a server that was only seen from outside."""
    samples: list[Sample] | None = None
    preemptions: int | None = None
    steps: int | None = None
    max_loras: int | None = None
    train_tokens: int = 0
    seconds: float = 0.0
    """From the start until everything had ended."""

    def add_gap(self, seconds: float, count: int = 1) -> None:
        self.gaps.append(seconds)
        self.gap_counts.append(count)
