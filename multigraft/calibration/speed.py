"""Whether the machine is as fast as it can be just now: other processes, and other machines on the same host, slow it
down for seconds at a time, the latter unseen by anything but a clock."""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Sequence
from pathlib import Path

from multigraft.core.region import Scope

from .points import Plan, PointRunner

TOLERANCE = 1.1
PLANS = (Plan(at=0, context=0, new=1, output=7, adapter=None, scope=Scope.ALL),)


def probe(runner: PointRunner) -> float:
    """Seconds of a decode step of one row without adapter, as the machine is now."""
    return statistics.median(seconds for shape, seconds in runner.run(PLANS) if shape.decode_rows)


def calm(probes: Sequence[float]) -> list[bool]:
    """For each of several measurements whether it counts, by the slower of the probes before and behind it: those
    within TOLERANCE of the fast ones, and in any case the faster half."""
    ranked = sorted(probes)
    limit = max(TOLERANCE * ranked[len(ranked) // 5], ranked[len(ranked) // 2])
    return [seconds <= limit for seconds in probes]


def others_seconds() -> float:
    """CPU time that other processes have taken so far, and other machines of that which was this one's: differences
    tell. 0 where the system does not say."""
    try:
        fields = Path("/proc/stat").read_text().split(maxsplit=9)
        user, nice, system, _, _, irq, softirq, steal = map(int, fields[1:9])
    except (OSError, ValueError):
        return 0.0
    return (user + nice + system + irq + softirq + steal) / os.sysconf("SC_CLK_TCK") - time.process_time()
