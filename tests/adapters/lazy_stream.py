"""A stream on the CPU that copies as late as a device might: what is queued runs when somebody asks for it."""

from __future__ import annotations

import threading
from collections import deque

import torch

from multigraft.adapters.bank import Bank
from multigraft.adapters.staging import Staging


class LazyEvent:
    """The end of the copy that was queued before it."""

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
        self._queue: deque[tuple[torch.Tensor, torch.Tensor, LazyEvent]] = deque()
        self._lock = threading.Lock()
        self.calls: list[str] = []
        self.queued = "nothing"

    def run_one(self) -> None:
        with self._lock:
            if self._queue:
                target, source, event = self._queue.popleft()
                target.copy_(source)
                event.done = True

    def enter(self) -> None:
        pass

    def copy(self, target: torch.Tensor, source: torch.Tensor) -> LazyEvent:
        event = LazyEvent(self)
        with self._lock:
            self._queue.append((target, source, event))
        self.calls.append("copy")
        return event

    def now(self) -> str:
        """What the current stream has been given, for `calls`."""
        return self.queued

    def follow(self, event: str) -> None:
        self.calls.append(f"after {event}")

    def join(self) -> None:
        while self._queue:
            self.run_one()


def stage_lazily(bank: Bank, *, chunks: int, numel: int) -> LazyStream:
    """Let a bank on the CPU load as on CUDA, through so many chunks of so many elements."""
    stream = LazyStream()
    memory = [torch.full((numel,), torch.nan, dtype=bank.arena.dtype) for _ in range(chunks)]
    bank._staging = Staging(stream, memory)  # type: ignore[arg-type]
    return stream
