"""Training jobs of the twin: passes and their parts as engine.trainer makes them, without weights."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from multigraft.core.batch import TrainPart
from multigraft.scheduling.training import TrainWork

from .workload import TrainingJob


@dataclass(slots=True)
class _Pass:
    rows: int
    forward: int
    """Layers left."""
    backward: int
    head: int
    """Rows that have yet to go through the output head."""


class Training:
    """Jobs share a pass's rows, one microbatch of each, the least served job's first; all weigh the same. A job's next
    microbatch waits for the optimizer step that ends with the one before."""

    def __init__(self, jobs: Sequence[TrainingJob], num_layers: int, max_rows: int):
        """max_rows: of one pass, as the memory for activations allows."""
        self.num_layers, self.max_rows = num_layers, max_rows
        self._waiting = sorted(jobs, key=lambda j: j.start, reverse=True)
        self._left: dict[str, int] = {}
        """Tokens that each started job still has to train on, those of the pass in hand taken off."""
        self._served: dict[str, int] = {}
        self._microbatch = {job.name: min(job.microbatch, max_rows) for job in jobs}
        self._pass: _Pass | None = None
        self.tokens = 0
        """Trained on so far."""

    @property
    def next_start(self) -> float | None:
        """When the next job comes, if one does."""
        return self._waiting[-1].start if self._waiting else None

    def work(self, now: float) -> TrainWork | None:
        while self._waiting and self._waiting[-1].start <= now:
            job = self._waiting.pop()
            self._served[job.name] = min((self._served[name] for name in self._left), default=0)
            self._left[job.name] = job.tokens
        if self._pass is None:
            self._pass = self._compose()
        p = self._pass
        return None if p is None else TrainWork(p.rows, p.forward, p.backward, p.head)

    def run(self, part: TrainPart) -> None:
        p = self._pass
        assert p is not None
        p.forward -= part.forward
        p.backward -= part.backward
        p.head -= part.head
        if not p.forward and not p.backward:
            self.tokens += p.rows
            self._pass = None

    def _compose(self) -> _Pass | None:
        rows, microbatches, waiting = 0, 0, list(self._left)
        while waiting:
            name = min(waiting, key=self._served.__getitem__)  # of equals the one that came first
            waiting.remove(name)
            num = min(self._microbatch[name], self._left[name])
            if rows + num > self.max_rows:
                continue
            rows, microbatches = rows + num, microbatches + 1
            self._left[name] -= num
            self._served[name] += num
        self._left = {name: left for name, left in self._left.items() if left}
        # The output head is the first layer backward. A microbatch is one sample, whose first token nothing foretells.
        return _Pass(rows, self.num_layers, self.num_layers + 1, rows - microbatches) if rows else None
