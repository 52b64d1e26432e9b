"""Blocks of adapters in host memory, and their way to a CUDA device beside the steps."""

from __future__ import annotations

import logging
import mmap
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import torch

log = logging.getLogger(__name__)

COPY_BYTES = 2**23
"""Copied at a time, in 0.2 ms: what a step sends to the device does not wait for whole adapters."""


class _Pages(mmap.mmap):
    """Zeros, in pages of their own: huge ones where the system has them, as 42 MB of small ones take 19 ms to be
    faulted in."""

    _address = 0
    """Once locked."""

    def __new__(cls, nbytes: int) -> _Pages:
        pages = super().__new__(cls, -1, nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        if hasattr(mmap, "MADV_HUGEPAGE"):
            pages.madvise(mmap.MADV_HUGEPAGE)
        return pages

    def lock(self, address: int, device: torch.device) -> None:
        """So that the device reads them itself. Without, copies take longer, and the calling thread with them."""
        with torch.cuda.device(device):
            cudart = torch.cuda.cudart()
            error = cudart.cudaHostRegister(address, len(self), 0)
        if error == cudart.cudaError.success:
            self._address, self._unlock = address, cudart.cudaHostUnregister
        else:
            log.warning("%d bytes of an adapter could not be page-locked: %s", len(self), error)

    def __del__(self) -> None:
        if self._address:
            self._unlock(self._address)


def new_block(numel: int, dtype: torch.dtype, device: torch.device | str = "cpu") -> torch.Tensor:
    """(numel,) zeros in host memory, to be copied to the device: for CUDA they are page-locked, which takes 5 ms for
    42 MB and delays nobody's launches. Copies under way must have ended when the last reference goes."""
    if not numel:
        return torch.empty(0, dtype=dtype)
    pages = _Pages(numel * dtype.itemsize)
    block = torch.frombuffer(pages, dtype=dtype)
    device = torch.device(device)
    if device.type == "cuda":
        pages.lock(block.data_ptr(), device)
    return block


_releasing = ThreadPoolExecutor(1, "adapter-release")


def release(blocks: list[Any]) -> None:
    """Let go of what the list holds, on another thread: unlocking pages takes a millisecond or more."""
    _releasing.submit(blocks.clear)


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
