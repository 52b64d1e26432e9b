"""A running job on the terminal."""

from __future__ import annotations

import asyncio
import time
from datetime import timedelta

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

from multigraft.core.training import FineTuneJob, JobEvent, JobStatus

from .trainers import Trainer

POLL_SECONDS = 0.5
EVENTS_AT_ONCE = 1000
STYLES = {"error": "red", "warn": "yellow"}


async def follow(trainer: Trainer, job: FineTuneJob, console: Console) -> FineTuneJob:
    """Show a job until it has ended, or is paused.

    A terminal shows the steps as a bar; anything else, a log file say, gets a line for each.
    """
    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[numbers]}")
    numbers = _Numbers()
    with Progress(*columns, console=console, disable=not console.is_terminal) as progress:
        bar = progress.add_task(job.status.value, total=None, numbers="")
        seen: str | None = None
        while True:
            job = await trainer.job(job.id)  # before its events, so that none of them is missed at the end
            for event in await _events_after(trainer, job.id, seen):
                seen = event.id
                numbers.losses |= {k: v for k, v in (event.data or {}).items() if k in ("train_loss", "valid_loss")}
                if event.data is None or not console.is_terminal:
                    console.print(
                        event.message, style=STYLES.get(event.level), markup=False, highlight=False, soft_wrap=True
                    )
            progress.update(
                bar,
                description=job.status.value,
                completed=job.step,
                total=job.total_steps,
                numbers=numbers.show(job),
            )
            if job.status.final or job.status is JobStatus.PAUSED:
                break
            await asyncio.sleep(POLL_SECONDS)
    if numbers.rate:
        console.print(f"{job.trained_tokens} tokens, {numbers.rate:.0f} tok/s", highlight=False)
    return job


async def _events_after(trainer: Trainer, job_id: str, seen: str | None) -> list[JobEvent]:
    """The events behind the one of id `seen`, the oldest first."""
    news: list[JobEvent] = []
    for event in await trainer.events(job_id, EVENTS_AT_ONCE):
        if event.id == seen:
            break
        news.append(event)
    return news[::-1]


class _Numbers:
    def __init__(self) -> None:
        self.losses: dict[str, float] = {}
        self.rate = 0.0
        """Tokens per second since the first look at the running job."""
        self._first: tuple[float, int] | None = None

    def show(self, job: FineTuneJob) -> str:
        now = time.time()
        if job.status is JobStatus.RUNNING and self._first is None:
            self._first = now, job.trained_tokens
        elif self._first is not None and job.trained_tokens > self._first[1]:
            self.rate = (job.trained_tokens - self._first[1]) / (now - self._first[0])
        parts = [f"{name.removesuffix('_loss')} loss {value:.4f}" for name, value in self.losses.items()]
        if self.rate:
            parts.append(f"{self.rate:.0f} tok/s")
        if job.estimated_finish is not None:
            parts.append(f"{timedelta(seconds=max(0, job.estimated_finish - int(now)))} left")
        return "  ".join(parts)
