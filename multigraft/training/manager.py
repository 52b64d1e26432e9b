"""All fine-tuning of one engine: implements engine.client.TrainingClient over a TrainingStore and a TrainingEngine."""

from __future__ import annotations

import asyncio
import logging
import re
import time
from collections import Counter
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from multigraft.core.config import TrainingConfig
from multigraft.core.errors import InvalidRequest, ModelNotFound, MultigraftError, NotFound
from multigraft.core.training import (
    FINE_TUNE,
    MAX_SUFFIX_LEN,
    DataFile,
    FineTuneJob,
    JobCheckpoint,
    JobEvent,
    JobRequest,
    JobStatus,
    Page,
    TrainingStats,
)

from . import records, trackers
from .engine import TrainingEngine
from .inputs import parse_spec, settled
from .lifecycle import JobRun, Shared
from .spec import same_adapter
from .store import CheckpointRow, EventRow, FileRow, JobRow, Row, TrainingStore, Upload, new_id

log = logging.getLogger(__name__)

SUFFIX = re.compile(rf"[A-Za-z0-9._-]{{1,{MAX_SUFFIX_LEN}}}")


def training_folder(data_dir: Path, model_name: str) -> Path:
    """One for each base model: adapters of another one could not be served, nor its jobs go on."""
    return data_dir / "training" / re.sub(r"[^\w.-]+", "--", model_name.strip("/"))


