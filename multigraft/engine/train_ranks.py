"""Fine-tuning over the ranks of a tensor-parallel engine.

Jobs are rank 0's alone. The others have each job's block and its gradient, laid out as rank 0's, and run the passes
that they are told, over the same broadcasts as steps (wire.py). Each rank reads and adds to what it multiplies of a
block, so the gradient is the sum of all ranks', taken once an optimizer step; then rank 0 sends the new block.
"""

from __future__ import annotations

import itertools
import logging
import time
from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING

import numpy as np
import torch
import torch.distributed as dist

from multigraft.core.errors import RankLost
from multigraft.engine import wire
from multigraft.engine.ranks import Ranks
from multigraft.models.parallel import Group
from multigraft.models.train_pass import TrainModel, TrainPass
from multigraft.training.adapter import AdapterBlock, AdapterDesign, TrainableAdapter
from multigraft.training.job import TrainingJob
from multigraft.training.microbatch import Microbatch

if TYPE_CHECKING:
    from multigraft.engine.parts import RankParts

log = logging.getLogger(__name__)

SETTLE_SECONDS = 3
"""For all ranks to have failed with a pass; a rank that fails alone ends the engine."""


class LeadTraining:
    """Rank 0's side."""

    def __init__(self, ranks: Ranks):
        self._ranks = ranks
        self._keys: dict[AdapterBlock, int] = {}
        self._count = itertools.count()
        self._num_passes = 0

    def join(self, job: TrainingJob) -> None:
        """Let the other ranks have the job's blocks, its own from now on always as it is here."""
        for adapter in _adapters(job):
            key = self._keys[adapter] = next(self._count)
            adapter.replicas = _Replicas(self, key)
            if self._tell(wire.encode_join(key, adapter.design.config)):
                adapter.replicas.update(adapter.block)

    def leave(self, job: TrainingJob) -> None:
        for adapter in _adapters(job):
            adapter.replicas = None
            self.tell(wire.LEAVE, self._keys.pop(adapter))

    def make_pass(self, model: TrainModel, microbatches: Sequence[Microbatch], *, keep: bool) -> TrainPass:
        """A pass that the other ranks run, too, part for part."""
        self._num_passes += 1
        keys = [None if m.adapter is None else self._keys[m.adapter] for m in microbatches]
        self._tell(wire.encode_pass(microbatches, keys, keep=keep))
        return _LedPass(self, model, microbatches, keep=keep)

    def settle(self, error: Exception) -> None:
        """The pass in hand failed here. RankLost unless it failed on all ranks, at the same collective."""
        store, size = self._ranks.store, self.group.size
        keys = [_failed(self._num_passes, rank) for rank in range(1, size)]
        deadline = time.monotonic() + SETTLE_SECONDS
        while not store.check(keys):
            if self._ranks.lost is not None:
                raise self._ranks.lost from error
            if time.monotonic() > deadline:
                raise RankLost(f"A training pass failed on rank 0 and not on the others: {error}") from error
            time.sleep(0.02)
        places = [self.group.num_calls, *(int(store.get(key)) for key in keys)]
        if len(set(places)) > 1:
            raise RankLost(f"A training pass failed on all ranks, after {places} collectives: {error}") from error
        store.set(_settled(self._num_passes), b"")

    def tell(self, kind: int, number: int) -> bool:
        """False: the engine has lost the other ranks and ends."""
        return self._tell(np.array([kind, number], dtype=np.int32))

    def _tell(self, message: np.ndarray) -> bool:
        listening = self._ranks.listening
        if listening:
            self._ranks.tell(message)
        return listening

    @property
    def group(self) -> Group:
        return self._ranks.group


@dataclass(frozen=True, slots=True)
class _Replicas:
    """Implements training.adapter.Replicas."""

    lead: LeadTraining
    key: int

    def add_gradients(self, block_grad: torch.Tensor) -> None:
        if self.lead.tell(wire.GATHER, self.key):
            self.lead.group.reduce_(block_grad)

    def update(self, block: torch.Tensor) -> None:
        if self.lead.tell(wire.UPDATE, self.key):
            self.lead.group.broadcast_(block)

    def clear(self) -> None:
        self.lead.tell(wire.CLEAR, self.key)


