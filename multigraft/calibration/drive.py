"""Sends a workload to an engine in this process and records what became of it, as the twin does."""

from __future__ import annotations

import math
import time
from concurrent.futures import Future
from dataclasses import replace
from functools import partial
from operator import itemgetter

from multigraft.core.batch import Batch
from multigraft.core.request import AdapterRef, FinishReason, Output, Request, SamplingParams
from multigraft.engine.core import EngineCore, Submission
from multigraft.engine.detokenize import Detokenizer
from multigraft.kernels.openmp import release_pool
from multigraft.twin.record import Load, Record, Sample, Served
from multigraft.twin.simulate import NUM_SAMPLES
from multigraft.twin.workload import Arrival, TrainingJob, Workload, prompt_tokens

from .jobs import random_job


class Drive:
    """One run of a workload. The engine's store knows its adapters by their names.

    Times are of time.monotonic(), from `start`.
    """

    def __init__(self, core: EngineCore, workload: Workload, *, seed: int = 0):
        self.core, self.workload, self.seed = core, workload, seed
        self.start = 0.0
        self.record = Record(
            workload=workload,
            served=[Served(r) for r in workload.requests],
            loads=[],
            samples=[],
            steps=0,
            max_loras=core.parts.config.adapters.max_loras,
        )
        self._loads = (core.counters.adapter_loads, core.counters.adapter_load_seconds)
        self._left = len(workload.requests)
        self._done: Future[None] = Future()
        self._sample_every = max(workload.duration, 1.0) / NUM_SAMPLES

    def run(self, timeout: float | None = None) -> Record:
        """Returns when every request has ended, and stops the jobs then; without requests, when every job has.
        TimeoutError after `timeout` seconds."""
        core, requests = self.core, self.workload.requests
        before = core.stats()
        due = [(r.time, partial(core.submit, self._submission(i, r))) for i, r in enumerate(requests)]
        last = self.workload.duration if requests else math.inf
        jobs = [_Job(core, job) for job in self.workload.jobs if job.start <= last]
        due += [(job.start, job.begin) for job in jobs]
        release_pool()  # jobs were made with torch; the engine's thread has the cores to itself
        self.start, was = time.monotonic(), core.observer
        core.observer = self
        try:
            for at, begin in sorted(due, key=itemgetter(0)):
                delay = self.start + at - time.monotonic()
                if delay > 0:
                    time.sleep(delay)
                begin()
            for done in [self._done] if requests else [job.left for job in jobs]:
                done.result(timeout)
            self.record.seconds = time.monotonic() - self.start
            self.record.train_tokens = sum(job.job.trained_tokens for job in jobs)
        finally:
            core.observer = was
            for job in jobs:
                job.stop()
        stats = core.stats()
        self.record.preemptions = stats.preemptions - before.preemptions
        return self.record

    # On the engine's thread ------------------------------------------------------------------------------------

    def scheduled(self, batch: Batch) -> None:
        now, record, s = time.monotonic() - self.start, self.record, self.core.scheduler
        for span in batch.spans:
            index = self._index(span.request)
            if index is not None and record.served[index].started is None:
                record.served[index].started = now
        samples = record.samples
        assert samples is not None and record.loads is not None
        if not samples or now >= samples[-1].time + self._sample_every:
            samples.append(Sample(now, s.num_running, s.num_waiting, s.pages.usage, s.residency.num_used))
        self._note_loads(now)

    def ran(self, batch: Batch, seconds: float) -> None:
        self.record.steps = (self.record.steps or 0) + 1

    def _sink(self, index: int, output: Output) -> None:
        served, now = self.record.served[index], time.monotonic() - self.start
        if output.token_ids:
            if served.first is None:
                served.first = now
            elif served.last is not None:
                self.record.add_gap(now - served.last)
            served.last = now
            served.num_tokens += len(output.token_ids)
        if output.finish_reason is not None:
            if output.finish_reason is FinishReason.ERROR:
                served.error = str(output.error)
            self._left -= 1
            if not self._left:
                self._done.set_result(None)

    def _note_loads(self, now: float) -> None:
        """The engine counts loads and sums up their seconds: those since the last look get equal shares."""
        c, loads = self.core.counters, self.record.loads
        assert loads is not None
        num, seconds = c.adapter_loads - self._loads[0], c.adapter_load_seconds - self._loads[1]
        if num:
            loads += [Load("", now - seconds / num, seconds / num)] * num
        self._loads = (c.adapter_loads, c.adapter_load_seconds)

    # ---------------------------------------------------------------------------------------------------------

    def _submission(self, index: int, r: Arrival) -> Submission:
        parts = self.core.parts
        tokens = prompt_tokens(index + self.seed * len(self.workload.requests), r, parts.vocab_size)
        sampling = SamplingParams(max_tokens=r.output_len, ignore_eos=True, seed=index)
        request = Request(
            f"drive-{id(self)}-{index}",
            tokens,
            sampling,
            max_len=r.prompt_len + r.output_len,
            adapter=self._acquire(r.adapter),
        )
        detokenizer = Detokenizer(parts.tokenizer, tokens, sampling) if parts.tokenizer else None
        return Submission(request, lambda output: self._sink(index, output), detokenizer=detokenizer)

    def _acquire(self, name: str | None) -> AdapterRef | None:
        if name is None:
            return None
        scope = next(a.scope for a in self.workload.adapters if a.name == name)
        store = self.core.parts.store
        ref = store.resolve(name).scoped(scope)
        store.acquire(ref)
        return ref

    def _index(self, request: Request) -> int | None:
        head, _, index = request.id.rpartition("-")
        return int(index) if head == f"drive-{id(self)}" else None


class _Job:
    """A training job of the workload, on random tokens."""

    def __init__(self, core: EngineCore, job: TrainingJob):
        rows = min(job.microbatch, core.parts.trainer.memory.max_rows)
        self.core, self.start, self.begun = core, job.start, False
        self.job = random_job(core.parts, job.name, tokens=job.tokens, microbatch=rows, rank=job.rank)
        self.left: Future[None] = Future()

    def begin(self) -> None:
        self.begun = True
        self.core.post(partial(self.core.trainer.start, self.job, 1.0, lambda event: None, self.left))

    def stop(self) -> None:
        """Wait until it is gone."""
        if self.begun:
            self.core.post(partial(self.core.trainer.stop, self.job.id))
            self.left.result(60)


def sized(workload: Workload, core: EngineCore) -> Workload:
    """The workload with its adapters' real sizes, as the engine's store has them."""
    store = core.parts.store
    return replace(workload, adapters=tuple(replace(a, nbytes=store.resolve(a.name).nbytes) for a in workload.adapters))
