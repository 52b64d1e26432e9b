"""Many decode steps at once, for the twin: while nothing happens, schedule() plans the same rows, one position on."""

from __future__ import annotations

from multigraft.core.batch import Batch, Phase, Span

from .queue import Lane
from .scheduler import MAX_BYPASS, OUTPUT_COST, PATIENCE, Scheduler


def steady_steps(scheduler: Scheduler) -> int:
    """How many of the next steps decode every running request and do nothing else.

    The promise holds as long as no request is added or ended and no load completes; the last of the steps may bring
    requests to their max_len. May say fewer than could be, 0 even. Only without a prefix index, which steps would fill.
    """
    s, residency, pages = scheduler, scheduler.residency, scheduler.pages
    running, max_seqs = s._running, s.config.max_num_seqs
    if not running or pages.enable_prefix_caching or residency._leaving:
        return 0
    steps = pages.num_free // len(running) * pages.page_size  # nobody is preempted for want of pages
    for request in running:
        length = len(request.tokens)
        if request.num_computed != length - 1 or length == request.prompt_len:
            return 0
        if request.max_len - length < steps:
            steps = request.max_len - length
    if len(s._queue):
        lanes = s._open_lanes()
        if lanes and len(running) < max_seqs:
            return 0
        newcomers = [lane for lane in lanes if not lane.tenant.running] if s.config.fairness else []
        if newcomers and s._share() < max(t.running for t in s._queue.tenants.values()):  # some would be preempted
            steps = min([steps, *(_steps_until_overdue(s, lane) for lane in newcomers)])
        if residency.can_close() and residency.any_overdue(MAX_BYPASS):
            return 0
        if residency.fits(0) and any(residency.fits(s._queue.lanes[u].nbytes) for u in residency.missing):
            return 0
    return max(0, steps)


def decode_batch(scheduler: Scheduler) -> Batch:
    """What the next of the steady steps runs."""
    no_slot = scheduler.residency.max_slots
    spans = [Span(r, r.num_computed, 1, Phase.DECODE, r.slot) for r in scheduler._running]
    spans.sort(key=lambda span: no_slot if span.slot is None else span.slot)
    return Batch(spans=spans)


def skip(scheduler: Scheduler, steps: int) -> None:
    """Do what `steps` rounds of schedule() and commit() would, with token 0 sampled each time.

    steps: at most steady_steps. Which pages a request gets may differ, not how many.
    """
    s, page_size = scheduler, scheduler.pages.page_size
    assert not s.pages.enable_prefix_caching
    s._step += steps
    s._crowded = bool(len(s._queue)) and s.config.max_num_seqs <= len(s._running) < s.config.max_num_batched_tokens
    tokens = [0] * steps
    for request in s._running:
        request.num_computed += steps
        request.tokens += tokens
        if request.num_computed > len(request.pages) * page_size:
            s.pages.extend(request, request.num_computed)
        s._queue.tenant(request).service += OUTPUT_COST * steps


def _steps_until_overdue(scheduler: Scheduler, lane: Lane) -> int:
    """Steps before the first in which the lane's tenant is overdue."""
    return lane.tenant.since + PATIENCE - 1 - scheduler._step
