"""What a job is computed from: its settled spec and its tokenised files."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Sequence
from dataclasses import dataclass, replace

from multigraft.core.errors import MultigraftError
from multigraft.core.region import FromInvocation, Scope
from multigraft.core.training import JobRequest

from . import data
from .dataset import Dataset
from .engine import TrainingEngine
from .spec import JobSpec
from .store import TrainingStore


@dataclass(frozen=True, slots=True)
class Inputs:
    spec: JobSpec
    """Resolved."""
    train: Dataset
    valid: Dataset | None
    notes: list[str]
    """What the user should know about the files."""

    @property
    def num_steps(self) -> int:
        h = self.spec.hyperparameters
        return h.n_epochs * -(-len(self.train) // h.batch_size)


class _Abandoned(Exception):
    """Nobody waits for the data that is being read."""


def parse_spec(request: JobRequest, base_model: str) -> JobSpec:
    """base_model: its name; a job on another model goes on from that adapter."""
    return JobSpec.parse(
        kind=request.method,
        hyperparameters=request.hyperparameters,
        adapter=request.adapter,
        seed=request.seed,
        start=None if request.model == base_model else request.model,
    )


def settled(request: JobRequest, spec: JobSpec) -> JobRequest:
    """The request with the spec's values in place of what they were made from."""
    values = spec.to_dict()
    return replace(request, **{name: values[name] for name in ("hyperparameters", "adapter", "seed")})


async def read_inputs(request: JobRequest, store: TrainingStore, engine: TrainingEngine) -> Inputs:
    """Reads in a thread, until it is done or this is cancelled. InvalidRequest or NotFound; param is the file's."""
    abandoned = threading.Event()

    def stay(done: int, total: int) -> None:
        if abandoned.is_set():
            raise _Abandoned

    def read_all() -> Inputs:
        spec = parse_spec(request, engine.model_name)
        max_length = spec.max_length(engine.admit(spec))

        def read(param: str) -> Dataset:
            try:
                return data.read(
                    store.file_path(getattr(request, param)),
                    engine.tokenizer,
                    kind=spec.kind,
                    max_length=max_length,
                    depends_on_prompt=spec.adapter.depends_on_prompt,
                    progress=stay,
                )
            except MultigraftError as error:
                error.param = param
                raise

        train = read("training_file")
        valid = read("validation_file") if request.validation_file is not None else None
        there = {"training": train} | ({} if valid is None else {"validation": valid})
        notes = [_describe_too_long(d, what, max_length) for what, d in there.items() if d.too_long]
        notes += _uninvoked(train, spec.adapter.alora_invocation_tokens)
        return Inputs(spec.resolve(len(train), max(d.longest for d in there.values())), train, valid, notes)

    try:
        return await asyncio.to_thread(read_all)
    finally:
        abandoned.set()


def _uninvoked(dataset: Dataset, invocation: Sequence[int] | None) -> list[str]:
    """A note of the prompts that an activated LoRA leaves to the base model, so that their answers teach nothing;
    DataError when these are all."""
    if invocation is None:
        return []
    region = FromInvocation(tuple(invocation))
    prompts = (sample.tokens[: sample.prompt_len] for (sample, *_) in map(dataset.__getitem__, range(len(dataset))))
    uninvoked = sum(not region.ranges(prompt, len(prompt), Scope.ALL) for prompt in prompts)
    what = f"{uninvoked} of {len(dataset)} prompts lack the invocation sequence {list(invocation)}"
    if uninvoked == len(dataset):
        raise data.DataError(f"{what} (alora_invocation_tokens): there is nothing to learn.")
    return [f"{what}: their answers are not learned"] if uninvoked else []


def _describe_too_long(dataset: Dataset, what: str, max_length: int) -> str:
    lines = ", ".join(map(str, dataset.too_long[:10])) + (", ..." if len(dataset.too_long) > 10 else "")
    return (
        f"{len(dataset.too_long)} lines of the {what} file are left out, for samples of more than {max_length} tokens: "
        f"{lines}"
    )
