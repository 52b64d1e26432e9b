"""Many decode steps at once, for the twin: while nothing happens, schedule() plans the same rows, one position on."""

from __future__ import annotations

from collections.abc import Sequence

from multigraft.core.request import Request

from .queue import Lane
from .scheduler import MAX_BYPASS, OUTPUT_COST, PATIENCE, Scheduler


def steady_steps(scheduler: Scheduler, decoding: Sequence[Request]) -> int:
    """How many of the next steps decode each of `decoding`, in this order, and do nothing else.

    decoding: the unfinished requests of a batch that was committed and had decodes alone. The promise holds as long
    as no request is added or ended and no load completes; nobody reaches max_len. May say fewer than could be, 0
    even. Without a prefix index only, which the steps would fill.
    """
    s, residency, pages = scheduler, scheduler.residency, scheduler.pages
    if not decoding or len(decoding) != len(s._running) or pages.enable_prefix_caching:
        return 0
    steps = min(r.max_len - len(r.tokens) for r in decoding) - 1
    steps = min(steps, pages.num_free // len(decoding) * pages.page_size)  # nobody is preempted for want of pages
    if len(s._queue):
        lanes = s._open_lanes()
        if lanes and len(s._running) < s.config.max_num_seqs:
            return 0
        if s.config.fairness:
            steps = min([steps, *(_steps_until_overdue(s, lane) for lane in lanes if not lane.tenant.running)])
        if residency.overdue(MAX_BYPASS) or any(residency.fits(s._queue.lanes[u].nbytes) for u in residency.missing):
            return 0
    return 0 if residency._leaving else max(0, steps)


def skip(scheduler: Scheduler, decoding: Sequence[Request], steps: int) -> None:
    """Do what `steps` rounds of schedule() and commit() would, with token 0 sampled each time.

    steps: at most steady_steps. Which pages a request gets may differ, not how many.
    """
    s = scheduler
    assert not s.pages.enable_prefix_caching
    s._step += steps
    s._crowded = bool(len(s._queue)) and s.config.max_num_seqs <= len(s._running) < s.config.max_num_batched_tokens
    for request in decoding:
        s.pages.extend(request, request.num_computed + steps)
        request.num_computed += steps
        request.tokens.extend([0] * steps)
        s._queue.tenant(request).service += OUTPUT_COST * steps


def _steps_until_overdue(scheduler: Scheduler, lane: Lane) -> int:
    """Steps before the first in which the lane's tenant is overdue."""
    return lane.tenant.since + PATIENCE - 1 - scheduler._step
