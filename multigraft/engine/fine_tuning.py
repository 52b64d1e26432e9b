"""What the training manager needs of an engine; implements training.engine.TrainingEngine over an AsyncEngine."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from multigraft.core.errors import CapacityExceeded, InvalidRequest, ShuttingDown
from multigraft.training.adapter import AdapterDesign, TrainableAdapter
from multigraft.training.dataset import Dataset
from multigraft.training.job import Event, TrainingJob
from multigraft.training.spec import JobSpec

if TYPE_CHECKING:
    from .async_engine import AsyncEngine


class EngineTraining:
    """On the loop of its engine, or off it where the protocol says so."""

    def __init__(self, engine: AsyncEngine):
        self.engine = engine
        self.parts = engine.parts
        self.memory = engine.parts.trainer.memory

    @property
    def model_name(self) -> str:
        return self.engine.model_name

    @property
    def granted_seconds(self) -> float:
        return self.parts.scheduler.training.granted_seconds

    @property
    def tokenizer(self) -> EngineTokenizer:
        return EngineTokenizer(self.engine)

    def admit(self, spec: JobSpec) -> int:
        if self.parts.tokenizer is None:
            raise InvalidRequest(f"{self.model_name} has no tokenizer, so no training file can be read.")
        self.memory.check(self._nbytes(spec), 1)
        rows = self.memory.longest(self._nbytes(spec))
        rows //= 2 if spec.kind == "dpo" else 1  # a pair stays together
        return min(self.parts.max_model_len, rows)

    def fits(self, spec: JobSpec) -> bool:
        return self.memory.fits(self._nbytes(spec), self._longest(spec))

    def build(
        self, job_id: str, spec: JobSpec, train: Dataset, valid: Dataset | None, start: Path | None
    ) -> TrainingJob:
        make = partial(
            TrainableAdapter.new,
            spec.adapter,
            self._design(spec),
            seed=spec.seed,
            dtype=self.parts.loaded.dtype,
            device=self.parts.loaded.device,
            start=start,
        )
        return TrainingJob(
            id=job_id,
            spec=spec,
            adapter=make(),
            train=train,
            validation=valid,
            max_tokens=self.memory.microbatch(self._nbytes(spec), self._longest(spec)),
            reference=make() if spec.own_reference else None,
        )

    def start(self, job: TrainingJob, weight: float, on_event: Callable[[Event], None]) -> Future[None]:
        left: Future[None] = Future()
        self.memory.add(job.id, self._nbytes(job.spec), job.max_tokens)
        left.add_done_callback(lambda _: self.memory.remove(job.id))
        if not self.engine.post(partial(self.parts.trainer.start, job, weight, on_event, left)):
            left.set_exception(ShuttingDown("The engine has stopped and runs no jobs."))
        return left

    def stop(self, job_id: str) -> None:
        self.engine.post(partial(self.parts.trainer.stop, job_id))

    async def publish(self, name: str, folder: Path) -> None:
        await self.engine.load_adapter(name, str(folder), in_place=True, validate=False)  # we wrote it

    def withdraw(self, name: str) -> bool:
        return self.parts.store.unregister_unused(name)

    def _design(self, spec: JobSpec, *, split: bool = False) -> AdapterDesign:
        """split: as this rank of several serves it, not whole as it is trained."""
        limit = self.parts.config.adapters.max_lora_rank
        sites = self.parts.sites if split else [site.unsplit for site in self.parts.sites]
        return AdapterDesign.new(spec.adapter.resolve(), sites, base_model=self.model_name, max_rank=limit)

    def _nbytes(self, spec: JobSpec) -> int:
        """Of the adapter and all that its training keeps beside activations. CapacityExceeded if it could never be
        served."""
        design = self._design(spec)
        served = design if self.parts.ranks is None else self._design(spec, split=True)
        block, most = served.plan.numel * self.parts.loaded.dtype.itemsize, self.parts.bank.capacity_bytes
        if block > most:
            raise CapacityExceeded(
                f"The adapter would have {block} bytes, more than the {most} bytes for adapters on the device "
                f"(--adapter-memory-gib), so it could not be served."
            )
        return design.nbytes(self.parts.loaded.dtype) * (2 if spec.own_reference else 1)

    def _longest(self, spec: JobSpec) -> int:
        """Rows that no microbatch can divide."""
        length = spec.hyperparameters.max_length
        assert isinstance(length, int)
        return length * (2 if spec.kind == "dpo" else 1)


class EngineTokenizer:
    """Implements training.data.Tokenizer."""

    def __init__(self, engine: AsyncEngine):
        self._engine = engine
        self.tokenize = engine.tokenize
        self.detokenize = engine.detokenize

    @property
    def end_tokens(self) -> Sequence[int]:
        """What the tokenizer calls its end of sequence, then the model's others."""
        parts = self._engine.parts
        own = parts.tokenizer.eos_token_id
        return sorted(parts.eos_token_ids | ({own} if own is not None else set()), key=lambda t: (t != own, t))

    def apply_chat_template(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        add_generation_prompt: bool = True,
    ) -> list[int]:
        return self._engine.apply_chat_template(messages, tools=tools, add_generation_prompt=add_generation_prompt)
