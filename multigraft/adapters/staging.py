"""Blocks on their way to a CUDA device: through a few page-locked chunks, by threads of their own.

What is copied to the device beside the steps must lie in page-locked memory. Locking takes long, 0.7 ms a MB on an
H200's host, and may stall what the whole process launches: so the chunks are locked once, at the start.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from queue import SimpleQueue

import torch

from multigraft.kernels.openmp import compute_alone

THREADS = 4
"""One copies 10 GB/s into locked memory; the bus takes 50."""
CHUNKS = 8
CHUNK_BYTES = 2**23
"""0.8 ms of a thread. Each costs several turns with the GIL, and 42 MB are to be shared out evenly."""


@dataclass(frozen=True, slots=True)
class Load:
    """Copies to the device under way."""

    copies: tuple[Future[torch.cuda.Event | None], ...] = ()
    """Each done when it is queued, with the event of its end; None when nobody wants it any more. On the CPU there are
    none: a load ends before it returns."""

    def ready(self) -> bool:
        """Whether kernels launched from now on see the adapter. Raises what a copy has raised."""
        return all(copy.done() for copy in self.copies) and all(event.query() for event in self._events())

    def wait(self) -> None:
        """Block the calling thread until ready."""
        for event in self._events():
            event.synchronize()

    def join(self) -> None:
        """Let kernels launched on the current stream from now on wait until ready; blocks until all is queued."""
        for event in self._events():
            event.wait()

    def _events(self) -> list[torch.cuda.Event]:
        events = [copy.result() for copy in self.copies]
        return [event for event in events if event is not None]


class SideStream:
    """A CUDA stream for copies, beside the one that is current on the engine's thread."""

    def __init__(self, device: torch.device):
        self._stream = torch.cuda.Stream(device)

    def enter(self) -> None:
        """The calling thread will copy: alone, on this stream and its device."""
        compute_alone()
        torch.cuda.set_stream(self._stream)

    def copy(self, target: torch.Tensor, source: torch.Tensor) -> torch.cuda.Event:
        """Queue a copy, on a thread that has entered; returns the event of its end."""
        target.copy_(source, non_blocking=True)
        event = torch.cuda.Event(blocking=True)  # whoever waits sleeps: it may be for the rest of a step
        event.record()
        return event

    def now(self) -> torch.cuda.Event:
        """The end of what is queued on the current stream."""
        event = torch.cuda.Event()
        event.record(torch.cuda.current_stream(self._stream.device))
        return event

    def follow(self, event: torch.cuda.Event) -> None:
        """Copies queued from now on wait for it."""
        self._stream.wait_event(event)

    def join(self) -> None:
        """Let the current stream wait for every copy that is queued."""
        torch.cuda.current_stream(self._stream.device).wait_stream(self._stream)


@dataclass(slots=True)
class _Chunk:
    memory: torch.Tensor
    copied: torch.cuda.Event | None = None
    """The end of the copy that last left it."""


class Staging:
    """Chunks, and threads that take one after the other through them."""

    def __init__(self, stream: SideStream, chunks: Sequence[torch.Tensor]):
        """chunks: 1-D, equal, page-locked, of the blocks' dtype."""
        self.stream = stream
        self._size = chunks[0].numel()
        self._free: SimpleQueue[_Chunk] = SimpleQueue()  # longest queued first
        for memory in chunks:
            self._free.put(_Chunk(memory))
        self._threads = ThreadPoolExecutor(min(THREADS, len(chunks)), "adapter-copy", initializer=stream.enter)

    @classmethod
    def on(cls, device: torch.device, dtype: torch.dtype) -> Staging:
        """For blocks of dtype, to a CUDA device."""
        memory = torch.empty(CHUNKS, CHUNK_BYTES // dtype.itemsize, dtype=dtype, pin_memory=True)
        return cls(SideStream(device), list(memory))

    def start(self, block: torch.Tensor, put: Callable[[int, torch.Tensor], torch.cuda.Event | None]) -> Load:
        """Begin to copy a block in host memory, (n,), and return.

        put: called by the threads, several at once and in any order; queues the copy of a part of the block, which
        begins at that element, on the stream. Returns its event, or None when it has queued nothing.
        """
        parts = enumerate(block.split(self._size))
        return Load(tuple(self._threads.submit(self._copy, part, i * self._size, put) for i, part in parts))

    def _copy(
        self, part: torch.Tensor, first: int, put: Callable[[int, torch.Tensor], torch.cuda.Event | None]
    ) -> torch.cuda.Event | None:
        chunk = self._free.get()
        try:
            if chunk.copied is not None:
                chunk.copied.synchronize()
            staged = chunk.memory[: part.numel()]
            staged.copy_(part)
            chunk.copied = put(first, staged)
            return chunk.copied
        finally:
            self._free.put(chunk)
