"""What training needs of the engine, and how a job goes to disk and back."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path
from typing import Any, Protocol, TypeVar

from multigraft.kernels.openmp import release_pool

from .adapter import write_folder
from .data import Tokenizer
from .dataset import Dataset
from .job import Event, TrainingJob
from .spec import JobSpec
from .state import JobState

STATE_FILE = "job.safetensors"

T = TypeVar("T")


class TrainingEngine(Protocol):
    """What training needs of the engine. Called on the loop, or off it where that is said."""

    @property
    def model_name(self) -> str: ...

    @property
    def granted_seconds(self) -> float:
        """Time of its steps that training, all jobs together, was granted so far. It only grows."""
        ...

    @property
    def tokenizer(self) -> Tokenizer:
        """Its methods are called off the loop."""
        ...

    def admit(self, spec: JobSpec) -> int:
        """Tokens of a sample that there is room for; CapacityExceeded, with the arithmetic, for what can never fit."""
        ...

    def fits(self, spec: JobSpec) -> bool:
        """Whether there is memory for such a job beside those that run now."""
        ...

    def build(
        self, job_id: str, spec: JobSpec, train: Dataset, valid: Dataset | None, start: Path | None
    ) -> TrainingJob:
        """A job at its start. Called off the loop, after fits() and before any other job's start().

        start: PEFT folder of the adapter that it goes on from; None: a new one.
        """
        ...

    def start(self, job: TrainingJob, weight: float, on_event: Callable[[Event], None]) -> Future[None]:
        """Run it beside the others, weight being its share; on_event is called on the engine's thread. Its memory
        counts until it has left.

        What on_event raises fails the job. The future is done once the engine has let go of the job, after its last
        event; with the exception, JobFailed say, that made it fail; at once when the engine has ended.
        """
        ...

    def stop(self, job_id: str) -> None:
        """Let go of a job between two of its passes, soon. Harmless when that has happened already."""
        ...

    async def publish(self, name: str, folder: Path) -> None:
        """Serve an adapter folder under a name, in place of what had it before."""
        ...

    def withdraw(self, name: str) -> bool:
        """Serve a name no more, which may be gone already; False, and nothing changed, while requests use it."""
        ...


class Snapshot:
    """A job as it was after a step, in host memory."""

    def __init__(self, job: TrainingJob):
        """On the thread that runs the job, or when none does."""
        self._config = job.adapter.design.config
        self._tensors = job.adapter.export()
        self._state = job.state()

    def write(self, folder: Path) -> None:
        """A checkpoint's folder, as the store describes it."""
        write_folder(folder / "adapter", self._config, self._tensors)
        (folder / "state").mkdir()
        self._state.save(folder / "state" / STATE_FILE)


def restore(job: TrainingJob, folder: Path) -> None:
    """Go on from a checkpoint's folder; JobFailed when it cannot be."""
    job.restore(JobState.load(folder / "state" / STATE_FILE, job.adapter.design))


async def off_loop(function: Callable[..., T], *args: Any) -> T:
    """Work that uses torch, in a thread that leaves the cores to the engine's afterwards."""

    def call() -> T:
        try:
            return function(*args)
        finally:
            release_pool()

    return await asyncio.to_thread(call)
