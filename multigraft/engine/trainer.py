"""Runs fine-tuning jobs in the engine: their microbatches become passes, of which each step does a part."""

from __future__ import annotations

import logging
from collections.abc import Callable
from concurrent.futures import Future
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch

from multigraft.core.batch import TrainPart
from multigraft.core.errors import MultigraftError
from multigraft.engine.train_memory import TrainMemory
from multigraft.models.train_pass import TrainModel, TrainPass
from multigraft.scheduling.training import TrainWork
from multigraft.training.microbatch import Microbatch

if TYPE_CHECKING:
    from multigraft.training.job import Event, TrainingJob

log = logging.getLogger(__name__)


@dataclass(slots=True)
class _Entry:
    """A job that runs here."""

    job: TrainingJob
    weight: float
    sink: Callable[[Event], None]
    service: float
    """Tokens trained over weight: the job with the least goes first."""
    taken: Microbatch | None = None
    """Handed out by the job, not in a pass yet."""
    stopping: list[Future[None]] = field(default_factory=list)


class Trainer:
    """Belongs to the engine's thread.

    A pass takes one microbatch of each job while they fit, the least served first; so small jobs fill up the rows that
    one alone would leave, and none waits for another's optimizer. A job that fails leaves alone: passes that raise are
    run again job by job.
    """

    def __init__(self, model: TrainModel, memory: TrainMemory):
        self.model = model
        self.memory = memory
        self.tokens_trained = 0
        self._entries: dict[str, _Entry] = {}
        self._pass: TrainPass | None = None
        self._suspects: list[str] = []
        """Jobs of a pass that raised: each goes alone once."""
        self._num_passes = 0

    # Jobs ------------------------------------------------------------------------------------------------------

    @property
    def num_jobs(self) -> int:
        return len(self._entries)

    def start(self, job: TrainingJob, sink: Callable[[Event], None], weight: float = 1.0) -> None:
        """Run a job beside the others until it ends. sink: gets its events, on the engine's thread."""
        assert job.id not in self._entries and weight > 0
        service = min((e.service for e in self._entries.values()), default=0.0)
        self._entries[job.id] = _Entry(job, weight, sink, service)

    def stop(self, job_id: str, stopped: Future[None]) -> None:
        """Take a job out when the pass in hand has ended, at a state from which it can go on; then set the future."""
        entry = self._entries.get(job_id)
        if entry is None:
            stopped.set_result(None)
            return
        entry.stopping.append(stopped)
        self._leave(entry)

    def _leave(self, entry: _Entry) -> None:
        """Let a job that is to stop go, unless the pass in hand has rows of it."""
        if self._pass is not None and any(m.job_id == entry.job.id for m in self._pass.microbatches):
            return
        if entry.taken is not None:
            entry.job.rewind()
        del self._entries[entry.job.id]
        for future in entry.stopping:
            future.set_result(None)

    # Steps -----------------------------------------------------------------------------------------------------

    def work(self) -> TrainWork | None:
        """What is left of the pass in hand, a new one if need be; None when no job has anything to do."""
        if self._pass is None and self._entries:
            self._pass = self._compose()
        p = self._pass
        if p is None:
            return None
        back = (p.num_layers + 1 if p.grad else 1) - p.backward_done
        return TrainWork(p.num_tokens, p.num_layers - p.forward_done, back)

    def riding(self, part: TrainPart) -> AbstractContextManager[None]:
        """Within, the model's forward pass takes the part's rows along."""
        assert self._pass is not None
        return self._pass.riding(part.forward) if part.forward else nullcontext()

    def run(self, part: TrainPart, ridden: bool) -> None:
        """The part itself, or what is left of it when its forward layers were `ridden`; ends a pass that is through."""
        p = self._pass
        if p is None:
            return  # it failed while it rode
        try:
            if not ridden:
                p.forward(part.forward)
            p.backward(part.backward)
        except Exception as error:
            self.abandon(error)
            return
        if p.finished:
            self._pass = None
            self.tokens_trained += p.num_tokens if p.grad else 0
            for microbatch, result in zip(p.microbatches, p.results, strict=True):
                entry = self._entries[microbatch.job_id]
                entry.service += microbatch.num_tokens / entry.weight
                self._guarded(entry, lambda e=entry, m=microbatch, r=result: e.job.done(m, r))

    def abandon(self, error: Exception) -> None:
        """The pass in hand cannot go on. Its jobs go back to their last optimizer step; a job alone in it fails."""
        p, self._pass = self._pass, None
        if p is None:
            return
        jobs = {m.job_id for m in p.microbatches}
        log.warning("A training pass failed: %s", error, exc_info=not isinstance(error, MultigraftError))
        if isinstance(error, torch.OutOfMemoryError) and p.keep:
            del p
            self.memory.shrink()
            for job_id in jobs:
                self._entries[job_id].job.rewind()
            return
        if len(jobs) == 1:
            self._fail(self._entries[jobs.pop()], error)
            return
        for job_id in jobs:
            self._entries[job_id].job.rewind()
            self._suspects.append(job_id)

    def _compose(self) -> TrainPass | None:
        chosen: list[Microbatch] = []
        rows = 0
        alone = self._suspects.pop() if self._suspects else None
        for entry in sorted(self._entries.values(), key=lambda e: e.service):
            if alone not in (None, entry.job.id):
                continue
            if entry.taken is None:
                self._guarded(entry, lambda e=entry: self._take(e))
            m = entry.taken
            if m is None or (chosen and (m.grad != chosen[0].grad or rows + m.num_tokens > self.memory.max_rows)):
                continue
            chosen.append(m)
            rows += m.num_tokens
            entry.taken = None
        if not chosen:
            return None
        self._num_passes += 1
        return TrainPass(self.model, chosen, keep=self.memory.keeps(rows), seed=self._num_passes)

    def _take(self, entry: _Entry) -> list[Event]:
        entry.taken = entry.job.next()
        return []

    def _guarded(self, entry: _Entry, function: Callable[[], list[Event]]) -> None:
        """Pass a job's events on; a job that raises fails, one that has ended leaves."""
        try:
            events = function()
        except Exception as error:
            self._fail(entry, error)
            return
        for event in events:
            entry.sink(event)
        if entry.job.finished:
            self._entries.pop(entry.job.id)
        elif entry.stopping:
            self._leave(entry)

    def _fail(self, entry: _Entry, error: Exception) -> None:
        del self._entries[entry.job.id]
        if not isinstance(error, MultigraftError):
            log.error("Fine-tuning job %s failed", entry.job.id, exc_info=error)
        entry.sink(entry.job.failed(error))
        for future in entry.stopping:
            future.set_result(None)
