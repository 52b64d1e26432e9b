"""A TrainingEngine that only trains: real jobs on a tiny model, on one thread, a microbatch of each in turn."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from functools import partial
from pathlib import Path

import torch

from multigraft.core.errors import CapacityExceeded, MultigraftError
from multigraft.training.dataset import Dataset
from multigraft.training.job import Event, Stage, TrainingJob
from multigraft.training.spec import JobSpec
from tests.training.reference_executor import ReferenceExecutor
from tests.training.world import TinyTokenizer, World

MAX_TOKENS = 128


class PlainEngine:
    model_name = "org/base"

    def __init__(self, *, delay: float = 0.0, publish: Callable | None = None):
        """delay: seconds before each microbatch. publish: awaited beside what `published` records."""
        self.tokenizer = TinyTokenizer()
        self.published: dict[str, Path] = {}
        self.running: dict[str, tuple[TrainingJob, Callable[[Event], None], Future[None]]] = {}
        self.most_running = 0
        self.weights: dict[str, float] = {}
        self.room = 100
        """Jobs that fit beside each other."""
        self.diverge_at: dict[str, int] = {}
        """Job to the step in which its loss becomes NaN."""
        self.delay = delay
        self.granted_seconds = 0.0
        """A tenth of a second with each microbatch."""
        self.in_use: set[str] = set()
        """Names that are not withdrawn."""
        self._publish = publish
        self._world = World()
        self._executor = ReferenceExecutor(self._world.model, self._world.sites)
        self._lock = threading.Lock()
        self._closed = False
        self._thread = threading.Thread(target=self._loop, daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Lets go of what runs, as an engine that dies."""
        self._closed = True
        self._thread.join()
        for job_id in list(self.running):
            self.stop(job_id)

    # TrainingEngine --------------------------------------------------------------------------------------------

    def admit(self, spec: JobSpec) -> int:
        if spec.adapter.r > 32:
            raise CapacityExceeded(f"r is {spec.adapter.r}: needs 5 GiB, 4 GiB are there.", param="r")
        return MAX_TOKENS

    def fits(self, spec: JobSpec) -> bool:
        return len(self.running) < self.room

    def build(
        self, job_id: str, spec: JobSpec, train: Dataset, valid: Dataset | None, start: Path | None
    ) -> TrainingJob:
        make = partial(self._world.adapter, spec, start)
        return TrainingJob(
            id=job_id,
            spec=spec,
            adapter=make(),
            train=train,
            validation=valid,
            max_tokens=MAX_TOKENS,
            reference=make() if spec.own_reference else None,
        )

    def start(self, job: TrainingJob, weight: float, on_event: Callable[[Event], None]) -> Future[None]:
        left: Future[None] = Future()
        with self._lock:
            self.running[job.id] = (job, on_event, left)
            self.most_running = max(self.most_running, len(self.running))
            self.weights[job.id] = weight
        return left

    def stop(self, job_id: str) -> None:
        with self._lock:
            _, _, left = self.running.pop(job_id, (None, None, None))
        if left is not None:
            left.set_result(None)

    async def publish(self, name: str, folder: Path) -> None:
        self.published[name] = folder
        if self._publish is not None:
            await self._publish(name, str(folder), in_place=True)

    def withdraw(self, name: str) -> bool:
        if name in self.in_use:
            return False
        self.published.pop(name, None)
        return True

    # The loop --------------------------------------------------------------------------------------------------

    def _loop(self) -> None:
        while not self._closed:
            with self._lock:
                jobs = list(self.running.values())
            for job, on_event, left in jobs:
                time.sleep(self.delay)
                with self._lock:  # so that a stopped job runs no further
                    if job.id in self.running:
                        self._advance(job, on_event, left)
            if not jobs:
                time.sleep(0.002)

    def _advance(self, job: TrainingJob, on_event: Callable[[Event], None], left: Future[None]) -> None:
        try:
            microbatch = job.next()
            if microbatch is not None:
                self.granted_seconds += 0.1
                result = self._executor.run(microbatch)
                if self.diverge_at.get(job.id) == job.step:
                    result.loss = torch.tensor(float("nan"))
                for event in job.done(microbatch, result):
                    on_event(event)
            if job.stage is Stage.DONE:
                del self.running[job.id]
                left.set_result(None)
        except MultigraftError as error:
            del self.running[job.id]
            left.set_exception(error)
