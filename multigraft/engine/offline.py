"""The engine without a server: `Engine.generate` for lists of prompts, `Engine.stream` for asyncio."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Coroutine, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

from tqdm.auto import tqdm

from multigraft.core.config import (
    AdapterConfig,
    CacheConfig,
    EngineConfig,
    ModelConfig,
    ParallelConfig,
    SchedulerConfig,
)
from multigraft.core.errors import InvalidRequest
from multigraft.core.region import Scope, as_scope
from multigraft.core.request import FinishReason, Output, SamplingParams, TokenLogprobs
from multigraft.engine.async_engine import AsyncEngine
from multigraft.engine.client import EngineStats, ModelCard
from multigraft.kernels.openmp import release_pool

T = TypeVar("T")


@dataclass(slots=True)
class Completion:
    """One of the n completions of a prompt."""

    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprobs] | None = None
    finish_reason: FinishReason | None = None
    stop_reason: int | str | None = None


@dataclass(slots=True)
class Result:
    """What a prompt produced; `error` is set when it failed, alone of its list."""

    prompt: str | Sequence[int]
    adapter: str | None
    completions: list[Completion]
    prompt_token_ids: list[int] = field(default_factory=list)
    prompt_logprobs: list[TokenLogprobs | None] | None = None
    error: Exception | None = None

    @property
    def text(self) -> str:
        """Text of the first completion; raises the prompt's error when it failed."""
        if self.error is not None:
            raise self.error
        return self.completions[0].text


class Engine:
    """An engine in this process. Keyword arguments are the fields of the configuration classes, by name.

        engine = Engine("model-folder", max_loras=8, lora_modules=("pirate=examples/adapters/pirate",))
        print(engine.generate("Hello", SamplingParams(max_tokens=16), adapters="pirate")[0].text)

    Use as a context manager, or call `close()`.
    """

    def __init__(self, model: str | EngineConfig, **settings: Any):
        config = model if isinstance(model, EngineConfig) else make_config(model, **settings)
        release_pool()
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="multigraft-loop", daemon=True)
        self._thread.start()
        try:
            self._engine = self._call(AsyncEngine.start(config))
        except BaseException:
            self._end_loop()
            raise

    def _call(self, coroutine: Coroutine[Any, Any, T]) -> T:
        return asyncio.run_coroutine_threadsafe(coroutine, self._loop).result()

    def generate(
        self,
        prompts: str | Sequence[str] | Sequence[Sequence[int]],
        sampling: SamplingParams | Sequence[SamplingParams] | None = None,
        adapters: str | Sequence[str | None] | None = None,
        *,
        scope: Scope | str | None = None,
        progress: bool = False,
    ) -> list[Result]:
        """Complete every prompt, all in one running batch; results in the prompts' order.

        sampling, adapters: one for all, or one a prompt; adapter None is the base model. scope: "all" or "prefill", in
        place of the adapters' own. A prompt that fails has its `error` set, the others go on.
        """
        many: Sequence[Any] = [prompts] if isinstance(prompts, str) else prompts
        each_sampling = _one_each("sampling", sampling or SamplingParams(), len(many), SamplingParams)
        each_adapter = _one_each("adapters", adapters, len(many), (str, type(None)))
        return self._call(self._generate(many, each_sampling, each_adapter, as_scope(scope), progress))

    async def _generate(
        self,
        prompts: Sequence[Any],
        sampling: list[SamplingParams],
        adapters: list[str | None],
        scope: Scope | None,
        progress: bool,
    ) -> list[Result]:
        with tqdm(total=len(prompts), unit="prompt", disable=not progress) as bar:

            async def one(prompt: Any, params: SamplingParams, adapter: str | None) -> Result:
                result = Result(prompt, adapter, [Completion() for _ in range(params.n)])
                try:
                    async for output in self._engine.generate(prompt, params, model=adapter, scope=scope):
                        _collect(result, output)
                except Exception as error:
                    result.error = error
                bar.update()
                return result

            return list(await asyncio.gather(*map(one, prompts, sampling, adapters)))

    async def stream(
        self,
        prompt: str | Sequence[int],
        sampling: SamplingParams | None = None,
        adapter: str | None = None,
        *,
        scope: Scope | str | None = None,
    ) -> AsyncIterator[Output]:
        """The outputs of one prompt as they come, on the caller's own asyncio loop."""
        iterator = self._engine.generate(prompt, sampling or SamplingParams(), model=adapter, scope=as_scope(scope))
        try:
            while True:
                step = asyncio.run_coroutine_threadsafe(anext(iterator, None), self._loop)
                output = await asyncio.wrap_future(step)
                if output is None:
                    return
                yield output
        finally:
            await asyncio.wrap_future(asyncio.run_coroutine_threadsafe(iterator.aclose(), self._loop))

    def load_adapter(
        self, name: str, path: str, *, scope: Scope | str | None = None, in_place: bool = False
    ) -> ModelCard:
        """Register an adapter, or with in_place a new version of one; AdapterError says what is wrong with it."""
        return self._call(self._engine.load_adapter(name, path, scope=as_scope(scope), in_place=in_place))

    def unload_adapter(self, name: str) -> None:
        self._call(self._engine.unload_adapter(name))

    def models(self) -> list[ModelCard]:
        return self._engine.models()

    def stats(self) -> EngineStats:
        return self._engine.stats()

    @property
    def tokenizer(self) -> Any:
        return self._engine.parts.tokenizer

    def close(self) -> None:
        """Stop the engine; what still runs is aborted."""
        if self._thread.is_alive():
            self._call(self._engine.shutdown(0.0))
            self._end_loop()

    def _end_loop(self) -> None:
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()

    def __enter__(self) -> Engine:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


def make_config(model: str, **settings: Any) -> EngineConfig:
    """An EngineConfig from flat field names of its parts; a name that none has is refused with the choices."""
    parts = {
        "model": ModelConfig,
        "cache": CacheConfig,
        "scheduler": SchedulerConfig,
        "adapters": AdapterConfig,
        "parallel": ParallelConfig,
    }
    chosen: dict[str, dict[str, Any]] = {name: {} for name in parts}
    chosen["model"]["model"] = model
    top: dict[str, Any] = {}
    for key, value in settings.items():
        owner = next((name for name, cls in parts.items() if key in cls.__dataclass_fields__), None)
        if owner is not None:
            chosen[owner][key] = value
        elif key == "data_dir":
            top[key] = value
        else:
            choices = sorted({f for cls in parts.values() for f in cls.__dataclass_fields__} | {"data_dir"})
            raise InvalidRequest(f"Engine has no setting {key!r}; it has {', '.join(choices)}.", param=key)
    return EngineConfig(**{name: cls(**chosen[name]) for name, cls in parts.items()}, **top)


def _one_each(name: str, value: Any, count: int, single: Any) -> list[Any]:
    if isinstance(value, single):
        return [value] * count
    if len(value) != count:
        raise InvalidRequest(f"{name} has {len(value)} entries for {count} prompts; give one, or one a prompt.")
    return list(value)


def _collect(result: Result, output: Output) -> None:
    completion = result.completions[output.index]
    completion.text += output.text
    completion.token_ids += output.token_ids
    if output.logprobs is not None:
        completion.logprobs = (completion.logprobs or []) + output.logprobs
    if output.prompt_token_ids:
        result.prompt_token_ids = list(output.prompt_token_ids)
        result.prompt_logprobs = output.prompt_logprobs
    if output.finish_reason is not None:
        completion.finish_reason = output.finish_reason
        completion.stop_reason = output.stop_reason
