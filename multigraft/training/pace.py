"""How fast a job goes."""

from __future__ import annotations

import time
from collections.abc import Callable

MEMORY = 0.9
"""Weight of the past in the running mean."""


class Pace:
    """Seconds per step, as they come; a validation's time counts for the step after it."""

    def __init__(self, clock: Callable[[], float] = time.monotonic):
        self._clock = clock
        self._last = clock()
        self._mean: float | None = None

    def observe(self, num_steps: int, num_tokens: int) -> dict[str, float]:
        """Steps have ended since the last call; metrics of theirs."""
        now = self._clock()
        seconds = max((now - self._last) / num_steps, 1e-6)
        past = seconds if self._mean is None else self._mean
        self._mean = MEMORY * past + (1 - MEMORY) * seconds
        self._last = now
        return {"step_seconds": seconds, "tokens_per_second": num_tokens / num_steps / seconds}

    def seconds_for(self, num_steps: int) -> float | None:
        """What so many steps will take; None before the first."""
        return None if self._mean is None else self._mean * num_steps
