"""A stream on the CPU that copies as late as a device might: what is queued runs when somebody asks for it."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable

import torch

from multigraft.adapters.bank import Bank


class LazyEvent:
    """The end of the copies that were queued before it."""

    def __init__(self, stream: LazyStream):
        self._stream = stream
        self.done = False

    def query(self) -> bool:
        """False once at least; each call lets the stream run one copy."""
        done = self.done
        self._stream.run_one()
        return done

    def synchronize(self) -> None:
        while not self.done:
            self._stream.run_one()

    wait = synchronize  # the current stream is the CPU, which has done all that it was given


class LazyStream:
    """In place of SideStream."""

    def __init__(self) -> None:
        self._queue: deque[tuple[torch.Tensor, torch.Tensor] | LazyEvent] = deque()
        self.calls: list[str] = []
        self.queued = "nothing"

    def run_one(self) -> None:
        if self._queue:
            first = self._queue.popleft()
            if isinstance(first, LazyEvent):
                first.done = True
            else:
                first[0].copy_(first[1])

    def now(self) -> str:
        """What the current stream has been given, for `calls`."""
        return self.queued

    def copy(self, pairs: Iterable[tuple[torch.Tensor, torch.Tensor]], after: str | None) -> LazyEvent:
        self.calls.append(f"copy after {after}")
        self._queue += pairs
        event = LazyEvent(self)
        self._queue.append(event)
        return event

    def join(self) -> None:
        self.calls.append("join")
        while self._queue:
            self.run_one()


def load_lazily(bank: Bank) -> LazyStream:
    """Let a bank on the CPU load as on CUDA."""
    stream = LazyStream()
    bank._beside = stream  # type: ignore[assignment]
    return stream