class TrainingManager:
    """Use `await TrainingManager.open(...)`; every method is called on the loop it was opened on."""

    def __init__(self, store: TrainingStore, engine: TrainingEngine, config: TrainingConfig):
        self._store = store
        self._shared = Shared(store, engine, asyncio.Semaphore(config.max_training_jobs), config.keep_checkpoints)
        self._runs: dict[str, JobRun] = {}
        """Of the jobs that have not ended, by id."""
        self._ended: Counter[JobStatus] = Counter()

    @classmethod
    async def open(cls, engine: TrainingEngine, config: TrainingConfig, folder: Path) -> TrainingManager:
        """Serve what has been trained in this folder, and go on with its unfinished jobs.

        InvalidRequest when another process owns the folder.
        """
        store = await asyncio.to_thread(TrainingStore, folder)
        manager = cls(store, engine, config)
        for name, adapter in await asyncio.to_thread(manager._published):
            try:
                await engine.publish(name, adapter)
            except MultigraftError as error:  # removed from the disk by hand, say: its requests will be told
                log.warning("%s cannot be served any more: %s", name, error.message)
        await manager._take_up()
        return manager

    async def close(self) -> None:
        """Write a checkpoint of every running job and stop; the next open() goes on from there."""
        await asyncio.gather(*(run.leave() for run in self._runs.values()))
        await asyncio.to_thread(self._store.close)

    def _published(self) -> list[tuple[str, Path]]:
        checkpoints = self._store.checkpoints()
        names = [(row.model, row) for row in checkpoints]
        last = {row.job_id: row for row in checkpoints}
        names += [(job.fine_tuned_model, last[job.id]) for job in self._store.succeeded_jobs()]
        return [(name, self._store.checkpoint_folder(row) / "adapter") for name, row in names]

    async def _take_up(self) -> None:
        counts = await asyncio.to_thread(self._store.count_jobs)
        self._ended.update({status: count for status, count in counts.items() if status.final})
        for row in await asyncio.to_thread(self._store.unfinished_jobs):
            run = self._runs[row.id] = JobRun(row, self._shared, self._end)
            if run.status is not JobStatus.PAUSED:
                await run.requeue("The server has started again: the job goes on from its last checkpoint")

    def _end(self, run: JobRun) -> None:
        del self._runs[run.id]
        self._ended[run.status] += 1

    # Files -----------------------------------------------------------------------------------------------------

    async def upload(self) -> AsyncUpload:
        return AsyncUpload(await asyncio.to_thread(self._store.upload), self._store)

    async def files(
        self, *, after: str | None = None, limit: int = 10_000, purpose: str | None = None, ascending: bool = False
    ) -> Page[DataFile]:
        where, values = ("1", []) if purpose is None else ("purpose = ?", [purpose])
        rows = await asyncio.to_thread(
            self._store.page, FileRow, after=after, limit=limit, ascending=ascending, where=where, values=values
        )
        return Page(data=[records.as_file(row) for row in rows.data], has_more=rows.has_more)

    async def file(self, file_id: str) -> DataFile:
        return records.as_file(await asyncio.to_thread(self._store.file, file_id))

    async def file_path(self, file_id: str) -> Path:
        return await asyncio.to_thread(self._store.file_path, file_id)

    async def delete_file(self, file_id: str) -> None:
        await asyncio.to_thread(self._store.delete_file, file_id)

    # Jobs ------------------------------------------------------------------------------------------------------

    async def create(self, request: JobRequest) -> FineTuneJob:
        engine = self._shared.engine
        start = None
        if request.model != engine.model_name:
            request, start = await asyncio.to_thread(self._going_on, request)
        if request.suffix is not None and not SUFFIX.fullmatch(request.suffix):
            raise InvalidRequest(
                f"suffix is {request.suffix!r:.100}; it must be 1 to {MAX_SUFFIX_LEN} letters, digits, dots, hyphens "
                "and underscores.",
                param="suffix",
            )
        trackers.check_wandb(request.wandb)
        for param in ("training_file", "validation_file"):
            await self._check_file(getattr(request, param), param)
        spec = parse_spec(request, engine.model_name)
        spec.max_length(engine.admit(spec))

        row = JobRow(
            id=new_id("ftjob"),
            created=int(time.time()),
            request=records.dump(settled(request, spec)),
            status=JobStatus.VALIDATING.value,
        )
        run = JobRun(row, self._shared, self._end)
        created = [run.event(f"Created fine-tuning job: {row.id}"), run.event(f"Validating {request.training_file}")]
        await asyncio.to_thread(self._store.add_job, row, created, start)
        self._runs[run.id] = run
        run.launch()
        return run.view

    def _going_on(self, request: JobRequest) -> tuple[JobRequest, Path]:
        """The request with the settings of the trained adapter that its model names, and that adapter's folder."""
        checkpoint = self._store.trained(request.model)
        if checkpoint is None:
            raise ModelNotFound(
                f"The model `{request.model}` cannot be fine-tuned here; model must be this server's base model, "
                f"`{self._shared.engine.model_name}`, or the name of an adapter that was trained on it.",
                param="model",
            )
        trained = records.load_request(self._store.job(checkpoint.job_id).request).adapter
        adapter = dict(request.adapter) | same_adapter(trained, request.hyperparameters, request.adapter)
        return replace(request, adapter=adapter), self._adapter_of(checkpoint)

    def _adapter_of(self, checkpoint: CheckpointRow) -> Path:
        folder = self._store.checkpoint_folder(checkpoint) / "adapter"
        if not folder.is_dir():
            raise NotFound(f"The adapter of {checkpoint.model!r} has been removed from the disk.")
        return folder

    async def _check_file(self, file_id: str | None, param: str) -> None:
        if file_id is None:
            return
        purpose = (await self.file(file_id)).purpose
        if purpose != FINE_TUNE:
            raise InvalidRequest(
                f"{param} is {file_id!r}, whose purpose is {purpose!r}; it must be {FINE_TUNE!r}.", param=param
            )

    async def jobs(
        self, *, after: str | None = None, limit: int = 20, metadata: Mapping[str, str] | None = None
    ) -> Page[FineTuneJob]:
        pairs = dict(metadata or {})
        matches = "EXISTS (SELECT 1 FROM json_each(jobs.request, '$.metadata') WHERE key = ? AND value = ?)"
        rows = await asyncio.to_thread(
            self._store.page,
            JobRow,
            after=after,
            limit=limit,
            where=" AND ".join([matches] * len(pairs)) or "1",
            values=[text for pair in pairs.items() for text in pair],
        )
        return Page(data=[self._view(row) for row in rows.data], has_more=rows.has_more)

    async def job(self, job_id: str) -> FineTuneJob:
        return self._view(await asyncio.to_thread(self._store.job, job_id))

    def _view(self, row: JobRow) -> FineTuneJob:
        run = self._runs.get(row.id)
        return run.view if run else records.as_job(row)

    async def _run(self, job_id: str) -> JobRun:
        run = self._runs.get(job_id)
        if run is None:
            row = await asyncio.to_thread(self._store.job, job_id)
            raise InvalidRequest(f"Job {job_id!r} is already {row.status}.")
        return run

    async def cancel(self, job_id: str) -> FineTuneJob:
        run = await self._run(job_id)
        await run.halt(JobStatus.CANCELLED)
        return run.view

    async def pause(self, job_id: str) -> FineTuneJob:
        run = await self._run(job_id)
        await run.halt(JobStatus.PAUSED)
        return run.view

    async def resume(self, job_id: str) -> FineTuneJob:
        run = await self._run(job_id)
        await run.resume()
        return run.view

    async def _of_job(self, kind: type[Row], job_id: str, after: str | None, limit: int) -> Page[Row]:
        def page() -> Page[Row]:
            self._store.job(job_id)
            return self._store.page(kind, after=after, limit=limit, where="job_id = ?", values=[job_id])

        return await asyncio.to_thread(page)

    async def events(self, job_id: str, *, after: str | None = None, limit: int = 20) -> Page[JobEvent]:
        rows = await self._of_job(EventRow, job_id, after, limit)
        return Page(data=[records.as_event(row) for row in rows.data], has_more=rows.has_more)

    async def checkpoints(self, job_id: str, *, after: str | None = None, limit: int = 10) -> Page[JobCheckpoint]:
        rows = await self._of_job(CheckpointRow, job_id, after, limit)
        return Page(data=[records.as_checkpoint(row) for row in rows.data], has_more=rows.has_more)

    async def adapter_folder(self, job_id: str, checkpoint_id: str | None = None) -> Path:
        def find() -> Path:
            job = self._store.job(job_id)
            if checkpoint_id is not None:
                row = self._store.checkpoint(job_id, checkpoint_id)
            elif job.fine_tuned_model is not None:
                row = self._store.last_checkpoint(job_id)
                assert row is not None
            else:
                raise InvalidRequest(f"Job {job_id!r} is {job.status}; it has an adapter once it has succeeded.")
            return self._adapter_of(row)

        return await asyncio.to_thread(find)

    def stats(self) -> TrainingStats:
        running = [run for run in self._runs.values() if run.status is JobStatus.RUNNING]
        return TrainingStats(
            jobs=self._ended + Counter(run.status for run in self._runs.values()),
            trained_tokens=self._shared.trained_tokens,
            steps=self._shared.steps,
            granted_seconds=self._shared.engine.granted_seconds,
            metrics={run.id: dict(run.metrics) for run in running},
        )


class AsyncUpload:
    """engine.client.Upload over the store's."""

    def __init__(self, upload: Upload, store: TrainingStore):
        self._upload = upload
        self._store = store

    async def write(self, data: bytes) -> None:
        await asyncio.to_thread(self._upload.write, data)

    async def finish(self, filename: str, purpose: str) -> DataFile:
        return records.as_file(await asyncio.to_thread(self._store.add_file, self._upload, filename, purpose))

    async def discard(self) -> None:
        await asyncio.to_thread(self._upload.discard)
