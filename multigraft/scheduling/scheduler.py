"""What runs in the next step. The engine and the digital twin execute this very code."""

from __future__ import annotations

from bisect import insort
from collections.abc import Mapping
from heapq import heapify, heappop, heappush
from operator import attrgetter

from multigraft.core.batch import Batch, Phase, Span
from multigraft.core.config import SchedulerConfig, TrainingConfig
from multigraft.core.errors import CapacityExceeded, InvalidRequest
from multigraft.core.request import FinishReason, Request
from multigraft.kvcache.pages import PagePool

from .queue import Lane, Tenant, WaitingQueue
from .residency import Residency
from .training import TrainingShare, TrainWork

PATIENCE = 32
"""Steps that a tenant with nothing running waits for room before it takes some from the heaviest tenant."""
MAX_BYPASS = 32
"""Admissions under other adapters that pass over a missing adapter before a slot is cleared for it."""
PROMPT_COST, OUTPUT_COST = 1, 2
"""What a computed prompt token and a generated token add to a tenant's service."""

Rank = tuple[int, bool, bool, int, int]
Buckets = dict[int, list[Span]]
"""Spans of one phase by adapter slot; those without adapter under Residency.max_slots, after every slot."""

_by_priority = attrgetter("priority")


class Scheduler:
    """Continuous batching: decodes first, then prefills under way, then admissions, under one token budget.

    The caller alternates schedule() and commit(); batches execute in that order. Between the two, requests may be
    added, aborted and finished. A batch that failed is not committed: schedule() plans the same positions again for
    those of its requests that were not finished.

    Order of admission: priority (lower first); tenants that are overdue; requests that were preempted; the tenant
    with least service; arrival. Without `fairness`, and with a single tenant, that is first come, first served.
    Requests whose adapter is not ready let others pass; an activated LoRA that the prompt does not invoke is not
    waited for. A request is admitted with pages for all of its tokens, and one free page for each running request
    stays, so only decodes can run out of pages; then the latest admitted of the lowest priority is preempted: it keeps
    its tokens and is computed again.

    Bounds, among requests of equal priority:
    - Room. A tenant that has nothing running, but an adapter that is ready, and is first in line, finds room within
      PATIENCE + max_num_seqs steps of its arrival: after PATIENCE steps without sequence slot or pages, each step
      preempts one request of the tenant that runs most. Only tenants that run no more than an equal share of the
      running requests, the newcomer counted in, are left alone.
    - Slots. A missing adapter that was passed over by MAX_BYPASS admissions gets the next slot that frees, and the
      longest resident adapters take no new requests until it has one. So it waits for the requests that run then.
      Adapters that came for waiting requests and have served none yet stay: they would only have to come again.

    Training takes no tokens of the budget: its rows ride through a step's decoder layers, as many layers as the
    step-time model says that the latency targets allow (TrainingShare).

    Seams. Asynchronous scheduling, schedule() before the
    previous commit(), needs: positions given to a step counted apart from num_computed, and a placeholder for the
    token not yet sampled; and the pins described in Residency. commit() already passes over requests that ended or
    were preempted meanwhile.
    """

    def __init__(
        self, config: SchedulerConfig, pages: PagePool, residency: Residency, training: TrainingShare | None = None
    ):
        if config.max_num_seqs < 1:
            raise InvalidRequest(f"max_num_seqs must be at least 1, got {config.max_num_seqs}.", param="max_num_seqs")
        if config.max_num_batched_tokens < config.max_num_seqs:
            raise InvalidRequest(
                f"max_num_batched_tokens must be at least max_num_seqs ({config.max_num_seqs}), so that every running "
                f"request can decode in one step; got {config.max_num_batched_tokens}.",
                param="max_num_batched_tokens",
            )
        self.config = config
        self.pages = pages
        self.residency = residency
        self.training = training or TrainingShare(TrainingConfig())
        self.num_preemptions = 0
        self._queue = WaitingQueue()
        self._running: list[Request] = []  # by priority, then in order of admission
        self._requests: dict[str, Request] = {}
        self._num_arrived = 0
        self._step = 0
        self._crowded = False  # the last admissions ended for want of a sequence slot or pages

    # Requests --------------------------------------------------------------------------------------------------

    def add(self, request: Request) -> None:
        """Queue a request. CapacityExceeded when it could not run even alone; InvalidRequest when its id is taken."""
        assert request.prompt_len > 0 and request.max_len >= request.prompt_len
        if request.id in self._requests:
            raise InvalidRequest(f"Request id {request.id!r} is in use by an unfinished request.", param="request_id")
        if self.pages.pages_for(request.max_len) > self.pages.num_pages:
            raise CapacityExceeded(
                f"The request may grow to {request.max_len} tokens, and the KV cache holds {self.pages.num_pages} "
                f"pages of {self.pages.page_size} = {self.pages.num_pages * self.pages.page_size} tokens."
            )
        if request.adapter is not None and request.adapted:
            self.residency.check(request.adapter)
        self._num_arrived += 1
        request.arrival = self._num_arrived
        self._requests[request.id] = request
        self._queue.arrive(request, self._step)
        if request.adapter is not None and request.adapted:
            self.residency.want(request.adapter.uid)

    def abort(self, request_id: str) -> Request | None:
        """End a request wherever it is; None when there is none of that id."""
        request = self._requests.get(request_id)
        if request is not None:
            self.finish(request, FinishReason.ABORT)
        return request

    def finish(self, request: Request, reason: FinishReason) -> None:
        """End a running or waiting request and free all it holds; its full pages stay in the prefix index."""
        assert self._requests.get(request.id) is request, request
        del self._requests[request.id]
        request.finish_reason = reason
        if request.pages:
            self._running.remove(request)
            self._release(request)
        else:
            self._unqueue(request)
        if not self._requests:
            self._queue.forget()

    def adapter_loaded(self, uid: int) -> None:
        """A move of some batch has completed."""
        self.residency.loaded(uid)

    def adapter_failed(self, uid: int) -> list[Request]:
        """A move could not be done: the adapter's waiting requests, finished with ERROR, for the caller to report."""
        self.residency.failed(uid)
        lane = self._queue.lanes.get(uid)
        failed = [] if lane is None else [request for *_, request in lane.entries]
        for request in failed:
            self.finish(request, FinishReason.ERROR)
        return failed

    @property
    def num_running(self) -> int:
        return len(self._running)

    @property
    def num_waiting(self) -> int:
        return len(self._queue)

    @property
    def running_adapters(self) -> tuple[str, ...]:
        """Names of the adapters with running requests, sorted."""
        return tuple(sorted(t.name for t in self._queue.tenants.values() if t.running and t.name is not None))

    @property
    def waiting_adapters(self) -> tuple[str, ...]:
        return tuple(sorted(t.name for t in self._queue.tenants.values() if t.waiting and t.name is not None))

    # Steps -----------------------------------------------------------------------------------------------------

    def schedule(self, work: TrainWork | None = None) -> Batch:
        """Plan one step. A batch without spans may have loads to start.

        work: what is left of the training pass in hand; the batch's `train` says how much of it to do.
        While there are requests, a batch without spans means that adapters are loading: nothing will change before
        adapter_loaded or adapter_failed.
        """
        self._step += 1
        batch = Batch(step=self._step)
        prefills: Buckets = {}
        decodes: Buckets = {}
        if self._crowded and self.config.fairness:
            self._make_room(batch)
        budget = self._token_budget()
        prefilling, budget = self._plan_decodes(batch, decodes, budget)
        for request in prefilling:
            if budget:
                budget -= self._plan_prefill(request, prefills, budget)
        self._admit(prefills, budget)
        self._start_loads(batch)
        batch.spans = _lay_out(prefills, decodes)
        batch.train = self.training.grant(batch, work, len(self._queue))
        return batch

    def commit(self, batch: Batch, sampled: Mapping[str, int]) -> None:
        """Record that a batch has run.

        sampled: a token for each span that samples, by request id. A request whose token is absent, as its sampling
        failed, must be finished before the next schedule().
        """
        page_size = self.pages.page_size
        for span in batch.spans:
            request, start = span.request, span.start
            if not request.pages or request.num_computed != start:
                continue  # it ended or was preempted meanwhile
            stop = start + span.length
            request.num_computed = stop
            if stop // page_size > start // page_size:
                self.pages.publish(request)
            if stop == len(request.tokens):
                token = sampled.get(request.id)
                if token is not None:
                    request.tokens.append(token)
                    self._queue.tenant(request).service += OUTPUT_COST
            if span.phase is Phase.PREFILL and request.slot is not None and not request.needs_adapter:
                self._unpin(request)

    def check_integrity(self) -> None:
        """Assert the invariants of the scheduler, its pages and its adapters."""
        self._queue.check_integrity()
        self.residency.check_integrity()
        self.pages.check_integrity(self._running)
        waiting = list(self._queue)
        assert len(self._running) <= self.config.max_num_seqs
        assert len(waiting) + len(self._running) == len(self._requests)
        assert all(self._requests[r.id] is r and r.finish_reason is None for r in [*waiting, *self._running])
        assert [r.priority for r in self._running] == sorted(r.priority for r in self._running)
        for request in waiting:
            assert not request.pages and not request.page_keys and not request.num_computed and request.slot is None
        pins: dict[int, int] = {}
        running = dict.fromkeys(self._queue.tenants, 0)
        for request in self._running:
            assert 0 <= request.num_computed < len(request.tokens) <= request.max_len
            assert len(request.pages) >= self.pages.pages_for(request.num_computed)
            assert (request.slot is not None) == request.needs_adapter
            running[self._queue.tenant(request).name] += 1
            if request.adapter is not None and request.slot is not None:
                pins[request.adapter.uid] = pins.get(request.adapter.uid, 0) + 1
        assert all(t.running == running[name] for name, t in self._queue.tenants.items())
        self.residency.check_pins(pins)

    # Planning --------------------------------------------------------------------------------------------------

    def _token_budget(self) -> int:
        """Tokens of this step."""
        return self.config.max_num_batched_tokens

    def _plan_decodes(self, batch: Batch, decodes: Buckets, budget: int) -> tuple[list[Request], int]:
        """Spans for all decodes, preempting from the end of the running as pages require.

        Returns the running requests still in prefill, in order, and the budget left. Pages are taken from requests
        not yet looked at, so never from one that has its span already.
        """
        running, pages, page_size = self._running, self.pages, self.pages.page_size
        no_slot = self.residency.max_slots
        prefilling = []
        i = num_decodes = 0
        while i < len(running):
            request = running[i]
            position = request.num_computed
            if position < request.prompt_len or position + 1 < len(request.tokens):
                prefilling.append(request)
            elif position < len(request.pages) * page_size or pages.extend(request, position + 1):
                slot = request.slot
                span = Span(request, position, 1, Phase.DECODE, slot)
                decodes.setdefault(no_slot if slot is None else slot, []).append(span)
                num_decodes += 1
            else:
                self._preempt(running[-1], batch)
                continue
            i += 1
        return prefilling, budget - num_decodes

    def _plan_prefill(self, request: Request, prefills: Buckets, budget: int) -> int:
        """A span of as many tokens as the budget allows; returns their number."""
        start = request.num_computed
        span = Span(request, start, min(len(request.tokens) - start, budget), Phase.PREFILL)
        if request.slot is not None and any(True for _ in span.segments()):
            span.slot = request.slot
        prefills.setdefault(self.residency.max_slots if span.slot is None else span.slot, []).append(span)
        return span.length

    def _admit(self, prefills: Buckets, budget: int) -> None:
        """Move waiting requests to the running ones while budget, sequence slots and pages last."""
        self._crowded = False
        if not len(self._queue) or not budget:
            return
        if len(self._running) >= self.config.max_num_seqs:
            self._crowded = True
            return
        heap = [(self._rank(lane), lane) for lane in self._open_lanes()]
        heapify(heap)
        while heap and budget:
            rank, lane = heappop(heap)
            if rank != (now := self._rank(lane)):  # its tenant was served through another lane
                heappush(heap, (now, lane))
                continue
            request = lane.head
            full = len(self._running) >= self.config.max_num_seqs
            if full or not self.pages.allocate(request, reserve=len(self._running)):
                self._crowded = True
                return
            self._start(request, lane.tenant)
            budget -= self._plan_prefill(request, prefills, budget)
            if lane.entries:
                heappush(heap, (self._rank(lane), lane))

    def _start_loads(self, batch: Batch) -> None:
        """Begin to load missing adapters in the order of their requests; an overdue one lets no equal pass."""
        residency, lanes = self.residency, self._queue.lanes
        overdue: set[Lane] = set()
        waiting: list[Lane] = []
        if residency.fits(0) or residency.can_close():
            overdue = {lanes[uid] for uid in residency.overdue(MAX_BYPASS)}
        if overdue or residency.fits(0):
            waiting = sorted((lanes[uid] for uid in residency.missing), key=self._rank)
        while waiting:
            first = next((lane for lane in waiting if lane in overdue), None)
            if first is not None and not residency.fits(first.nbytes):
                self._clear_slot(first)
            chosen = next(
                (
                    lane
                    for lane in waiting
                    if residency.fits(lane.nbytes)
                    and (first is None or lane is first or lane.head.priority < first.head.priority)
                ),
                None,
            )
            if chosen is None:
                break
            waiting.remove(chosen)
            assert chosen.ref is not None
            batch.loads.append(residency.load(chosen.ref))
        if not residency.any_overdue(MAX_BYPASS):
            residency.reopen()

    def _clear_slot(self, lane: Lane) -> None:
        """Close adapters to make way for the lane's, save those that requests of higher priority wait for, or of equal
        priority and in vain until now."""
        lanes, residency, priority = self._queue.lanes, self.residency, lane.head.priority

        def may_leave(uid: int) -> bool:
            if uid not in lanes:
                return True
            other = lanes[uid].head.priority
            return other > priority or (other == priority and not residency.fresh(uid))

        residency.make_way(lane.nbytes, may_leave)

    def _make_room(self, batch: Batch) -> None:
        """If the first in line is overdue, preempt the latest request of the tenant that runs most."""
        lane = min(self._open_lanes(), key=self._rank, default=None)
        if lane is None or not self._overdue(lane.tenant):
            return
        tenant, share = self._queue.tenant, self._share()
        victims = [r for r in reversed(self._running) if r.priority >= lane.head.priority and tenant(r).running > share]
        if victims:
            self._preempt(max(victims, key=lambda r: tenant(r).running), batch)

    def _share(self) -> int:
        """Requests that each tenant could run if all that run and one more had equally many, rounded up."""
        return -(-len(self._running) // (1 + sum(1 for t in self._queue.tenants.values() if t.running)))

    def _open_lanes(self) -> list[Lane]:
        """Lanes whose requests could start now, as far as adapters are concerned."""
        queue = self._queue
        return [*queue.free.values(), *(queue.lanes[uid] for uid in self.residency.open() if uid in queue.lanes)]

    def _rank(self, lane: Lane) -> Rank:
        """Order of admission; no two lanes are equal."""
        head = lane.head
        service = lane.tenant.service if self.config.fairness else 0
        return (head.priority, not self._overdue(lane.tenant), not head.num_preemptions, service, head.arrival)

    def _overdue(self, tenant: Tenant) -> bool:
        return self.config.fairness and not tenant.running and self._step - tenant.since >= PATIENCE

    # Changes of state ------------------------------------------------------------------------------------------

    def _start(self, request: Request, tenant: Tenant) -> None:
        """A waiting request that has its pages begins to run."""
        if request.adapter is not None and request.needs_adapter:
            request.slot = self.residency.pin(request.adapter.uid)
        self._unqueue(request)
        insort(self._running, request, key=_by_priority)
        tenant.running += 1
        if not request.num_preemptions:
            request.num_cached = request.num_computed
            tenant.service += PROMPT_COST * (len(request.tokens) - request.num_computed)

    def _preempt(self, request: Request, batch: Batch) -> None:
        """Take everything but its tokens from a running request and queue it again at its old place."""
        self._running.remove(request)
        self._release(request)
        request.num_preemptions += 1
        self.num_preemptions += 1
        self._queue.push(request)
        if request.adapter is not None and request.adapted:
            self.residency.want(request.adapter.uid)
        batch.preempted.append(request)

    def _release(self, request: Request) -> None:
        """Free what a request holds by running."""
        self.pages.free(request)
        if request.slot is not None:
            self._unpin(request)
        tenant = self._queue.tenant(request)
        tenant.running -= 1
        if not tenant.running:
            tenant.since = self._step

    def _unpin(self, request: Request) -> None:
        assert request.adapter is not None
        self.residency.unpin(request.adapter.uid)
        request.slot = None

    def _unqueue(self, request: Request) -> None:
        self._queue.remove(request)
        adapter = request.adapter
        if adapter is not None and request.adapted and adapter.uid not in self._queue.lanes:
            self.residency.unwant(adapter.uid)


def _lay_out(*phases: Buckets) -> list[Span]:
    """Spans along the token axis: phase by phase, within each by adapter slot."""
    return [span for buckets in phases for slot in sorted(buckets) for span in buckets[slot]]
