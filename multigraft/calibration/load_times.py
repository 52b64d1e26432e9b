"""How long adapters take to the device, and how much reading them and running steps slow each other and themselves
down."""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterator, Sequence
from threading import Thread

from multigraft.core.config import fetch_threads
from multigraft.core.region import Scope
from multigraft.core.request import AdapterRef
from multigraft.engine.core import EngineCore
from multigraft.twin.profile import LoadTimes

from .points import Plan, PointRunner

EACH = 3
"""Adapters of each rank that are loaded."""
QUIET_POINTS = 3
ROUNDS = 3
"""Adapters that each thread reads when all do."""


def measure_loads(core: EngineCore, runner: PointRunner, names: Sequence[Sequence[str]]) -> LoadTimes:
    """Adapters of each rank, from disk (in the system's cache, as just written) and from host memory."""
    chosen = [name for group in names for name in group[:EACH]]
    counters = core.counters
    copies = []
    list(_read(core, _new(core, chosen[:1])))  # the first of all imports what reads
    for ref, _ in _read(core, _new(core, chosen)):
        before = counters.adapter_load_seconds
        runner.warm_up([ref.name])
        copies.append((ref.nbytes, counters.adapter_load_seconds - before))
    alone = [(ref.nbytes, seconds) for ref, seconds in _read(core, _new(core, chosen))]
    (fetch, fetch_per_byte), (copy, copy_per_byte) = _line(alone), _line(copies)
    read_sharing = _sharing(core, names[0])
    step_slowdown, read_slowdown = _slowdowns(core, runner, chosen, sum(seconds for _, seconds in alone))
    return LoadTimes(
        fetch=fetch,
        fetch_per_byte=fetch_per_byte,
        copy=copy,
        copy_per_byte=copy_per_byte,
        step_slowdown=step_slowdown,
        read_slowdown=read_slowdown,
        read_sharing=read_sharing,
    )


def _new(core: EngineCore, names: Sequence[str]) -> list[AdapterRef]:
    """New versions, which are not in host memory."""
    return [core.parts.store.reload(name) for name in names]


def _read(core: EngineCore, refs: Sequence[AdapterRef]) -> Iterator[tuple[AdapterRef, float]]:
    """Read one after the other: each with its seconds."""
    store = core.parts.store
    for ref in refs:
        store.acquire(ref)  # so that it stays in host memory
        start = time.perf_counter()
        store.fetch(ref).result()
        seconds = time.perf_counter() - start
        yield ref, seconds
        store.release(ref)


def _sharing(core: EngineCore, names: Sequence[str]) -> float:
    """read_sharing of LoadTimes, from adapters of one size that are read by all threads at once, and one by one."""
    store, num_threads = core.parts.store, min(fetch_threads(), len(names))
    if num_threads == 1:
        return 0.0
    rounds = min(ROUNDS, len(names) // num_threads)
    alone = statistics.mean(seconds for _, seconds in _read(core, _new(core, names[:num_threads])))
    refs = _new(core, names[: rounds * num_threads])
    for ref in refs:
        store.acquire(ref)
    start = time.perf_counter()
    for fetched in [store.fetch(ref) for ref in refs]:
        fetched.result()
    together = (time.perf_counter() - start) / rounds
    for ref in refs:
        store.release(ref)
    return max(0.0, together / alone - 1) / (num_threads - 1)


def _slowdowns(
    core: EngineCore, runner: PointRunner, names: Sequence[str], seconds_alone: float
) -> tuple[float, float]:
    """(step_slowdown, read_slowdown) of LoadTimes, from decode steps beside which adapters are read."""
    plans = [Plan(at=0, context=0, new=1, output=32, adapter=None, scope=Scope.ALL)]
    quiet = statistics.mean(t for _ in range(QUIET_POINTS) for _, t in runner.run(plans))
    reads: list[float] = []
    refs = _new(core, names)
    reader = Thread(target=lambda: reads.extend(seconds for _, seconds in _read(core, refs)))
    reader.start()
    lost = 0.0
    while reader.is_alive():
        lost += sum(t - quiet for _, t in runner.run(plans))
    reader.join()
    beside = sum(reads)
    kept = max(0.1, 1 - max(0.0, lost) / beside)  # of the steps' speed
    return 1 / kept - 1, max(0.0, beside / seconds_alone - 1)


def _line(points: Sequence[tuple[int, float]]) -> tuple[float, float]:
    """Base and slope, neither negative, of the least squares of the relative error."""
    import numpy as np

    from multigraft.scheduling.steptime import nonnegative_least_squares

    seconds = np.array([t for _, t in points])
    a = np.array([[1.0, nbytes] for nbytes, _ in points]) / seconds[:, None]
    scale = np.linalg.norm(a, axis=0)
    base, slope = nonnegative_least_squares(a / scale, np.ones(len(points))) / scale
    return float(base), float(slope)
