"""Cores of the processor."""

from __future__ import annotations

import os


def my_cores() -> set[int]:
    """Those that this process may use: in a container, perhaps some of the machine's."""
    try:
        return os.sched_getaffinity(os.getpid())  # of the main thread: others may have been bound to one
    except AttributeError:  # not on this system
        return set(range(os.cpu_count() or 1))
