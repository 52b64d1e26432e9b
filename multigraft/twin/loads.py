"""Adapters on their way from disk to host memory, as adapters.store keeps them."""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Callable

from multigraft.core.config import fetch_threads
from multigraft.core.request import AdapterRef


class HostMemory:
    """At most max_cpu_loras adapters, least recently fetched leaving first; those that requests hold stay."""

    def __init__(self, max_cpu_loras: int, fetch_seconds: Callable[[int], float], num_threads: int | None = None):
        """fetch_seconds: from disk, by bytes. num_threads: that read; default: as many as here."""
        self.max_cpu_loras = max_cpu_loras
        self.fetch_seconds = fetch_seconds
        self._kept: OrderedDict[int, None] = OrderedDict()
        self._users: Counter[int] = Counter()
        self._threads = [0.0] * (num_threads or fetch_threads())
        """When each will be free."""

    def hold(self, ref: AdapterRef | None) -> None:
        """A request of the adapter has arrived."""
        if ref is not None:
            self._users[ref.uid] += 1

    def release(self, ref: AdapterRef | None) -> None:
        """It has ended."""
        if ref is not None:
            self._users[ref.uid] -= 1
            self._evict()

    def fetch(self, ref: AdapterRef, now: float) -> float:
        """When the adapter will be in host memory."""
        if ref.uid in self._kept:
            self._kept.move_to_end(ref.uid)
            return now
        first = self._threads.index(min(self._threads))
        done = self._threads[first] = max(now, self._threads[first]) + self.fetch_seconds(ref.nbytes)
        self._kept[ref.uid] = None
        self._evict()
        return done

    def _evict(self) -> None:
        if len(self._kept) > self.max_cpu_loras:
            idle = [uid for uid in self._kept if not self._users[uid]]
            for uid in idle[: len(self._kept) - self.max_cpu_loras]:
                del self._kept[uid]
