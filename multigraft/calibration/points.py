"""Designed steps: small groups of requests that make the engine take steps of many shapes."""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from functools import partial
from random import Random

from multigraft.core.batch import Batch, TrainPart
from multigraft.core.config import TrainingConfig
from multigraft.core.region import Scope
from multigraft.core.request import AdapterRef, Output, Request, SamplingParams
from multigraft.engine.core import EngineCore, Submission
from multigraft.engine.detokenize import Detokenizer
from multigraft.scheduling.steptime import StepShape
from multigraft.scheduling.training import TrainingShare, TrainWork
from multigraft.twin.workload import LEAST_TOKEN

Timed = tuple[StepShape, float]
MAX_NEW = 4096
"""Prompt tokens that a point of requests that come together computes, at most; and no more than fit one step, so that
no point takes long."""
MAX_OUTPUT = 10
SPREADS = (0, 0, 2, 8) * 3 + (32,)
"""Steps over which the requests of a point arrive. Where these are many, as in a server under load, requests stay for
about as many more steps, and more prompt tokens are computed in all."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """One request of a point."""

    at: int
    """Steps after the point's first one."""
    context: int
    """Prompt tokens whose KV is in the pages already; a multiple of the page size."""
    new: int
    """Prompt tokens to compute."""
    output: int
    adapter: str | None
    scope: Scope


