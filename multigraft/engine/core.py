"""The engine's loop: ask scheduling for a batch, run it, sample, hand the results out.

One thread owns everything mutable here. Other threads talk to it by `post` (a function that runs between two steps)
and hear from it through each submission's sink.
"""

from __future__ import annotations

import gc
import logging
import os
import threading
import time
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from typing import Protocol

import torch

from multigraft.core.batch import Batch, Span
from multigraft.core.errors import InvalidLogits, InvalidRequest, MultigraftError, ShuttingDown
from multigraft.core.request import PENDING, FinishReason, Output, Request, TokenLogprobs
from multigraft.engine.adapter_loads import AdapterLoads
from multigraft.engine.client import EngineStats
from multigraft.engine.detokenize import Detokenizer, check_stop
from multigraft.engine.logprobs import prompt_logprobs
from multigraft.engine.neighbours import Neighbours
from multigraft.engine.parts import EngineParts
from multigraft.engine.sampler import Launched, Sampled
from multigraft.engine.step_clock import StepClock
from multigraft.engine.structured import Matcher, token_masks
from multigraft.models.runner import LateTokens, StepOutput
from multigraft.scheduling.steptime import StepShape

log = logging.getLogger(__name__)

MAX_CONSECUTIVE_FAILURES = 3
"""A step that raises fails its own requests; so many in a row mean that the engine itself is broken."""

Sink = Callable[[Output], None]


@dataclass(slots=True)
class Submission:
    """A request with what the engine needs beyond scheduling: where its output goes and how it is decoded."""

    request: Request
    sink: Sink
    index: int = 0
    detokenizer: Detokenizer | None = None
    """None: the engine has no tokenizer, outputs are token ids only."""
    matcher: Matcher | None = None
    prompt_logprobs: list[TokenLogprobs | None] | None = None
    admitted: bool = False
    """Whether the sampler knows it."""
    submitted_at: float = 0.0
    queue_seconds: float | None = None
    """From submission to the first step that had rows of it."""
    announced: bool = False
    """Whether an Output with the prompt's data went out."""


@dataclass(slots=True)
class _InFlight:
    """A step whose results are still to be collected."""

    batch: Batch
    output: StepOutput
    spans: list[Span]
    """Those that sample."""
    live: list[Submission]
    """Theirs."""
    launched: Launched | None


class StepObserver(Protocol):
    """Hears of every step, on the engine's thread."""

    def scheduled(self, batch: Batch) -> None:
        """What was decided, before it runs; also without spans."""
        ...

    def ran(self, batch: Batch, seconds: float) -> None:
        """Its results are in. seconds: of the turn of the loop that took them in, from schedule() to schedule(); while
        there is work, these add up to the time that has passed."""
        ...


@dataclass(slots=True)
class Counters:
    prompt_tokens: int = 0
    generation_tokens: int = 0
    adapter_loads: int = 0
    adapter_load_seconds: float = 0.0
    steps: int = 0
    load_started: dict[int, float] = field(default_factory=dict)


