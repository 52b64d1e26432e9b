"""Free room in an arena, first fit."""

from __future__ import annotations

from bisect import bisect_left


class Extents:
    """The holes between taken extents, in order, no two of them adjacent."""

    def __init__(self, capacity: int):
        self.holes: list[tuple[int, int]] = [(0, capacity)] if capacity else []
        """First and last + 1."""
        self.free = capacity

    def take(self, size: int) -> int | None:
        """The start of a new extent; None when no hole is large enough."""
        for i, (start, stop) in enumerate(self.holes):
            if stop - start >= size:
                self.holes[i : i + 1] = [(start + size, stop)] if stop - start > size else []
                self.free -= size
                return start
        return None

    def give(self, start: int, size: int) -> None:
        """Free a taken extent."""
        if not size:
            return
        first, last = start, start + size
        i = j = bisect_left(self.holes, (first, last))
        if i and self.holes[i - 1][1] == first:
            i, first = i - 1, self.holes[i - 1][0]
        if j < len(self.holes) and self.holes[j][0] == last:
            j, last = j + 1, self.holes[j][1]
        self.holes[i:j] = [(first, last)]
        self.free += size
