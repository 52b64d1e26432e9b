"""Fewer threads while other processes take the cores.

Every parallel region of a step waits until each of its threads has had a core. Beside a process that keeps one of two
cores busy, steps with two threads take 4.4 times as long as alone, with one thread 1.5 times (benchmarks/neighbour.py).
"""

from __future__ import annotations

import logging
import math
import os
import time
from collections.abc import Callable, Collection
from pathlib import Path

import torch

from multigraft.core.cores import my_cores

log = logging.getLogger(__name__)

PERIOD_S = 1.0
"""Between two looks at the others."""
ENOUGH = 0.4
"""Of a core, taken by others, that is worth a thread. A process that wants all of a core gets 0.6 of it at least."""


def others_seconds() -> float:
    """CPU time of my_cores that other processes have taken so far, and other machines of that which was this one's:
    differences tell. 0 where the system does not say."""
    try:
        return busy_seconds(Path("/proc/stat").read_text(), my_cores()) - time.process_time()
    except (OSError, ValueError):
        return 0.0


def busy_seconds(stat: str, cores: Collection[int]) -> float:
    """How long the cores were not idle, by the text of /proc/stat."""
    names = {f"cpu{core}" for core in cores}
    lines = [line.split() for line in stat.splitlines() if line.startswith("cpu")]
    taken = [sum(map(int, line[1:4] + line[6:9])) for line in lines if line[0] in names]  # all but idle and iowait
    return sum(taken) / os.sysconf("SC_CLK_TCK")


class Neighbours:
    """To be asked for by the thread that computes, which alone changes its number of threads."""

    def __init__(
        self,
        others: Callable[[], float] = others_seconds,
        clock: Callable[[], float] = time.monotonic,
        set_threads: Callable[[int], None] = torch.set_num_threads,
        threads: int | None = None,
        cores: Callable[[], Collection[int]] = my_cores,
    ):
        """others: as others_seconds. threads: without neighbours. cores: as my_cores."""
        self._others, self._clock, self._set_threads = others, clock, set_threads
        self._most = self._now = threads or torch.get_num_threads()
        self._find_cores, self._cores = cores, cores()
        self._looked, self._taken = clock(), self._others()

    def look(self) -> None:
        """Change the number of threads if others have come or gone; at most once in PERIOD_S."""
        now = self._clock()
        if self._most == 1 or now - self._looked < PERIOD_S:
            return
        taken, cores = self._others(), self._find_cores()
        busy = (taken - self._taken) / (now - self._looked)
        self._looked, self._taken = now, taken
        if cores != self._cores:  # of others than last time, nothing can be said yet
            self._cores = cores
            return
        left = max(len(cores), self._most) - math.floor(max(0.0, busy) + 1 - ENOUGH)
        wanted = max(1, min(self._most, left))
        if wanted != self._now:
            log.info("Other processes take %.1f cores: computing with %d of %d threads.", busy, wanted, self._most)
            self._set_threads(wanted)
            self._now = wanted
