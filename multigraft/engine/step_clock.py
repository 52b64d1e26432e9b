"""What steps take: on the CPU by the clock, on a GPU from the end of one step's work to the end of the next one's."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable

import torch

from multigraft.scheduling.steptime import StepShape

MAX_AHEAD = 2
"""Steps that a GPU may have queued: more would keep the next request waiting behind them."""


class StepClock:
    """begin() and end() around each step; idle() when there was none. Tells `observe` each step's shape and seconds."""

    def __init__(self, device: torch.device, observe: Callable[[StepShape, float], None]):
        self.observe = observe
        self._on_gpu = device.type == "cuda"
        self._started = 0.0
        self._ends: deque[tuple[StepShape | None, torch.cuda.Event]] = deque()

    def begin(self) -> None:
        self._started = time.monotonic()
        if self._on_gpu and not self._ends:
            self._mark(None)

    def end(self, shape: StepShape) -> None:
        """Waits, on a GPU, for the step before the last one."""
        if not self._on_gpu:
            self.observe(shape, time.monotonic() - self._started)
            return
        self._mark(shape)
        if len(self._ends) > MAX_AHEAD:
            self._ends[-MAX_AHEAD][1].synchronize()
        while len(self._ends) > 1 and self._ends[1][1].query():
            _, before = self._ends.popleft()
            done, event = self._ends[0]
            if done is not None:
                self.observe(done, before.elapsed_time(event) / 1e3)

    def idle(self) -> None:
        """The time until the next step is no step's."""
        self._ends.clear()

    def _mark(self, shape: StepShape | None) -> None:
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        self._ends.append((shape, event))
