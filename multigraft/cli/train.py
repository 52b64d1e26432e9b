"""`multigraft train`: one fine-tuning job, in this process or on a running server, with its progress."""

from __future__ import annotations

import asyncio
import contextlib
import inspect
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import typer
from rich.console import Console

from multigraft.core.errors import InvalidRequest
from multigraft.core.training import FineTuneJob, JobRequest, JobStatus

from . import trainers
from .flags import all_flags, build
from .progress import follow
from .serve import build_engine_config, flag_parameter, user_errors

EPILOG = """[bold]Examples[/bold]

multigraft train Qwen/Qwen3-0.6B chats.jsonl --suffix support --output ./support

multigraft train ./model pairs.jsonl --method dpo --beta 0.2 --adapter-method loreft --r 4

multigraft train Qwen/Qwen3-0.6B chats.jsonl --server http://localhost:8000   [dim]# beside its requests[/dim]

multigraft train Qwen/Qwen3-0.6B --follow ftjob-0123 --server http://localhost:8000"""


@dataclass(frozen=True, kw_only=True)
class JobFlags:
    """None, or nothing: left to the server, which chooses from the data."""

    model: str
    """Base model: hub id, folder or .gguf file; with --server, its name there."""
    data: Path | None = None
    """Training data: JSON lines in one of OpenAI's formats."""
    method: Literal["supervised", "dpo"] = "supervised"
    """What is learned from: examples, or preferences."""
    validation: Path | None = None
    """Data that is not trained on, to measure the loss with."""
    start: str | None = None
    """Trained adapter to go on from, by its name (ft:...); its settings are taken over."""
    suffix: str | None = None
    """Part of the trained model's name."""
    output: Path | None = None
    """New folder for the adapter, in PEFT's format."""
    n_epochs: int | None = None
    """Times that the data is seen."""
    batch_size: int | None = None
    """Samples of an optimizer step."""
    learning_rate: float | None = None
    """Peak learning rate."""
    max_length: int | None = None
    """Longest sample, in tokens; longer ones are left out."""
    checkpoint_steps: int | None = None
    """Optimizer steps between checkpoints."""
    beta: float | None = None
    """dpo: how strongly the base model is held to."""
    seed: int | None = None
    """Of the data's order, the adapter's start, and dropout."""
    weight: float = 1.0
    """Share of the training time, relative to other jobs'."""
    set: tuple[str, ...] = ()
    """Any other setting of docs/fine-tuning.md, as --set schedule=cosine."""
    server: str | None = None
    """URL of a running server, which trains beside its requests; the default trains in this process."""
    api_key: str | None = None
    """The server's key; the default is OPENAI_API_KEY of the environment."""
    follow: str | None = None
    """Show this job, which is there already, in place of a new one."""


@dataclass(frozen=True, kw_only=True)
class AdapterFlags:
    adapter_method: Literal["lora", "rslora", "bdlora", "loreft", "direft", "noreft", "nodireft"] | None = None
    """Kind of the adapter; the default is lora."""
    r: int | None = None
    """Rank."""
    alpha: float | None = None
    """LoRA's scale is alpha / r."""
    dropout: float | None = None
    """Share of LoRA's inputs that is zeroed."""
    nblocks: int | None = None
    """Blocks of bdlora's factors: the tensor-parallel size to serve it with; the default is 2."""
    target_modules: tuple[str, ...] = ()
    """Linears that are adapted; the default is all of them."""
    layers: tuple[int, ...] = ()
    """Decoder layers that are adapted; the default is all of them."""
    scope: Literal["all", "prefill"] | None = None
    """prefill: only prompts are adapted."""


PANELS: dict[type, str] = {JobFlags: "Job", AdapterFlags: "Adapter"}
HYPERPARAMETERS = ("n_epochs", "batch_size", "learning_rate", "max_length", "checkpoint_steps", "beta")
ENGINE_FLAGS = (
    "tokenizer", "revision", "dtype", "device", "max_model_len", "load_format", "chat_template", "trust_remote_code",
    "kv_cache_gib", "gpu_memory_utilization", "max_lora_rank", "tensor_parallel_size", "train_memory_gib", "data_dir",
)  # fmt: skip
"""What an engine of our own can be told, of `multigraft serve`'s flags."""


