"""What is known of fine-tuning outside of training: files, jobs, events and checkpoints as a front end sees them.

Times are Unix seconds.
"""

from __future__ import annotations

import enum
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

MAX_FILE_BYTES = 2**30
MAX_SUFFIX_LEN = 64
ORGANIZATION = "multigraft"
"""Of every job, and part of the names of trained models."""
FINE_TUNE = "fine-tune"
"""Purpose of a file that a job may read."""
RESULTS = "fine-tune-results"
"""Purpose of the table of losses that a job leaves."""

T = TypeVar("T")


class JobStatus(str, enum.Enum):
    VALIDATING = "validating_files"
    QUEUED = "queued"
    RUNNING = "running"
    PAUSED = "paused"
    SUCCEEDED = "succeeded"
    FAILED = "failed"
    CANCELLED = "cancelled"

    @property
    def final(self) -> bool:
        return self in (JobStatus.SUCCEEDED, JobStatus.FAILED, JobStatus.CANCELLED)


@dataclass(frozen=True, slots=True, kw_only=True)
class Page(Generic[T]):
    """A stretch of a list; the next one begins after its last element."""

    data: list[T]
    has_more: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class DataFile:
    id: str
    filename: str
    purpose: str
    num_bytes: int
    created: int


@dataclass(frozen=True, slots=True, kw_only=True)
class WandbRun:
    """Where Weights & Biases is to show a job's metrics."""

    project: str
    name: str | None = None
    """None: the job's id."""
    entity: str | None = None
    tags: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class JobRequest:
    """A job as it is asked for. Values of "auto" are settled once the data has been read."""

    model: str
    training_file: str
    validation_file: str | None = None
    method: str = "supervised"
    hyperparameters: Mapping[str, Any] = field(default_factory=dict)
    adapter: Mapping[str, Any] = field(default_factory=dict)
    """Kind, rank, target modules and so on of the adapter that is trained."""
    weight: float = 1.0
    """Share of the training time, relative to the other running jobs'."""
    seed: int | None = None
    suffix: str | None = None
    """Part of the trained model's name, at most MAX_SUFFIX_LEN characters."""
    metadata: Mapping[str, str] = field(default_factory=dict)
    wandb: WandbRun | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class JobError:
    code: str
    message: str
    param: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class FineTuneJob:
    id: str
    request: JobRequest
    """hyperparameters, adapter and seed hold the settled values as soon as they are known."""
    status: JobStatus
    created: int
    finished: int | None = None
    estimated_finish: int | None = None
    step: int = 0
    total_steps: int | None = None
    trained_tokens: int = 0
    fine_tuned_model: str | None = None
    """Name that requests use, once the job has succeeded."""
    result_files: tuple[str, ...] = ()
    error: JobError | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class JobEvent:
    id: str
    created: int
    level: str
    """info, warn or error."""
    message: str
    data: Mapping[str, Any] | None = None
    """Of an event that reports metrics: their values by name."""


@dataclass(frozen=True, slots=True, kw_only=True)
class JobCheckpoint:
    id: str
    job_id: str
    created: int
    step: int
    model: str
    """Name that requests use."""
    metrics: Mapping[str, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainingStats:
    """A snapshot for dashboards; counters only grow while the process lives."""

    jobs: Mapping[JobStatus, int] = field(default_factory=dict)
    trained_tokens: int = 0
    steps: int = 0
    granted_seconds: float = 0.0
    """Time of the engine's steps that training was granted, as predicted."""
    metrics: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    """Of each running job, by id: its newest metrics by name."""
