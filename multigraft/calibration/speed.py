"""Whether the machine is as fast as it can be just now: other processes, and other machines on the same host, slow it
down for seconds at a time, the latter unseen by anything but a clock."""

from __future__ import annotations

import statistics
from collections.abc import Sequence

from multigraft.core.region import Scope

from .points import Plan, PointRunner

TOLERANCE = 1.1
PROMPT = 64
"""Rows of the probe's prompts: enough to wait for arithmetic, where a decode step waits for memory."""
PLANS = (
    Plan(at=0, context=0, new=1, output=7, adapter=None, scope=Scope.ALL),
    Plan(at=2, context=0, new=PROMPT, output=1, adapter=None, scope=Scope.ALL),
    Plan(at=4, context=0, new=PROMPT, output=1, adapter=None, scope=Scope.ALL),
)

Probe = tuple[float, float]
"""Seconds of a decode step of one row and of a step with a prompt, without adapters, as the machine is now. Either may
be slow alone."""


def probe(runner: PointRunner) -> Probe:
    timed = runner.run(PLANS)
    decodes = [seconds for shape, seconds in timed if shape.decode_rows and not shape.prefill_rows]
    prompts = [seconds for shape, seconds in timed if shape.prefill_rows > 1]
    return statistics.median(decodes), min(prompts)


def slower(a: Probe, b: Probe) -> Probe:
    """The slower time of each step."""
    return max(a[0], b[0]), max(a[1], b[1])


def slowness(probes: Sequence[Probe]) -> list[float]:
    """How many times as long as on the fast machine each took, by the step that is farther from that."""
    fast = [sorted(seconds)[len(seconds) // 5] for seconds in zip(*probes, strict=True)]
    return [max(seconds / usual for seconds, usual in zip(p, fast, strict=True)) for p in probes]


def calm(probes: Sequence[Probe]) -> list[bool]:
    """For each of several measurements whether it counts, by the slower of the probes before and behind it: those
    within TOLERANCE of the fast ones, and in any case the faster half."""
    found = slowness(probes)
    limit = max(TOLERANCE, sorted(found)[len(found) // 2])
    return [factor <= limit for factor in found]
