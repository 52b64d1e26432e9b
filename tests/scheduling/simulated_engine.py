"""An engine without a model: runs the real scheduler against simulated KV pages and device slots.

The KV of a position is simulated as a number that depends, as real KV does, on all tokens up to there and on the
adapter that acted on each of them. Steps read it from the pages, so a page with anything else in it, stale, foreign
or computed under another adapter, changes what follows. `reference` computes the same without pages or scheduler.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from multigraft.core.batch import AdapterMove, Batch, Phase
from multigraft.core.config import SchedulerConfig
from multigraft.core.region import FromInvocation, PromptEnds
from multigraft.core.request import AdapterRef, FinishReason, Request, SamplingParams, Scope
from multigraft.kvcache.pages import PagePool
from multigraft.scheduling.residency import AdapterState, Residency
from multigraft.scheduling.scheduler import Scheduler

STOP_TOKEN = 0
VOCABULARY = 9
MODULUS = 2**61 - 1


def kv_after(kv: int, token: int, uid: int) -> int:
    """KV of a position from that of the one before; uid: adapter that acts on it, 0 for none."""
    return (kv * 1_000_003 + token * 8_191 + uid * 131 + 7) % MODULUS


def next_token(kv: int) -> int:
    return kv // 1_009 % VOCABULARY


def uid_at(request: Request, position: int) -> int:
    """Adapter that ought to act on a position. Written out again here, not taken from Request.adapted."""
    if request.adapter is None or (request.adapter.scope is Scope.PREFILL and position >= request.prompt_len):
        return 0
    region, n = request.adapter.region, request.prompt_len
    acts = True
    if isinstance(region, PromptEnds):
        acts = position < n and (position < region.first or position >= n - region.last)
    elif isinstance(region, FromInvocation):
        width = len(region.tokens)
        starts = [i for i in range(n - width + 1) if tuple(request.tokens[i : i + width]) == region.tokens]
        acts = bool(starts) and position >= starts[-1]
    return request.adapter.uid if acts else 0


def reference(request: Request) -> list[int]:
    """The output that the request must have, whatever happens around it."""
    tokens = request.tokens[: request.prompt_len]
    kv = 0
    for position, token in enumerate(tokens):
        kv = kv_after(kv, token, uid_at(request, position))
    while len(tokens) < request.max_len:
        tokens.append(next_token(kv))
        if tokens[-1] == STOP_TOKEN and not request.sampling.ignore_eos:
            break
        kv = kv_after(kv, tokens[-1], uid_at(request, len(tokens) - 1))
    return tokens[request.prompt_len :]


def make_request(
    id: str,
    prompt: Sequence[int],
    new: int,
    adapter: AdapterRef | None = None,
    priority: int = 0,
    **sampling: int | bool,
) -> Request:
    return Request(
        id, prompt, SamplingParams(**sampling), max_len=len(prompt) + new, adapter=adapter, priority=priority
    )


class SimulatedEngine:
    def __init__(
        self,
        *,
        num_pages: int = 64,
        page_size: int = 4,
        max_slots: int = 2,
        max_bytes: int = 100,
        max_num_seqs: int = 8,
        budget: int = 32,
        fairness: bool = True,
        prefix_caching: bool = True,
        latency: Callable[[AdapterRef], int] = lambda ref: 0,
        corrupt: Callable[[AdapterRef], bool] = lambda ref: False,
    ):
        """latency: steps a load takes, 0: ready before the next step. corrupt: whether a load fails."""
        pages = PagePool(num_pages, page_size, prefix_caching)
        config = SchedulerConfig(max_num_seqs=max_num_seqs, max_num_batched_tokens=budget, fairness=fairness)
        self.scheduler = Scheduler(config, pages, Residency(max_slots, max_bytes))
        self.latency, self.corrupt = latency, corrupt
        self.kv: list[list[int | None]] = [[None] * page_size for _ in range(num_pages)]
        self.device: dict[int, AdapterRef] = {}
        self.loads: list[tuple[int, AdapterMove]] = []
        self.live: dict[str, Request] = {}
        self.done: dict[str, Request] = {}
        self.steps = 0
        self.trace: list[object] = []
        """Every decision taken, to compare runs."""

    def add(self, request: Request) -> Request:
        self.scheduler.add(request)
        self.live[request.id] = request
        return request

    def abort(self, request_id: str) -> None:
        request = self.scheduler.abort(request_id)
        assert (request is not None) == (request_id in self.live)
        if request is not None:
            assert request.finish_reason is FinishReason.ABORT
            self._end(request)

    def step(self, between: Callable[[Batch], None] = lambda batch: None, fail: bool = False) -> Batch:
        """One turn of the engine's loop. between: called after schedule(). fail: the step breaks after its writes."""
        self._complete_loads()
        running = {id for id, request in self.live.items() if request.pages}
        batch = self.scheduler.schedule()
        self.steps += 1
        self._record(batch)
        self._check_layout(batch, running - {request.id for request in batch.preempted})
        self.scheduler.check_integrity()
        for move in batch.loads:
            self._begin_load(move)
        assert batch or self.loads or not self.live, "nothing runs and nothing loads, yet requests wait"
        between(batch)
        sampled = self._execute(batch)
        if fail:
            for span in batch.spans[::2]:
                if span.request.id in self.live:
                    self._finish(span.request, FinishReason.ERROR)
        else:
            self.scheduler.commit(batch, sampled)
            for span in batch.spans:
                if span.request.id in self.live:
                    self._stop(span.request)
        self.scheduler.check_integrity()
        return batch

    def run(self, max_steps: int = 5_000) -> None:
        """Until nothing is left; an assertion fails when that takes more than max_steps."""
        for _ in range(max_steps):
            if not self.live:
                break
            self.step()
        assert not self.live, f"unfinished after {max_steps} steps: {list(self.live.values())[:5]}"
        self.check_empty()

    def check_empty(self) -> None:
        scheduler = self.scheduler
        assert not scheduler.num_running and not scheduler.num_waiting
        assert not scheduler.running_adapters and not scheduler.waiting_adapters
        assert scheduler.pages.num_free == scheduler.pages.num_pages
        scheduler.pages.check_integrity([])
        scheduler.residency.check_pins({})
        assert not scheduler.residency.missing
        scheduler.check_integrity()

    # ---------------------------------------------------------------------------------------------------------

    def _execute(self, batch: Batch) -> dict[str, int]:
        """Run spans of live requests; requests that ended after schedule() have lost their pages already."""
        page_size = self.scheduler.pages.page_size
        written: set[tuple[int, int]] = set()
        sampled = {}
        for span in batch.spans:
            request = span.request
            if request.id not in self.live:
                continue
            self._check_readable(request, span.start)
            kv = 0 if span.start == 0 else self._cell(request, span.start - 1)
            rows = {span.start + row for lo, hi in span.segments() for row in range(lo, hi)}
            for position in range(span.start, span.stop):
                uid = 0
                if position in rows:
                    assert span.slot is not None, "adapted positions without a slot"
                    uid = self.device[span.slot].uid
                    assert self.scheduler.residency.state(uid) is AdapterState.READY
                kv = kv_after(kv, request.tokens[position], uid)
                place = (request.pages[position // page_size], position % page_size)
                assert place not in written, "two spans write one place"
                written.add(place)
                self.kv[place[0]][place[1]] = kv
            assert rows or span.slot is None, "a slot without adapted positions"
            if span.samples:
                sampled[request.id] = next_token(kv)
        return sampled

    def _cell(self, request: Request, position: int) -> int:
        page_size = self.scheduler.pages.page_size
        kv = self.kv[request.pages[position // page_size]][position % page_size]
        assert kv is not None, "a page that was never written"
        return kv

    def _check_readable(self, request: Request, stop: int) -> None:
        """Every position that the step attends to holds the KV of this very sequence."""
        kv = 0
        for position in range(stop):
            kv = kv_after(kv, request.tokens[position], uid_at(request, position))
            assert self._cell(request, position) == kv, (request, position)

    def _check_layout(self, batch: Batch, continued: set[str]) -> None:
        """continued: requests that were running before this step, too."""
        config = self.scheduler.config
        assert batch.num_tokens <= config.max_num_batched_tokens
        assert self.scheduler.num_running <= config.max_num_seqs
        order = [(s.phase, s.slot is None, s.slot or 0) for s in batch.spans]
        assert order == sorted(order), "phases in order, slots grouped, spans without adapter last"
        assert len({s.request.id for s in batch.spans}) == len(batch.spans)
        for span in batch.spans:
            request = span.request
            last = span.start >= request.prompt_len and span.start == len(request.tokens) - 1
            decode = last and request.id in continued
            assert span.phase is (Phase.DECODE if decode else Phase.PREFILL)
            assert span.start == request.num_computed and 1 <= span.length <= len(request.tokens) - span.start
            assert len(request.pages) * self.scheduler.pages.page_size >= span.stop

    def _record(self, batch: Batch) -> None:
        spans = [(s.request.id, s.start, s.length, s.phase.name, s.slot, tuple(s.request.pages)) for s in batch.spans]
        loads = [(m.ref.uid, m.slot, m.empties) for m in batch.loads]
        self.trace.append((spans, loads, [r.id for r in batch.preempted]))

    def _begin_load(self, move: AdapterMove) -> None:
        for slot in move.empties:
            del self.device[slot]
        assert move.slot not in self.device and 0 <= move.slot < self.scheduler.residency.max_slots
        self.device[move.slot] = move.ref
        assert sum(ref.nbytes for ref in self.device.values()) <= self.scheduler.residency.max_bytes
        self.loads.append((self.steps + self.latency(move.ref), move))

    def _complete_loads(self) -> None:
        due = [move for when, move in self.loads if when <= self.steps]
        self.loads = [(when, move) for when, move in self.loads if when > self.steps]
        for move in due:
            if self.corrupt(move.ref):
                del self.device[move.slot]
                for request in self.scheduler.adapter_failed(move.ref.uid):
                    assert request.finish_reason is FinishReason.ERROR
                    self._end(request)
            else:
                self.scheduler.adapter_loaded(move.ref.uid)

    def _stop(self, request: Request) -> None:
        if request.num_output and request.tokens[-1] == STOP_TOKEN and not request.sampling.ignore_eos:
            self._finish(request, FinishReason.STOP)
        elif len(request.tokens) == request.max_len:
            self._finish(request, FinishReason.LENGTH)

    def _finish(self, request: Request, reason: FinishReason) -> None:
        self.scheduler.finish(request, reason)
        self._end(request)

    def _end(self, request: Request) -> None:
        del self.live[request.id]
        self.done[request.id] = request
        assert not request.pages and request.slot is None
        output = reference(request)
        if request.finish_reason in (FinishReason.STOP, FinishReason.LENGTH):
            assert request.output == output
        else:
            assert request.output == output[: request.num_output]
