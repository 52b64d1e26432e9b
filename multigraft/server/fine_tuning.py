"""/v1/fine_tuning/jobs, OpenAI's, and beside it the trained adapters as PEFT folders."""

from __future__ import annotations

from typing import Annotated, Any

from fastapi import APIRouter, Query, Request
from starlette.responses import Response

from multigraft.core.training import ORGANIZATION, FineTuneJob, JobCheckpoint, JobEvent, JobRequest, WandbRun
from multigraft.engine.client import TrainingClient

from .archive import zip_reply
from .replies import JSONReply, listed
from .schemas import FineTuningRequest

Limit = Annotated[int, Query(ge=1, le=1000)]


def router(training: TrainingClient) -> APIRouter:
    routes = APIRouter(prefix="/v1/fine_tuning/jobs")

    @routes.post("")
    async def create(body: FineTuningRequest) -> Response:
        return JSONReply(_show_job(await training.create(_parse(body))))

    @routes.get("")
    async def list_jobs(request: Request, after: str | None = None, limit: Limit = 20) -> Response:
        wanted = {
            key.removeprefix("metadata[").removesuffix("]"): value
            for key, value in request.query_params.items()
            if key.startswith("metadata[")
        }
        return JSONReply(listed(await training.jobs(after=after, limit=limit, metadata=wanted), _show_job))

    @routes.get("/{job_id}")
    async def get_job(job_id: str) -> Response:
        return JSONReply(_show_job(await training.job(job_id)))

    @routes.post("/{job_id}/cancel")
    async def cancel(job_id: str) -> Response:
        return JSONReply(_show_job(await training.cancel(job_id)))

    @routes.post("/{job_id}/pause")
    async def pause(job_id: str) -> Response:
        return JSONReply(_show_job(await training.pause(job_id)))

    @routes.post("/{job_id}/resume")
    async def resume(job_id: str) -> Response:
        return JSONReply(_show_job(await training.resume(job_id)))

    @routes.get("/{job_id}/events")
    async def events(job_id: str, after: str | None = None, limit: Limit = 20) -> Response:
        return JSONReply(listed(await training.events(job_id, after=after, limit=limit), _show_event))

    @routes.get("/{job_id}/checkpoints")
    async def checkpoints(job_id: str, after: str | None = None, limit: Limit = 10) -> Response:
        return JSONReply(listed(await training.checkpoints(job_id, after=after, limit=limit), _show_checkpoint))

    @routes.get("/{job_id}/adapter")
    async def adapter(job_id: str) -> Response:
        return zip_reply(await training.adapter_folder(job_id), job_id)

    @routes.get("/{job_id}/checkpoints/{checkpoint_id}/adapter")
    async def checkpoint_adapter(job_id: str, checkpoint_id: str) -> Response:
        return zip_reply(await training.adapter_folder(job_id, checkpoint_id), checkpoint_id)

    return routes


def _parse(body: FineTuningRequest) -> JobRequest:
    wandb = body.integrations[0].wandb if body.integrations else None
    return JobRequest(
        model=body.model,
        training_file=body.training_file,
        validation_file=body.validation_file,
        method=body.method.type,
        hyperparameters=body.method.hyperparameters or body.hyperparameters,
        adapter=body.adapter,
        weight=body.weight,
        seed=body.seed,
        suffix=body.suffix,
        metadata=body.metadata,
        wandb=wandb and WandbRun(project=wandb.project, name=wandb.name, entity=wandb.entity, tags=tuple(wandb.tags)),
    )


def _show_job(job: FineTuneJob) -> dict[str, Any]:
    request, error = job.request, job.error
    return {
        "id": job.id,
        "object": "fine_tuning.job",
        "created_at": job.created,
        "finished_at": job.finished,
        "estimated_finish": job.estimated_finish,
        "model": request.model,
        "fine_tuned_model": job.fine_tuned_model,
        "organization_id": ORGANIZATION,
        "status": job.status.value,
        "error": error and {"code": error.code, "message": error.message, "param": error.param},
        "training_file": request.training_file,
        "validation_file": request.validation_file,
        "result_files": list(job.result_files),
        "trained_tokens": job.trained_tokens,
        "hyperparameters": dict(request.hyperparameters),
        "method": {"type": request.method, request.method: {"hyperparameters": dict(request.hyperparameters)}},
        "adapter": dict(request.adapter),
        "weight": request.weight,
        "seed": request.seed,
        "user_provided_suffix": request.suffix,
        "metadata": dict(request.metadata),
        "integrations": [_show_wandb(request.wandb)] if request.wandb else [],
        "step": job.step,
        "total_steps": job.total_steps,
    }


def _show_wandb(run: WandbRun) -> dict[str, Any]:
    shown = {"project": run.project, "name": run.name, "entity": run.entity, "tags": list(run.tags)}
    return {"type": "wandb", "wandb": shown}


def _show_event(event: JobEvent) -> dict[str, Any]:
    return {
        "id": event.id,
        "object": "fine_tuning.job.event",
        "created_at": event.created,
        "level": event.level,
        "message": event.message,
        "type": "message" if event.data is None else "metrics",
        "data": None if event.data is None else dict(event.data),
    }


def _show_checkpoint(checkpoint: JobCheckpoint) -> dict[str, Any]:
    # OpenAI tells validations of a batch from those of the whole file: ours are all of the whole file.
    full = {f"full_{name}": value for name, value in checkpoint.metrics.items() if name.startswith("valid_")}
    return {
        "id": checkpoint.id,
        "object": "fine_tuning.job.checkpoint",
        "created_at": checkpoint.created,
        "fine_tuned_model_checkpoint": checkpoint.model,
        "fine_tuning_job_id": checkpoint.job_id,
        "step_number": checkpoint.step,
        "metrics": {**checkpoint.metrics, **full},
    }