class EngineCore:
    """Runs `parts` on a thread of its own from `start()` to `stop()`.

    step_end: called on the engine's thread after each step in which a sink was given something.
    """

    def __init__(self, parts: EngineParts, step_end: Callable[[], None] | None = None):
        self.parts = parts
        self.scheduler = parts.scheduler
        self.step_end = step_end
        self.trainer = parts.trainer
        self.observer: StepObserver | None = None
        self.counters = Counters()
        # Of the share that the scheduler has then: calibration puts another in its place for a while.
        self._clock = StepClock(parts.loaded.device, lambda *step: self.scheduler.training.observe(*step))
        self.error: BaseException | None = None
        self._fatal: MultigraftError | None = None
        self._live: dict[str, Submission] = {}
        self._inbox: deque[Callable[[], None]] = deque()
        self._wake = threading.Event()
        self._stopping = False
        self._ended = False
        self._posting = threading.Lock()
        self._loads = AdapterLoads(parts, self.counters, self.post, self._adapter_failed)
        self._in_flight: _InFlight | None = None
        """On a GPU: the step that runs while the host schedules the next one."""
        self._collected: Batch | None = None
        """In this turn of the loop."""
        self._turn_began = 0.0
        self._failures = 0
        self._emitted = False
        self._thread = threading.Thread(target=self._run, name="multigraft-engine", daemon=True)

    # From any thread -------------------------------------------------------------------------------------------

    def start(self) -> None:
        gc.freeze()  # else a full collection looks through all of torch, and stops the loop for 0.4 s now and then
        self._thread.start()
        if self.parts.ranks is not None:
            self.parts.ranks.on_loss(self.fail)

    def fail(self, error: MultigraftError) -> None:
        """End the engine: what runs fails with the error."""
        self._fatal = error
        self._wake.set()

    def post(self, function: Callable[[], None]) -> bool:
        """Run `function` on the engine's thread, soon; False when that has ended."""
        with self._posting:
            if self._ended:
                return False
            self._inbox.append(function)
        self._wake.set()
        return True

    def submit(self, submission: Submission) -> None:
        """Queue a request whose adapter, if any, was acquired from the store; its last Output has a finish_reason."""
        if self.error is not None or self._stopping:
            if submission.request.adapter is not None:
                self.parts.store.release(submission.request.adapter)
            raise self._fatal or ShuttingDown("The engine has stopped and takes no requests.")
        submission.submitted_at = time.monotonic()
        self.post(partial(self._add, submission))

    def abort(self, request_id: str) -> None:
        """Stop a request if it still runs; its sink gets an Output with FinishReason.ABORT."""
        self.post(partial(self._abort, request_id))

    def stop(self, timeout: float | None = None) -> None:
        """Abort what runs and end the thread."""
        self._stopping = True
        self._wake.set()
        gc.unfreeze()
        if self._thread.is_alive() and threading.current_thread() is not self._thread:
            self._thread.join(timeout)

    @property
    def num_live(self) -> int:
        """Requests submitted and not yet finished."""
        return len(self._live) + len(self._inbox)

    @property
    def healthy(self) -> bool:
        return self.error is None and self._thread.is_alive()

    def stats(self) -> EngineStats:
        s, c = self.scheduler, self.counters
        return EngineStats(
            num_running=s.num_running,
            num_waiting=s.num_waiting,
            kv_cache_usage=s.pages.usage,
            prompt_tokens=c.prompt_tokens,
            generation_tokens=c.generation_tokens,
            preemptions=s.num_preemptions,
            prefix_cache_queries=s.pages.num_queries,
            prefix_cache_hits=s.pages.num_hits,
            max_loras=self.parts.config.adapters.max_loras,
            running_adapters=tuple(s.running_adapters),
            waiting_adapters=tuple(s.waiting_adapters),
            slots_used=s.residency.num_used,
            adapter_loads=c.adapter_loads,
            adapter_load_seconds=c.adapter_load_seconds,
            steps=c.steps,
            collectives=dict(self.parts.ranks.group.counts) if self.parts.ranks else {},
        )

    # On the engine's thread ------------------------------------------------------------------------------------

    def _run(self) -> None:
        neighbours = Neighbours() if self._adapts_threads() else None
        try:
            while not self._stopping:
                self._wake.clear()
                if self._fatal is not None:
                    raise self._fatal
                while self._inbox:
                    self._inbox.popleft()()
                self._loads.finish()
                self._end_turn()
                batch = self.scheduler.schedule(self.trainer.work())
                if self.observer is not None:
                    self.observer.scheduled(batch)
                for move in batch.loads:
                    self._loads.start(move)
                if batch or batch.train is not None or self._in_flight is not None:
                    if neighbours is not None:
                        neighbours.look()
                    self._timed_step(batch)
                self._flush()
                if not batch and batch.train is None and self._in_flight is None:
                    self._end_turn()  # without the wait
                    self._clock.idle()
                    self._wake.wait(0.001 if self._loads.copying else 1.0)
        except BaseException as error:
            self.error = self.parts.ranks.blame(error) if self.parts.ranks else error
            log.exception("The engine has died")
        finally:
            reason = self.error if isinstance(self.error, MultigraftError) else ShuttingDown("The engine has stopped.")
            with self._posting:
                self._ended = True
            while self._inbox:  # what was posted is begun, so that it ends like the rest
                try:
                    self._inbox.popleft()()
                except Exception:  # of a device or a rank that is lost; whoever waits is told so below
                    log.exception("What was posted last failed")
            self.trainer.stop_all()
            for submission in list(self._live.values()):
                self._end(submission, FinishReason.ABORT, error=reason)
            self._flush()
            if self.parts.ranks is not None:
                self.parts.runner.drop_graphs()
                self.parts.ranks.close()
            with suppress(RuntimeError):  # of a device that is lost
                self._loads.wait()

    def _end_turn(self) -> None:
        now, batch = time.monotonic(), self._collected
        if self.observer is not None and batch is not None:
            self.observer.ran(batch, now - self._turn_began)
        self._turn_began, self._collected = now, None

    def _flush(self) -> None:
        if self._emitted and self.step_end is not None:
            self.step_end()
        self._emitted = False

    def _timed_step(self, batch: Batch) -> None:
        """While there are jobs, steps are timed: their training part is sized by what steps took."""
        if not self.trainer.num_jobs:
            self._clock.idle()
            self._guarded_step(batch)
            return
        shape = StepShape.of(batch)
        self._clock.begin()
        self._guarded_step(batch)
        self._clock.end(shape)

    def _adapts_threads(self) -> bool:
        """On the CPU, in one process, and unless the user has said how many threads."""
        return self.parts.loaded.device.type == "cpu" and not self.parts.ranks and "OMP_NUM_THREADS" not in os.environ

    def _guarded_step(self, batch: Batch) -> None:
        try:
            self._step(batch)
            self._failures = 0
        except Exception as error:
            if self.parts.ranks is not None:
                raise  # the other ranks may be anywhere in the step
            if self.trainer.rides and batch.train is not None and batch.train.forward:
                batch.train = None  # nothing was committed: the requests' rows go again, alone
                self._guarded_step(batch)
                self.trainer.abandon(error, guilty=not self._failures)
                return
            self._failures += 1
            log.exception("A step failed; its %d requests fail with it", len(batch.spans))
            if self._failures >= MAX_CONSECUTIVE_FAILURES:
                raise
            for span in batch.spans:
                if span.request.id in self._live:
                    self._end(self._live[span.request.id], FinishReason.ERROR, error=error)

    def _step(self, batch: Batch) -> None:
        """Launch a batch, then finish the step in flight, whose results the device has had time to compute.

        If nothing in the batch needs its tokens on the host first, it stays in flight in turn: it is committed with
        PENDING tokens, and the next step takes them from the device. A request that turns out to have ended has
        computed one row too many.
        """
        before, self._in_flight = self._in_flight, None
        step = None
        try:
            if batch:
                step = self._launch(batch, before)
        finally:
            if before is not None:
                self._collect(before, committed=True)
        if step is not None:
            self._finish(step)
        if batch.train is not None:
            self._flush()
            self.trainer.run(batch.train, ridden=bool(batch))

    def _finish(self, step: _InFlight) -> None:
        batch = step.batch
        self.counters.steps += 1
        if not self._may_lag(step):
            self._collect(step, committed=False)
            return
        self._in_flight = step
        self.scheduler.commit(batch, {s.request.id: PENDING for s in step.spans})
        for submission in step.live:
            request = submission.request
            if len(request.tokens) == request.max_len and request.finish_reason is None:
                self.scheduler.finish(request, FinishReason.LENGTH)  # nothing is to be scheduled any more

    def _launch(self, batch: Batch, before: _InFlight | None) -> _InFlight:
        parts = self.parts
        now = time.monotonic()
        for span in batch.spans:
            submission = self._live[span.request.id]
            if submission.queue_seconds is None:
                submission.queue_seconds = now - submission.submitted_at
        late = None
        if before is not None and before.launched is not None:
            late = LateTokens(before.launched.tokens, {s.request.id: i for i, s in enumerate(before.spans)})
        output = parts.runner.execute(batch, late, self.trainer.riding(batch.train))
        spans = [span for span in batch.spans if span.samples]
        live = [self._live[span.request.id] for span in spans]
        launched = None
        if live:
            launched = parts.sampler.launch(
                output.logits[: output.num_sampled],
                [span.request for span in spans],
                token_masks([s.matcher for s in live]),
            )
        return _InFlight(batch, output, spans, live, launched)

    def _may_lag(self, step: _InFlight) -> bool:
        if self.parts.loaded.device.type == "cpu" or step.output.scored:
            return False
        live = [s for s in step.live if self._live.get(s.request.id) is s]  # the others ended with the step before
        return all(s.matcher is None and self.parts.sampler.may_lag(s.request) for s in live)

    def _collect(self, step: _InFlight, committed: bool) -> None:
        """Hand a step's results out. committed: the scheduler has it, with PENDING tokens."""
        parts, output = self.parts, step.output
        self._collected = step.batch
        results: list[Sampled | InvalidLogits] = []
        if step.launched is not None:
            results = parts.sampler.collect(step.launched)
            if self._fatal is not None:
                raise self._fatal  # what the collectives of the step gave is void
        unscored: dict[str, InvalidLogits] = {}
        row = output.num_sampled
        for i, first, num in output.scored:
            request = step.batch.spans[i].request
            try:
                self._score_prompt(request, output.logits[row : row + num], first)
            except InvalidLogits as error:
                unscored[request.id] = error
            row += num
        sampled = [(s, r) for s, r in zip(step.spans, results, strict=True) if isinstance(r, Sampled)]
        if not committed:
            self.scheduler.commit(step.batch, {span.request.id: result.token for span, result in sampled})
        for span, result in sampled if committed else ():
            if span.request.tokens[-1] == PENDING:
                span.request.tokens[-1] = result.token
        for request_id, error in unscored.items():
            self._end(self._live[request_id], FinishReason.ERROR, error=error)
        for submission, result in zip(step.live, results, strict=True):
            if self._live.get(submission.request.id) is not submission:
                continue  # it ended meanwhile
            if isinstance(result, Sampled):
                self._advance(submission, result)
            else:
                self._end(submission, FinishReason.ERROR, error=result)

    def _score_prompt(self, request: Request, logits: torch.Tensor, first: int) -> None:
        submission = self._live[request.id]
        k = request.sampling.prompt_logprobs
        assert k is not None
        if submission.prompt_logprobs is None:
            submission.prompt_logprobs = [None]
        known = submission.prompt_logprobs
        if first + 1 < len(known):  # replayed after a preemption
            logits, first = logits[len(known) - 1 - first :], len(known) - 1
        targets = torch.tensor(request.tokens[first + 1 : first + 1 + len(logits)], device=logits.device)
        known += prompt_logprobs(logits, targets, k)

    def _advance(self, submission: Submission, sampled: Sampled) -> None:
        """Give a new token to its reader, and end the request if the token ends it."""
        request = submission.request
        sampling = request.sampling
        self.counters.generation_tokens += 1
        reason, stop = check_stop(request, sampled.token, self.parts.eos_token_ids)
        if submission.matcher is not None and reason is None:
            try:
                submission.matcher.advance(sampled.token)
            except InvalidRequest as error:
                self._end(submission, FinishReason.ERROR, error=error)
                return
            if submission.matcher.finished:
                reason = FinishReason.STOP
        text = ""
        detokenizer = submission.detokenizer
        if detokenizer is not None:
            ends = reason is FinishReason.STOP and (stop is not None or sampled.token in self.parts.eos_token_ids)
            if not ends or sampling.include_stop_str_in_output:
                text, stop_string = detokenizer.push([sampled.token])
                if stop_string is not None:
                    reason, stop = FinishReason.STOP, stop_string
            if reason is not None and not isinstance(stop, str):
                text += detokenizer.flush()
        output = self._output(submission)
        output.text = text
        output.token_ids = [sampled.token]
        if sampling.logprobs is not None and sampled.logprobs is not None:
            output.logprobs = [sampled.logprobs]
        if reason is None:
            self._emit(submission, output)
        else:
            output.stop_reason = stop
            self._end(submission, reason, output)

    def _output(self, submission: Submission) -> Output:
        request = submission.request
        output = Output(request_id=request.id, index=submission.index)
        if not submission.announced:
            submission.announced = True
            self.counters.prompt_tokens += request.prompt_len
            output.prompt_token_ids = request.tokens[: request.prompt_len]
            output.num_cached_tokens = request.num_cached
            output.queue_seconds = submission.queue_seconds
            output.prompt_logprobs = submission.prompt_logprobs
            if request.sampling.prompt_logprobs is not None and output.prompt_logprobs is None:
                output.prompt_logprobs = [None]
        return output

    def _emit(self, submission: Submission, output: Output) -> None:
        self._emitted = True
        submission.sink(output)

    def _end(
        self,
        submission: Submission,
        reason: FinishReason,
        output: Output | None = None,
        error: Exception | None = None,
    ) -> None:
        """Free what a request holds and send its last Output."""
        request = submission.request
        output = output or Output(request_id=request.id, index=submission.index)
        output.finish_reason = reason
        output.error = error
        del self._live[request.id]
        if submission.admitted:
            self.parts.sampler.release(request)
        if request.finish_reason is None:
            self.scheduler.finish(request, reason)
        if request.adapter is not None:
            self.parts.store.release(request.adapter)
        self._emit(submission, output)

    def _add(self, submission: Submission) -> None:
        request = submission.request
        self._live[request.id] = submission
        try:
            self.parts.sampler.admit(request)
            submission.admitted = True
            self.scheduler.add(request)
        except MultigraftError as error:
            request.finish_reason = FinishReason.ERROR
            self._end(submission, FinishReason.ERROR, error=error)

    def _adapter_failed(self, uid: int, error: Exception) -> None:
        for request in self.scheduler.adapter_failed(uid):
            self._end(self._live[request.id], FinishReason.ERROR, error=error)

    def _abort(self, request_id: str) -> None:
        submission = self._live.get(request_id)
        if submission is not None:
            self.scheduler.abort(request_id)
            self._end(submission, FinishReason.ABORT)
