"""Adapters on their way from disk to host memory, as adapters.store keeps them."""

from __future__ import annotations

from collections import Counter, OrderedDict, deque
from dataclasses import dataclass

from multigraft.core.batch import AdapterMove
from multigraft.core.request import AdapterRef

from .profile import LoadTimes

INSTANT = 1e-9


@dataclass(slots=True)
class _Read:
    move: AdapterMove
    start: float
    left: float
    """Seconds that it still takes, undisturbed."""


class HostMemory:
    """At most max_cpu_loras adapters, least recently fetched leaving first; those that requests hold stay.

    Reads and steps share the processor's cores: beside n reads a step takes 1 + step_slowdown * n times as long, and
    beside a step a read 1 + read_slowdown times. Reads share the memory among themselves: n of them take
    1 + read_sharing * (n - 1) times as long. So time passes here: see `step` and `idle`.
    """

    def __init__(self, max_cpu_loras: int, times: LoadTimes, num_threads: int):
        """num_threads: that read."""
        self.max_cpu_loras = max_cpu_loras
        self.times = times
        self.num_threads = num_threads
        self.done: deque[tuple[AdapterMove, float]] = deque()
        """Moves whose adapters are in host memory, and when they were asked for; for the caller to take."""
        self._kept: OrderedDict[int, None] = OrderedDict()
        self._users: Counter[int] = Counter()
        self._reads: list[_Read] = []
        """The first num_threads of them are under way."""

    def hold(self, ref: AdapterRef | None) -> None:
        """A request of the adapter has arrived."""
        if ref is not None:
            self._users[ref.uid] += 1

    def release(self, ref: AdapterRef | None) -> None:
        """It has ended."""
        if ref is not None:
            self._users[ref.uid] -= 1
            self._evict()

    def fetch(self, move: AdapterMove, now: float) -> None:
        """Bring the move's adapter, from disk if need be; it will be among `done`."""
        uid = move.ref.uid
        seconds = 0.0 if uid in self._kept else self.times.fetch + self.times.fetch_per_byte * move.ref.nbytes
        if seconds < INSTANT:
            self.done.append((move, now))
        else:
            self._reads.append(_Read(move, now, seconds))
        self._kept[uid] = None
        self._kept.move_to_end(uid)
        self._evict()

    def step(self, now: float, seconds: float) -> float:
        """When a step ends that begins now and takes so long undisturbed."""
        slower = 1 + self.times.read_slowdown
        while self._reads and seconds > 0:
            slow = 1 + self.times.step_slowdown * len(self._reads[: self.num_threads])
            passed = min(self._first() * slower, seconds * slow)
            seconds -= passed / slow
            now += passed
            self._read(passed / slower)
        return now + max(seconds, 0.0)

    def idle(self, now: float, until: float) -> float:
        """Let the time pass without steps; returns `until`."""
        while self._reads and now < until:
            passed = min(self._first(), until - now)
            now += passed
            self._read(passed)
        return until

    def next_done(self, now: float) -> float:
        """When the next adapter comes if no step runs; infinity when none is on its way."""
        return now if self.done else now + self._first() if self._reads else float("inf")

    def _first(self) -> float:
        """Seconds until the first read is done."""
        return min(read.left for read in self._reads[: self.num_threads]) * self._pace()

    def _pace(self) -> float:
        """By how much the reads under way are longer than alone."""
        return 1 + self.times.read_sharing * (len(self._reads[: self.num_threads]) - 1)

    def _read(self, seconds: float) -> None:
        done = seconds / self._pace()
        for read in self._reads[: self.num_threads]:
            read.left -= done
            if read.left < INSTANT:
                self.done.append((read.move, read.start))
        self._reads = [read for read in self._reads if read.left >= INSTANT]

    def _evict(self) -> None:
        if len(self._kept) > self.max_cpu_loras:
            idle = [uid for uid in self._kept if not self._users[uid]]
            for uid in idle[: len(self._kept) - self.max_cpu_loras]:
                del self._kept[uid]
