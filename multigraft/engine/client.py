"""What a front end needs of the engine; `AsyncEngine` implements it, front ends see nothing else of the engine.

Every method that takes user input raises core.errors.MultigraftError subclasses for the user's mistakes.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from multigraft.core.region import Scope
from multigraft.core.request import Output, SamplingParams
from multigraft.core.training import (
    DataFile,
    FineTuneJob,
    JobCheckpoint,
    JobEvent,
    JobRequest,
    Page,
    TrainingStats,
)


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelCard:
    """A model name that requests may use: the base model or an adapter."""

    name: str
    root: str
    """The base model as it was given, or the adapter's folder."""
    parent: str | None = None
    """None for the base model; the base model's name for an adapter."""
    created: int = 0
    max_model_len: int | None = None
    scope: Scope | None = None
    version: int | None = None
    rank: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineStats:
    """A snapshot of counters and gauges; counters only grow."""

    num_running: int = 0
    num_waiting: int = 0
    kv_cache_usage: float = 0.0
    """Share of KV pages in use, 0 to 1."""
    prompt_tokens: int = 0
    generation_tokens: int = 0
    preemptions: int = 0
    prefix_cache_queries: int = 0
    """Tokens looked up in the prefix index."""
    prefix_cache_hits: int = 0
    """Tokens found there."""
    max_loras: int = 0
    running_adapters: tuple[str, ...] = ()
    waiting_adapters: tuple[str, ...] = ()
    slots_used: int = 0
    adapter_loads: int = 0
    adapter_load_seconds: float = 0.0
    steps: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineInfo:
    """What the engine settled on at start, where the configuration said "auto"."""

    device: str
    dtype: str
    kv_tokens: int
    """Tokens that the KV pages hold."""


class EngineClient(Protocol):
    """One engine behind any number of front ends, on one asyncio loop."""

    @property
    def info(self) -> EngineInfo: ...

    @property
    def model_name(self) -> str:
        """The served name of the base model."""
        ...

    @property
    def max_model_len(self) -> int: ...

    @property
    def training(self) -> TrainingClient | None:
        """None when this engine does not fine-tune."""
        ...

    def generate(
        self,
        prompt: str | Sequence[int],
        sampling: SamplingParams,
        *,
        model: str | None = None,
        scope: Scope | None = None,
        request_id: str | None = None,
        priority: int = 0,
    ) -> AsyncGenerator[Output, None]:
        """Stream the deltas of one prompt; with n > 1 the completions interleave, told apart by `index`.

        model: base or adapter name; None is the base. scope: in place of the adapter's own. Closing the iterator
        aborts the request. The first Output of each index carries prompt_token_ids. Raises at the first iteration:
        ModelNotFound, ContextLengthExceeded, InvalidRequest (also a scope the adapter cannot have), AdapterError (its
        files failed to load), ShuttingDown.
        """
        ...

    def models(self) -> list[ModelCard]:
        """The base model first, then adapters by name."""
        ...

    def tokenize(self, text: str, *, add_special_tokens: bool = True) -> list[int]: ...

    def detokenize(self, token_ids: Sequence[int]) -> str: ...

    def token_texts(self, token_ids: Sequence[int]) -> list[str]:
        """The text of each token alone, as log-probability listings show it."""
        ...

    def apply_chat_template(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        template_kwargs: Mapping[str, Any] | None = None,
    ) -> list[int]:
        """Token ids of a chat; InvalidRequest when the template refuses the messages or there is none."""
        ...

    async def load_adapter(
        self, name: str, path: str, *, scope: Scope | None = None, in_place: bool = False
    ) -> ModelCard:
        """Read, validate and register an adapter. in_place: a new version of a registered name."""
        ...

    async def unload_adapter(self, name: str) -> None:
        """Running requests finish; ModelNotFound when it is not registered."""
        ...

    def stats(self) -> EngineStats: ...

    @property
    def healthy(self) -> bool:
        """False once the engine's loop has died; its error was logged."""
        ...

    async def shutdown(self, grace_s: float) -> None:
        """Refuse new requests, let running ones finish for at most grace_s seconds, then stop."""
        ...


class Upload(Protocol):
    """A file on its way in. It must be finished or discarded; discarding after that is harmless."""

    async def write(self, data: bytes) -> None:
        """TooLarge once the file exceeds core.training.MAX_FILE_BYTES; StorageFull."""
        ...

    async def finish(self, filename: str, purpose: str) -> DataFile: ...

    async def discard(self) -> None: ...


class TrainingClient(Protocol):
    """Fine-tuning as a front end sees it. Nothing here waits for a disk on the caller's loop.

    Lists give `limit` elements behind the one of id `after`, the newest first. NotFound for an unknown id.
    """

    async def upload(self) -> Upload: ...

    async def files(
        self, *, after: str | None = None, limit: int = 10_000, purpose: str | None = None, ascending: bool = False
    ) -> Page[DataFile]: ...

    async def file(self, file_id: str) -> DataFile: ...

    async def file_path(self, file_id: str) -> Path:
        """Where the file's content lies."""
        ...

    async def delete_file(self, file_id: str) -> None:
        """A job that has yet to read it will fail."""
        ...

    async def create(self, request: JobRequest) -> FineTuneJob:
        """Start a job. InvalidRequest, ModelNotFound, NotFound for what it names; CapacityExceeded when it can never
        fit the memory. The data is read afterwards: its mistakes are the job's error."""
        ...

    async def jobs(
        self, *, after: str | None = None, limit: int = 20, metadata: Mapping[str, str] | None = None
    ) -> Page[FineTuneJob]:
        """metadata: only jobs that have all of these pairs."""
        ...

    async def job(self, job_id: str) -> FineTuneJob: ...

    async def cancel(self, job_id: str) -> FineTuneJob:
        """InvalidRequest, as for the next two, when the job's state does not allow it."""
        ...

    async def pause(self, job_id: str) -> FineTuneJob:
        """Write a checkpoint and stop until resume()."""
        ...

    async def resume(self, job_id: str) -> FineTuneJob: ...

    async def events(self, job_id: str, *, after: str | None = None, limit: int = 20) -> Page[JobEvent]: ...

    async def checkpoints(self, job_id: str, *, after: str | None = None, limit: int = 10) -> Page[JobCheckpoint]: ...

    async def adapter_folder(self, job_id: str, checkpoint_id: str | None = None) -> Path:
        """PEFT folder of a job that has succeeded, or of a checkpoint; InvalidRequest when there is none yet."""
        ...

    def stats(self) -> TrainingStats: ...
