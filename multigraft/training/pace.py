"""How fast a job goes."""

from __future__ import annotations

import time
from collections.abc import Callable

MEMORY = 0.9
"""Weight of the past in the running mean."""


class Pace:
    """Seconds per step, as they come; a validation's time counts for the step after it."""

    def __init__(self, granted_seconds: float, clock: Callable[[], float] = time.monotonic):
        """granted_seconds: as TrainingEngine has it, like those of `observe`."""
        self._clock = clock
        self._last = clock()
        self._granted = granted_seconds
        self._mean: float | None = None

    def observe(self, num_steps: int, num_tokens: int, granted_seconds: float) -> dict[str, float]:
        """Steps have ended since the last call; metrics of theirs."""
        now = self._clock()
        elapsed = max(now - self._last, 1e-6)
        seconds = elapsed / num_steps
        past = seconds if self._mean is None else self._mean
        self._mean = MEMORY * past + (1 - MEMORY) * seconds
        granted = min(1.0, (granted_seconds - self._granted) / elapsed)
        self._last, self._granted = now, granted_seconds
        return {
            "step_seconds": seconds,
            "tokens_per_second": num_tokens / elapsed,
            "budget_granted": granted,
        }

    def seconds_for(self, num_steps: int) -> float | None:
        """What so many steps will take; None before the first."""
        return None if self._mean is None else self._mean * num_steps