def register(app: typer.Typer) -> None:
    def train(**values: Any) -> None:
        """Fine-tune an adapter on a base model."""
        run(values)

    engine = [flag for flag in all_flags() if flag.name in ENGINE_FLAGS]
    parameters = [flag_parameter(flag) for flag in [*all_flags(PANELS), *engine]]
    train.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    train.__annotations__ = {p.name: p.annotation for p in parameters}
    app.command("train", epilog=EPILOG)(train)


def run(values: dict[str, Any]) -> None:
    flags, adapter = build(JobFlags, values), build(AdapterFlags, values)
    with user_errors():
        if (flags.data is None) == (flags.follow is None):
            raise InvalidRequest("Give either DATA, for a new job, or --follow JOB.", param="data")
        if flags.output is not None and flags.output.exists():
            raise InvalidRequest(f"--output: {flags.output} is there already.", param="output")
        if flags.server is None:
            place = trainers.local(build_engine_config({f.name: f.default for f in all_flags()} | values))
        else:
            place = trainers.remote(flags.server, flags.api_key or os.environ.get("OPENAI_API_KEY", "none"))
        job = asyncio.run(_train(place, flags, adapter))
    raise typer.Exit(0 if job.status is JobStatus.SUCCEEDED else 1)


async def _train(
    place: contextlib.AbstractAsyncContextManager[trainers.Trainer], flags: JobFlags, adapter: AdapterFlags
) -> FineTuneJob:
    console = Console(stderr=True)
    async with place as trainer:
        if flags.follow is not None:
            job = await trainer.job(flags.follow)
        else:
            job = await trainer.create(await _request(trainer, flags, adapter))
        try:
            job = await follow(trainer, job, console)
        except asyncio.CancelledError:  # Ctrl-C
            console.print(_after_interrupt(job, flags), markup=False, highlight=False, soft_wrap=True)
            raise
        if job.status is JobStatus.SUCCEEDED:
            console.print(
                f"Trained: {job.fine_tuned_model}", style="bold", markup=False, highlight=False, soft_wrap=True
            )
            if flags.output is not None:
                await trainer.save(job.id, flags.output)
                console.print(f"Adapter: {flags.output}", markup=False, highlight=False)
        return job


async def _request(trainer: trainers.Trainer, flags: JobFlags, adapter: AdapterFlags) -> JobRequest:
    assert flags.data is not None
    chosen = {name: getattr(flags, name) for name in HYPERPARAMETERS}
    kind = {
        "method": adapter.adapter_method,
        "r": adapter.r,
        "alpha": adapter.alpha,
        "dropout": adapter.dropout,
        "nblocks": adapter.nblocks,
        "target_modules": _modules(adapter.target_modules),
        "layers": list(adapter.layers) or None,
        "scope": adapter.scope,
    }
    return JobRequest(
        model=flags.start or flags.model,
        training_file=await trainer.send(flags.data),
        validation_file=None if flags.validation is None else await trainer.send(flags.validation),
        method=flags.method,
        hyperparameters={k: v for k, v in chosen.items() if v is not None} | _settings(flags.set),
        adapter={k: v for k, v in kind.items() if v is not None},
        weight=flags.weight,
        seed=flags.seed,
        suffix=flags.suffix,
    )


def _modules(names: Sequence[str]) -> str | list[str] | None:
    return "all-linear" if tuple(names) == ("all-linear",) else list(names) or None


def _settings(texts: Sequence[str]) -> dict[str, Any]:
    """name=value, where value is JSON or else a word."""
    settings = {}
    for text in texts:
        name, equals, value = text.partition("=")
        if not equals:
            raise InvalidRequest(f"--set {text}: it must be as name=value.", param="set")
        try:
            settings[name.replace("-", "_")] = json.loads(value)
        except ValueError:
            settings[name.replace("-", "_")] = value
    return settings


def _after_interrupt(job: FineTuneJob, flags: JobFlags) -> str:
    back = f"multigraft train {flags.model} --follow {job.id}"
    if flags.server is not None:
        return f"The job goes on there; to see it again: {back} --server {flags.server}"
    return f"The job keeps its last step; to go on, with the same flags for the model and --data-dir: {back}"
