"""Runs fine-tuning jobs in the engine: their microbatches become passes, of which each step does a part."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from contextlib import AbstractContextManager
from dataclasses import dataclass

import torch

from multigraft.core.batch import TrainPart
from multigraft.core.errors import MultigraftError
from multigraft.engine.train_memory import TrainMemory
from multigraft.engine.train_ranks import LeadTraining
from multigraft.models.train_pass import TrainModel, TrainPass
from multigraft.scheduling.training import TrainWork
from multigraft.training.job import Event, Stage, TrainingJob
from multigraft.training.microbatch import Microbatch, PassResult

log = logging.getLogger(__name__)


@dataclass(slots=True)
class _Entry:
    """A job that runs here."""

    job: TrainingJob
    weight: float
    on_event: Callable[[Event], None]
    left: Future[None]
    """Done when the job is no longer here."""
    service: float
    """Rows run, over weight: the job with the least goes first."""
    taken: Microbatch | None = None
    """Handed out by the job, not in a pass yet."""
    stopping: bool = False


class Trainer:
    """Belongs to the engine's thread.

    A pass takes microbatches of the jobs while they fit, always the least served job's next; so small jobs fill up the
    rows that one alone would leave, and none waits for another's optimizer. While a job is ahead of one with more
    weight it stays out of that one's passes, even if there are free rows, for they cost time too. A job that fails
    leaves alone: passes that raise are run again job by job.
    """

    def __init__(self, model: TrainModel, memory: TrainMemory, *, rides: bool):
        """rides: training rows go through the layers in front of the served rows, which saves reading the weights
        twice. Where steps run as CUDA graphs it would take them out of these, and cost more than it saves."""
        self.model = model
        self.memory = memory
        self.rides = rides
        self.lead: LeadTraining | None = None
        """Of a tensor-parallel engine, on rank 0."""
        self._entries: dict[str, _Entry] = {}
        self._pass: TrainPass | None = None
        self._suspects: list[str] = []
        """Jobs of a pass that raised: each goes alone once."""

    # Jobs ------------------------------------------------------------------------------------------------------

    @property
    def num_jobs(self) -> int:
        return len(self._entries)

    def start(self, job: TrainingJob, weight: float, on_event: Callable[[Event], None], left: Future[None]) -> None:
        """Run a job beside the others. on_event: gets its events, on the engine's thread; what it raises fails the job.

        left: done when the job has ended or was stopped; with the exception that made it fail, if one did.
        """
        assert job.id not in self._entries and weight > 0
        if job.stage is Stage.DONE:  # it was stopped between its last event and its end
            left.set_result(None)
            return
        service = min((e.service for e in self._entries.values()), default=0.0)
        self._entries[job.id] = _Entry(job, weight, on_event, left, service)
        if self.lead is not None:
            self.lead.join(job)

    def stop(self, job_id: str) -> None:
        """Let a job go as soon as no pass has rows of it. Does nothing when it is not here."""
        entry = self._entries.get(job_id)
        if entry is not None:
            entry.stopping = True
            if self._pass is None or all(m.job_id != job_id for m in self._pass.microbatches):
                self._let_go(entry)

    def stop_all(self) -> None:
        """The engine ends."""
        self._pass = None
        for entry in list(self._entries.values()):
            self._let_go(entry)

    def _let_go(self, entry: _Entry, error: Exception | None = None) -> None:
        del self._entries[entry.job.id]
        if self.lead is not None:
            self.lead.leave(entry.job)
        if error is not None:
            entry.left.set_exception(error)
            return
        entry.job.rewind()
        entry.left.set_result(None)

    # Steps -----------------------------------------------------------------------------------------------------

    def work(self) -> TrainWork | None:
        """What is left of the pass in hand, a new one if need be; None when no job has anything to do."""
        if self._pass is None and self._entries:
            self._pass = self._compose()
        p = self._pass
        if p is None:
            return None
        back = (p.num_layers + 1 if p.grad else 1) - p.backward_done
        return TrainWork(p.num_tokens, p.num_layers - p.forward_done, back, 0 if p.backward_done else p.num_targets)

    def riding(self, part: TrainPart | None) -> AbstractContextManager[None] | None:
        """Within it, the model's forward pass takes the part's rows along; None when there is nothing to take."""
        if part is None or not part.forward or not self.rides:
            return None
        assert self._pass is not None
        return self._pass.riding(part.forward)

    def run(self, part: TrainPart, ridden: bool) -> None:
        """The part itself, or what is left of it when its forward layers have `ridden`; ends a pass that is through."""
        p = self._pass
        if p is None:
            return  # it failed while it rode
        try:
            if not (ridden and self.rides):
                p.forward(part.forward)
            p.backward(part.backward)
        except Exception as error:
            if self.lead is not None:
                self.lead.settle(error)
            self.abandon(error)
            return
        if p.finished:
            self._pass = None
            for microbatch, result in zip(p.microbatches, p.results, strict=True):
                entry = self._entries.get(microbatch.job_id)
                if entry is not None:  # else it failed with an earlier microbatch
                    self._done(entry, microbatch, result)

    def abandon(self, error: Exception, *, guilty: bool = True) -> None:
        """The pass in hand cannot go on. Its jobs go back to their last optimizer step; a job alone in it fails, if its
        rows are `guilty` of the error."""
        p, self._pass = self._pass, None
        if p is not None:
            self._take_back(p.microbatches, error, kept=p.keep, guilty=guilty)

    def _take_back(
        self, microbatches: Sequence[Microbatch], error: Exception, *, kept: bool, guilty: bool = True
    ) -> None:
        """kept: their pass kept its activations."""
        entries = [e for e in self._entries.values() if any(m.job_id == e.job.id for m in microbatches)]
        log.warning("A training pass failed: %s", error, exc_info=not isinstance(error, MultigraftError))
        if isinstance(error, torch.OutOfMemoryError) and kept:
            self.memory.shrink()
        elif guilty and len(entries) == 1:
            self._let_go(entries[0], error)
            return
        elif guilty:
            self._suspects += [e.job.id for e in entries]
        for entry in entries:
            entry.taken = None
            entry.job.rewind()

    def _compose(self) -> TrainPass | None:
        chosen: list[Microbatch] = []
        rows = 0
        alone = self._suspects.pop() if self._suspects else None
        waiting = [e for e in self._entries.values() if alone in (None, e.job.id)]
        served = {e.job.id: e.service for e in waiting}
        while waiting:
            entry = min(waiting, key=lambda e: served[e.job.id])
            m = self._next(entry)
            fits = m is not None and (
                not chosen or (m.grad == chosen[0].grad and rows + m.num_tokens <= self.memory.max_rows)
            )
            others = {c.job_id for c in chosen}
            ahead = any(self._entries[o].weight > entry.weight and served[o] < served[entry.job.id] for o in others)
            if m is None or not fits or ahead:
                waiting.remove(entry)
                continue
            entry.taken = None
            chosen.append(m)
            rows += m.num_tokens
            served[entry.job.id] += m.num_tokens / entry.weight
        if not chosen:
            return None
        make = TrainPass if self.lead is None else self.lead.make_pass
        try:
            return make(self.model, chosen, keep=self.memory.keeps(rows))
        except Exception as error:
            if self.lead is not None:
                self.lead.settle(error)
            self._take_back(chosen, error, kept=False)
            return None

    def _next(self, entry: _Entry) -> Microbatch | None:
        """The job's next microbatch; None when it has none now, or has failed."""
        if entry.taken is None:
            try:
                entry.taken = entry.job.next()
            except Exception as error:
                self._let_go(entry, error)
        return entry.taken

    def _done(self, entry: _Entry, microbatch: Microbatch, result: PassResult) -> None:
        entry.service += microbatch.num_tokens / entry.weight
        try:
            for event in entry.job.done(microbatch, result):
                entry.on_event(event)
        except Exception as error:
            self._let_go(entry, error)
            return
        if entry.stopping or entry.job.stage is Stage.DONE:
            self._let_go(entry)
