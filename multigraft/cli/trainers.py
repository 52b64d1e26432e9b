"""The two places where `multigraft train` finds a job done: an engine in this process, and a running server."""

from __future__ import annotations

import contextlib
import io
import shutil
import zipfile
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any, Protocol

from multigraft.core.config import EngineConfig
from multigraft.core.errors import InvalidRequest
from multigraft.core.training import FINE_TUNE, FineTuneJob, JobError, JobEvent, JobRequest, JobStatus
from multigraft.engine.client import TrainingClient

PIECE = 2**20


class Trainer(Protocol):
    async def send(self, path: Path) -> str:
        """Upload a data file; its id."""
        ...

    async def create(self, request: JobRequest) -> FineTuneJob: ...

    async def job(self, job_id: str) -> FineTuneJob: ...

    async def events(self, job_id: str, limit: int) -> list[JobEvent]:
        """The newest, newest first."""
        ...

    async def save(self, job_id: str, folder: Path) -> None:
        """Put the job's adapter into a new folder."""
        ...


@contextlib.asynccontextmanager
async def local(config: EngineConfig) -> AsyncIterator[Trainer]:
    """An engine of our own, for as long as it is needed."""
    from multigraft.engine.async_engine import AsyncEngine  # torch, kept away from --help

    engine = await AsyncEngine.start(config)
    try:
        await engine.open_training()
        if engine.training is None:
            raise InvalidRequest("Fine-tuning is off: --max-training-jobs must be at least 1.")
        yield _Local(engine.training)
    finally:
        await engine.shutdown(0.0)


class _Local:
    def __init__(self, client: TrainingClient):
        self._client = client
        self.create = client.create
        self.job = client.job

    async def send(self, path: Path) -> str:
        upload = await self._client.upload()
        try:
            with _open(path) as file:
                while piece := file.read(PIECE):
                    await upload.write(piece)
            return (await upload.finish(path.name, FINE_TUNE)).id
        finally:
            await upload.discard()

    async def events(self, job_id: str, limit: int) -> list[JobEvent]:
        return (await self._client.events(job_id, limit=limit)).data

    async def save(self, job_id: str, folder: Path) -> None:
        shutil.copytree(await self._client.adapter_folder(job_id), folder)


@contextlib.asynccontextmanager
async def remote(url: str, api_key: str) -> AsyncIterator[Trainer]:
    """A server's, through the openai package. What it refuses is an InvalidRequest here."""
    try:
        import openai
    except ImportError:
        raise InvalidRequest("--server needs the package openai: pip install openai.", param="server") from None
    base = url.rstrip("/").removesuffix("/v1")
    async with openai.AsyncOpenAI(base_url=f"{base}/v1", api_key=api_key) as client:
        try:
            yield _Remote(client)
        except openai.APIStatusError as error:
            body = error.body if isinstance(error.body, dict) else {}
            raise InvalidRequest(body.get("message") or str(error)) from None
        except openai.APIConnectionError as error:
            raise InvalidRequest(f"Cannot reach {url}: {error.__cause__ or error}.", param="server") from None


class _Remote:
    def __init__(self, client: Any):
        self._client = client
        self._jobs = client.fine_tuning.jobs

    async def send(self, path: Path) -> str:
        with _open(path) as file:
            return (await self._client.files.create(file=file, purpose=FINE_TUNE)).id

    async def create(self, request: JobRequest) -> FineTuneJob:
        optional = {name: getattr(request, name) for name in ("validation_file", "suffix", "seed")}
        job = await self._jobs.create(
            model=request.model,
            training_file=request.training_file,
            method={"type": request.method, request.method: {"hyperparameters": dict(request.hyperparameters)}},
            extra_body={"adapter": dict(request.adapter), "weight": request.weight},
            **{name: value for name, value in optional.items() if value is not None},
        )
        return _as_job(job)

    async def job(self, job_id: str) -> FineTuneJob:
        return _as_job(await self._jobs.retrieve(job_id))

    async def events(self, job_id: str, limit: int) -> list[JobEvent]:
        page = await self._jobs.list_events(job_id, limit=limit)
        return [
            JobEvent(id=e.id, created=e.created_at, level=e.level, message=e.message, data=e.data) for e in page.data
        ]

    async def save(self, job_id: str, folder: Path) -> None:
        from openai import HttpxBinaryResponseContent

        path = f"/fine_tuning/jobs/{job_id}/adapter"
        reply = await self._client.get(path, cast_to=HttpxBinaryResponseContent)
        with zipfile.ZipFile(io.BytesIO(reply.content)) as archive:
            folder.mkdir(parents=True)
            for name in archive.namelist():
                (folder / Path(name).name).write_bytes(archive.read(name))


def _as_job(job: Any) -> FineTuneJob:
    request = JobRequest(model=job.model, training_file=job.training_file, method=job.method.type, seed=job.seed)
    error = job.error
    return FineTuneJob(
        id=job.id,
        request=request,
        status=JobStatus(job.status),
        created=job.created_at,
        finished=job.finished_at,
        estimated_finish=job.estimated_finish,
        step=job.step,
        total_steps=job.total_steps,
        trained_tokens=job.trained_tokens,
        fine_tuned_model=job.fine_tuned_model,
        result_files=tuple(job.result_files),
        error=error and JobError(code=error.code, message=error.message, param=error.param),
    )


def _open(path: Path) -> Any:
    try:
        return path.open("rb")
    except OSError as error:
        raise InvalidRequest(f"Cannot read {path}: {error.strerror}.", param="data") from None
