"""Blocks of adapters in host memory, and their way to a CUDA device beside the steps."""

from __future__ import annotations

import atexit
import logging
import mmap
import threading
import weakref
from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass
from queue import SimpleQueue

import numpy as np
import torch

log = logging.getLogger(__name__)

COPY_BYTES = 2**23
"""Copied at a time, in 0.2 ms: what a step sends to the device does not wait for whole adapters."""
FREE_BYTES = 2**30
"""Of pages that are kept though no block uses them: 25 blocks of 42 MB, which is rank 8 of all of an 8B model's
linears. Or a quarter of what blocks use, if that is more: then some adapters may be larger than this."""

_driver = threading.Lock()
"""Locks and unlocks pages one at a time: each holds up launches, and many side by side for as long as all of them."""


class _Pages(mmap.mmap):
    """Pages of their own, zero at first: huge ones where the system has them, as 42 MB of small ones take 19 ms to be
    faulted in."""

    device: torch.device
    """What they are page-locked for; the CPU needs no locking."""

    def __new__(cls, nbytes: int, device: torch.device) -> _Pages:
        pages = super().__new__(cls, -1, nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        if hasattr(mmap, "MADV_HUGEPAGE"):
            pages.madvise(mmap.MADV_HUGEPAGE)
        pages.device = torch.device("cpu")
        if device.type == "cuda":
            pages._lock(device)
        return pages

    def _lock(self, device: torch.device) -> None:
        """So that the device reads them itself. Without, copies take longer, and the calling thread with them."""
        memory = torch.frombuffer(self, dtype=torch.uint8)
        # Faulted in while the driver holds nobody up. By torch, as mmap.madvise keeps the GIL: 5 ms for 42 MB.
        memory[:: mmap.PAGESIZE].zero_()
        with _driver, torch.cuda.device(device):
            cudart = torch.cuda.cudart()
            error = cudart.cudaHostRegister(memory.data_ptr(), len(self), 0)
        if error == cudart.cudaError.success:
            self.device = device
        else:
            log.warning("%d bytes of an adapter could not be page-locked: %s", len(self), error)

    def unlock(self) -> None:
        if self.device.type == "cuda":
            with _driver, torch.cuda.device(self.device):
                torch.cuda.cudart().cudaHostUnregister(torch.frombuffer(self, dtype=torch.uint8).data_ptr())
            self.device = torch.device("cpu")


class _Pool:
    """Pages for blocks, those of earlier ones first: unlocking waits for the device and holds up all launches
    meanwhile, and even new memory for the CPU takes as long to be zeroed as to be filled. Thread-safe."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._returned: deque[_Pages] = deque()
        self._free: list[_Pages] = []  # the latest last
        self._used_bytes = 0  # by blocks, and in _returned
        self._is_open = True
        self._calls: SimpleQueue[None] = SimpleQueue()
        self._thread: threading.Thread | None = None

    def take(self, nbytes: int, device: torch.device) -> _Pages:
        """At least so many bytes, holding anything."""
        # Sizes are a 16th apart, so that adapters that differ little share pages.
        step = max(mmap.PAGESIZE, 2 ** (nbytes.bit_length() - 5))
        size = -(-nbytes // step) * step
        with self._lock:
            if self._thread is None:
                self._thread = threading.Thread(target=self._shrink, name="adapter-release", daemon=True)
                self._thread.start()
            self._settle()
            fitting = [pages for pages in self._free if len(pages) == size and pages.device == device]
            if fitting:
                self._free.remove(fitting[-1])
        pages = fitting[-1] if fitting else _Pages(size, device)
        with self._lock:
            self._used_bytes += size
        return pages

    def give(self, pages: _Pages) -> None:
        """Nobody refers to the block any more. May interrupt anything, methods of this pool too: it takes no lock."""
        self._returned.append(pages)
        self._calls.put(None)

    def close(self) -> None:
        """Free nothing more."""
        self._is_open = False
        self._calls.put(None)
        if self._thread is not None:
            self._thread.join(5)  # unlocking waits for the device, which may be lost

    def _settle(self) -> None:
        while self._returned:
            pages = self._returned.popleft()
            self._used_bytes -= len(pages)
            self._free.append(pages)

    def _shrink(self) -> None:
        while self._is_open:
            self._calls.get()
            while self._is_open and self._drop_one():
                pass

    def _drop_one(self) -> bool:
        """Let the oldest pages go, if too much is free."""
        with self._lock:
            self._settle()
            if sum(map(len, self._free)) <= max(FREE_BYTES, self._used_bytes // 4):
                return False
            pages = self._free.pop(0)
        pages.unlock()
        return True


_pool = _Pool()
atexit.register(_pool.close)


def new_block(numel: int, dtype: torch.dtype, device: torch.device | str = "cpu") -> torch.Tensor:
    """(numel,) in host memory, holding anything, to be copied to the device: for CUDA page-locked.

    Copies under way must have ended when the last reference goes: another block has its pages from then on.
    """
    if not numel:
        return torch.empty(0, dtype=dtype)
    nbytes, pool = numel * dtype.itemsize, _pool
    pages = pool.take(nbytes, torch.device(device))
    owner = np.frombuffer(pages, np.uint8, nbytes)  # lives as long as the tensor or a view of it
    weakref.finalize(owner, pool.give, pages).atexit = False
    return torch.from_numpy(owner).view(dtype)


@dataclass(frozen=True, slots=True)
class Load:
    """A block on its way to the device."""

    end: torch.cuda.Event | None = None
    """None on the CPU: there a load ends before it returns."""
    source: torch.Tensor | None = None
    """What is copied: to be kept until the end."""

    def ready(self) -> bool:
        """Whether kernels launched from now on see the adapter."""
        return self.end is None or self.end.query()

    def wait(self) -> None:
        """Block the calling thread until ready."""
        if self.end is not None:
            self.end.synchronize()

    def join(self) -> None:
        """Let kernels launched on the current stream from now on wait until ready."""
        if self.end is not None:
            self.end.wait()


class SideStream:
    """A CUDA stream for copies, beside the one that is current on the engine's thread."""

    def __init__(self, device: torch.device):
        self._stream = torch.cuda.Stream(device)

    def now(self) -> torch.cuda.Event:
        """The end of what is queued on the current stream."""
        event = torch.cuda.Event()
        event.record(torch.cuda.current_stream(self._stream.device))
        return event

    def copy(
        self, pairs: Iterable[tuple[torch.Tensor, torch.Tensor]], after: torch.cuda.Event | None
    ) -> torch.cuda.Event:
        """Queue copies to targets from page-locked sources, after an event; returns the event of their end."""
        with torch.cuda.stream(self._stream):
            if after is not None:
                self._stream.wait_event(after)
            for target, source in pairs:
                for to, of in zip(_split(target), _split(source), strict=True):
                    to.copy_(of, non_blocking=True)
            event = torch.cuda.Event(blocking=True)  # whoever waits sleeps: it may be for the rest of a step
            event.record()
        return event

    def join(self) -> None:
        """Let the current stream wait for every copy that is queued."""
        torch.cuda.current_stream(self._stream.device).wait_stream(self._stream)


def _split(block: torch.Tensor) -> tuple[torch.Tensor, ...]:
    return block.split(COPY_BYTES // block.element_size())
