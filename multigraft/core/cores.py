"""Cores of the processor."""

from __future__ import annotations

import os


def my_cores() -> set[int]:
    """Those that this process may use: in a container, perhaps some of the machine's."""
    try:
        return os.sched_getaffinity(0)
    except AttributeError:  # not on this system
        return set(range(os.cpu_count() or 1))