class _LedPass(TrainPass):
    def __init__(self, lead: LeadTraining, model: TrainModel, microbatches: Sequence[Microbatch], *, keep: bool):
        self._lead = lead
        super().__init__(model, microbatches, keep=keep)

    def forward(self, count: int) -> None:
        if count:
            self._lead.tell(wire.FORWARD, count)
            super().forward(count)

    def riding(self, count: int) -> AbstractContextManager[None]:
        self._lead.tell(wire.RIDE, count)
        return super().riding(count)

    def backward(self, count: int) -> None:
        if count:
            self._lead.tell(wire.BACKWARD, count)
            super().backward(count)


class FollowedTraining:
    """The side of a rank other than 0."""

    def __init__(self, parts: RankParts, group: Group, store: dist.Store, *, max_rank: int):
        """store: the one that the ranks met at. max_rank: of adapters."""
        self.riding: AbstractContextManager[None] | None = None
        """What the next step is to run in; whoever runs it sets None again."""
        self._model, self._dtype = parts.trainer.model, parts.loaded.dtype
        self._sites = [site.unsplit for site in parts.sites]
        self._group, self._store = group, store
        self._max_rank = max_rank
        self._blocks: dict[int, AdapterBlock] = {}
        """By key."""
        self._pass: TrainPass | None = None
        self._num_passes = 0

    def hear(self, message: np.ndarray) -> None:
        """Do what a message of JOIN or later says."""
        kind, number = int(message[0]), int(message[1])
        match kind:
            case wire.JOIN:
                key, config = wire.decode_join(message)
                design = AdapterDesign.parse(config, self._sites, max_rank=self._max_rank)
                self._blocks[key] = AdapterBlock(design, dtype=self._dtype, device=self._model.device)
            case wire.LEAVE:
                del self._blocks[number]
            case wire.GATHER:
                self._group.reduce_(self._blocks[number].block_grad)
            case wire.UPDATE:
                self._group.broadcast_(self._blocks[number].block)
            case wire.CLEAR:
                self._blocks[number].clear()
            case _:
                try:
                    self._run(kind, number, message)
                except Exception as error:
                    self._settle(error)

    def _run(self, kind: int, number: int, message: np.ndarray) -> None:
        """A part of a pass."""
        if kind == wire.PASS:
            self._num_passes += 1
            told, keep, grad = wire.decode_pass(message)
            microbatches = [
                Microbatch(
                    job_id="",
                    samples=m.samples,
                    adapter=None if m.key is None else self._blocks[m.key],  # type: ignore[arg-type]
                    objective=_Told(m.two_pass),
                    grad=grad,
                    seed=m.seed,
                )
                for m in told
            ]
            self._pass = TrainPass(self._model, microbatches, keep=keep)
            return
        assert self._pass is not None
        if kind == wire.RIDE:
            self.riding = self._pass.riding(number)
        elif kind == wire.FORWARD:
            self._pass.forward(number)
        else:
            self._pass.backward(number)
            if self._pass.finished:
                self._pass = None

    def _settle(self, error: Exception) -> None:
        """Go on if the pass failed on all ranks, at the same collective; else raise the error, which ends the rank."""
        log.warning("A training pass failed: %s", error)
        self._pass = None
        self._store.set(_failed(self._num_passes, self._group.rank), str(self._group.num_calls))
        try:
            self._store.wait([_settled(self._num_passes)], timedelta(seconds=SETTLE_SECONDS))
        except RuntimeError:  # it timed out, or rank 0 is gone
            raise error from None


@dataclass(frozen=True, slots=True)
class _Told:
    """Stands for an objective that is rank 0's: the pass takes rank 0's gradient in place of these zeros."""

    two_pass: bool

    def __call__(self, logps: Sequence[torch.Tensor]) -> tuple[torch.Tensor, list[torch.Tensor]]:
        return logps[0].new_zeros(()), [torch.zeros_like(p) for p in logps]


def _adapters(job: TrainingJob) -> list[TrainableAdapter]:
    """What its passes read: its own, and what dpo compares with if that is not the base model."""
    return [job.adapter] if job.reference is None else [job.adapter, job.reference]


def _failed(num_pass: int, rank: int) -> str:
    return f"failed-pass/{num_pass}/{rank}"


def _settled(num_pass: int) -> str:
    return f"settled-pass/{num_pass}"
