"""Between stored rows and what front ends see."""

from __future__ import annotations

import csv
import dataclasses
import io
import json
from collections.abc import Iterable, Mapping
from typing import Any

from multigraft.core.training import (
    DataFile,
    FineTuneJob,
    JobCheckpoint,
    JobError,
    JobEvent,
    JobRequest,
    JobStatus,
    WandbRun,
)

from .store import CheckpointRow, EventRow, FileRow, JobRow

RESULT_COLUMNS = {
    "step": "step",
    "train_loss": "train_loss",
    "train_accuracy": "train_mean_token_accuracy",
    "valid_loss": "valid_loss",
    "valid_mean_token_accuracy": "valid_mean_token_accuracy",
}
"""Of the table of losses, named as OpenAI's: column to metric."""


def dump(value: Any) -> str:
    """A dataclass or a mapping as JSON."""
    return json.dumps(dataclasses.asdict(value) if dataclasses.is_dataclass(value) else dict(value), allow_nan=False)


def load_request(text: str) -> JobRequest:
    raw = json.loads(text)
    wandb = raw.pop("wandb")
    if wandb is not None:
        wandb = WandbRun(**wandb | {"tags": tuple(wandb["tags"])})
    return JobRequest(**raw, wandb=wandb)


def as_file(row: FileRow) -> DataFile:
    return DataFile(**dataclasses.asdict(row))


def as_job(row: JobRow, estimated_finish: int | None = None) -> FineTuneJob:
    return FineTuneJob(
        id=row.id,
        request=load_request(row.request),
        status=JobStatus(row.status),
        created=row.created,
        finished=row.finished,
        estimated_finish=estimated_finish,
        step=row.step,
        total_steps=row.total_steps,
        trained_tokens=row.trained_tokens,
        fine_tuned_model=row.fine_tuned_model,
        result_files=(row.result_file,) if row.result_file else (),
        error=JobError(**json.loads(row.error)) if row.error else None,
    )


def as_event(row: EventRow) -> JobEvent:
    return JobEvent(
        id=row.id,
        created=row.created,
        level=row.level,
        message=row.message,
        data=json.loads(row.data) if row.data else None,
    )


def as_checkpoint(row: CheckpointRow) -> JobCheckpoint:
    return JobCheckpoint(
        id=row.id,
        job_id=row.job_id,
        created=row.created,
        step=row.step,
        model=row.model,
        metrics=json.loads(row.metrics),
    )


def results_table(steps: Iterable[Mapping[str, Any]]) -> str:
    """The losses of a job as CSV; a metric that a step lacks is an empty cell."""
    text = io.StringIO()
    table = csv.writer(text, lineterminator="\n")
    table.writerow(RESULT_COLUMNS)
    for metrics in steps:
        table.writerow(metrics.get(name) for name in RESULT_COLUMNS.values())
    return text.getvalue()