def draw_point(rng: Random, adapters: Sequence[Sequence[str]], core: EngineCore) -> list[Plan]:
    """Sizes are log-uniform, so that small steps and large ones are met alike.

    adapters: names, grouped by rank. What a point holds at once takes at most half of the KV pages and the adapters'
    memory.
    """
    parts = core.parts
    page, limit = parts.config.cache.page_size, parts.max_model_len
    spread = rng.choice(SPREADS)
    kv_left = parts.kv_tokens // 2
    new_left = min(MAX_NEW, parts.config.scheduler.max_num_batched_tokens) * (1 + spread // 4)
    rows = _log_uniform(rng, 1, parts.config.scheduler.max_num_seqs)
    context = rng.choice([0, _log_uniform(rng, page, limit)])
    new = _log_uniform(rng, 1, limit)
    names = _draw_adapters(rng, adapters, core, rows)
    plans = []
    for i in range(rows):
        output = rng.randrange(2, MAX_OUTPUT + (spread if spread > MAX_OUTPUT else 0))
        most = limit - output - 1
        mine = min(most, max(1, round(new * rng.uniform(0.5, 1.5))), max(1, new_left))
        before = min(most - mine, round(context * rng.uniform(0.5, 1.5)), max(0, kv_left - mine)) // page * page
        if kv_left < mine + output:
            break
        kv_left -= before + mine + output
        new_left -= mine
        name = rng.choice(names) if names else None
        scope = rng.choice([Scope.ALL, Scope.ALL, Scope.PREFILL])
        at = rng.randrange(spread + 1) if i else 0
        plans.append(Plan(at=at, context=before, new=mine, output=output, adapter=name, scope=scope))
    return sorted(plans, key=lambda p: p.at)


def _draw_adapters(rng: Random, adapters: Sequence[Sequence[str]], core: EngineCore, rows: int) -> list[str]:
    """Up to one for each row, of one rank or of all of them; none every fourth time."""
    if rng.random() < 0.25:
        return []
    parts = core.parts
    pool = list(rng.choice(adapters)) if rng.random() < 0.5 else [name for group in adapters for name in group]
    names, left = [], parts.bank.capacity_bytes
    for name in rng.sample(pool, min(len(pool), parts.bank.max_slots, _log_uniform(rng, 1, max(1, rows)))):
        left -= parts.store.resolve(name).nbytes
        if left >= 0:
            names.append(name)
    return names


def _log_uniform(rng: Random, low: int, high: int) -> int:
    return min(high, round(math.exp(rng.uniform(math.log(low), math.log(high + 1)))))


class DesignedShare(TrainingShare):
    """Grants training parts at random, and keeps what the engine's clock tells of them."""

    def __init__(self, rng: Random):
        super().__init__(TrainingConfig())
        self._timed: list[Timed] = []
        self._rng = rng

    def grant(self, batch: Batch, work: TrainWork | None, num_waiting: int) -> TrainPart | None:
        if work is None or self._rng.random() < 0.2:
            return None
        return work.part(_log_uniform(self._rng, 1, work.forward + work.backward))

    def observe(self, shape: StepShape, seconds: float) -> None:
        self._timed.append((shape, seconds))

    def take(self) -> list[Timed]:
        """Those since the last call."""
        timed, self._timed = self._timed, []
        return timed


class PointRunner:
    """Runs points one after the other on a started engine, and times their steps. The engine's observer."""

    def __init__(self, core: EngineCore, rng: Random):
        self.core, self.rng = core, rng
        self.launches: list[float] = []
        """Seconds of the turns that began a step and took none in."""
        self._begun: float | None = None
        """When the step was scheduled that nothing was heard of yet."""
        self._timed: list[Timed] = []
        self._shapes: deque[StepShape] = deque()
        self._plans: deque[tuple[int, Submission]] = deque()
        self._step = self._left = self._num = 0
        self._contexts: dict[str, int] = {}
        """By request id, until the request is submitted."""
        self._done: Future[None] = Future()
        core.observer = self

    def warm_up(self, names: Sequence[str]) -> None:
        """Have the adapters on the device."""
        plans = [Plan(at=0, context=0, new=1, output=1, adapter=name, scope=Scope.ALL) for name in names]
        if plans:
            self.run(plans)

    def run(self, plans: Sequence[Plan]) -> list[Timed]:
        """The steps that a point took. Its adapters should be on the device."""
        submissions = [(plan.at, self._submission(plan)) for plan in plans]
        self._timed, self._done = [], Future()
        self.core.post(partial(self._begin, submissions))
        self._done.result(300)
        return self._timed

    # On the engine's thread ------------------------------------------------------------------------------------

    def _begin(self, submissions: list[tuple[int, Submission]]) -> None:
        for _, submission in submissions:
            self._remember(submission.request)
        self._plans, self._step, self._left = deque(submissions), 0, len(submissions)
        self._shapes.clear()
        self._submit_due()

    def _submit_due(self) -> None:
        while self._plans and self._plans[0][0] <= self._step:
            self.core.submit(self._plans.popleft()[1])

    def scheduled(self, batch: Batch) -> None:
        now = time.monotonic()
        if self._begun is not None:
            self.launches.append(now - self._begun)
        self._begun = now if batch else None
        if batch:
            self._shapes.append(StepShape.of(batch))
        self._step = self._step + 1 if batch else max(self._step, self._plans[0][0] if self._plans else 0)
        self._submit_due()

    def ran(self, batch: Batch, seconds: float) -> None:
        self._begun = None
        if self._shapes:
            self._timed.append((self._shapes.popleft(), seconds))

    def _sink(self, output: Output) -> None:
        if output.error is not None:
            self._done.set_exception(output.error)
        elif output.finish_reason is not None:
            self._left -= 1
            if not self._left:
                self.core.post(partial(self.core.post, partial(self._done.set_result, None)))  # after the next turn

    def _remember(self, request: Request) -> None:
        """Let the prefix index hold the request's context, as if it had been computed."""
        pages, context = self.core.scheduler.pages, self._contexts.pop(request.id)
        ghost = Request("ghost", request.tokens[:context], request.sampling, max_len=max(1, context))
        ghost.adapter, ghost.adapted, ghost.cacheable = request.adapter, request.adapted, request.cacheable
        if context and pages.allocate(ghost):
            ghost.num_computed = context
            pages.publish(ghost)
            pages.free(ghost)

    # ---------------------------------------------------------------------------------------------------------

    def _submission(self, plan: Plan) -> Submission:
        parts = self.core.parts
        self._num += 1
        tokens = self.rng.choices(range(LEAST_TOKEN, parts.vocab_size), k=plan.context + plan.new)
        sampling = SamplingParams(max_tokens=plan.output, ignore_eos=True)
        request = Request(
            f"point-{self._num}", tokens, sampling, max_len=len(tokens) + plan.output, adapter=self._acquire(plan)
        )
        self._contexts[request.id] = plan.context
        detokenizer = Detokenizer(parts.tokenizer, tokens, sampling) if parts.tokenizer else None
        return Submission(request, self._sink, detokenizer=detokenizer)

    def _acquire(self, plan: Plan) -> AdapterRef | None:
        if plan.adapter is None:
            return None
        ref = self.core.parts.store.resolve(plan.adapter).scoped(plan.scope)
        self.core.parts.store.acquire(ref)
        return ref
