"""The engine behind asyncio front ends: implements engine.client.EngineClient."""

from __future__ import annotations

import asyncio
import itertools
import logging
import time
from collections.abc import AsyncGenerator, Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from multigraft.core.config import EngineConfig
from multigraft.core.errors import (
    ContextLengthExceeded,
    InvalidRequest,
    ShuttingDown,
)
from multigraft.core.region import Scope
from multigraft.core.request import AdapterRef, Output, Request, SamplingParams
from multigraft.engine.client import EngineInfo, EngineStats, ModelCard
from multigraft.engine.core import EngineCore, Submission
from multigraft.engine.detokenize import Detokenizer
from multigraft.engine.fine_tuning import EngineTraining
from multigraft.engine.parts import EngineParts, build
from multigraft.engine.structured import Matcher
from multigraft.kernels.openmp import release_pool
from multigraft.training.manager import TrainingManager, training_folder

log = logging.getLogger(__name__)

LONG_TEXT = 8192
"""Characters from which on tokenising leaves the event loop's thread."""


class AsyncEngine:
    """Use `await AsyncEngine.start(config)`; every method is called on the loop it was started on."""

    def __init__(self, parts: EngineParts):
        self.parts = parts
        self.training: TrainingManager | None = None
        self._core = EngineCore(parts, step_end=self._step_end)
        self._loop = asyncio.get_running_loop()
        self._delivered: list[tuple[asyncio.Queue[Output], Output]] = []
        self._numbers = itertools.count()
        self._closing = False
        self._created = int(time.time())

    @classmethod
    async def start(cls, config: EngineConfig, progress: Callable[[str], None] = log.info) -> AsyncEngine:
        """Load everything off the loop, then run. Raises MultigraftError for what the user can mend."""
        parts = await asyncio.to_thread(_build, config, progress)
        release_pool()
        engine = cls(parts)
        engine._core.start()
        return engine

    async def open_training(self) -> None:
        """Take up fine-tuning: its state under the data folder, unfinished jobs, adapters trained before.

        Does nothing when the configuration allows no jobs. InvalidRequest when another process has the state open.
        """
        config = self.parts.config
        if config.training.max_training_jobs and self.parts.trainer.memory.budget:
            folder = training_folder(Path(config.data_dir).expanduser(), self.model_name)
            self.training = await TrainingManager.open(EngineTraining(self), config.training, folder)

    def post(self, function: Callable[[], None]) -> bool:
        """Run `function` on the engine's thread, between two steps; False when that has ended and never will."""
        return self._core.post(function)

    @property
    def model_name(self) -> str:
        return self.parts.loaded.name

    @property
    def max_model_len(self) -> int:
        return self.parts.max_model_len

    @property
    def info(self) -> EngineInfo:
        loaded = self.parts.loaded
        return EngineInfo(
            device=str(loaded.device),
            dtype=str(loaded.dtype).removeprefix("torch."),
            kv_tokens=self.parts.kv_tokens,
        )

    @property
    def healthy(self) -> bool:
        return self._core.healthy

    def stats(self) -> EngineStats:
        return self._core.stats()

    # Requests --------------------------------------------------------------------------------------------------

    async def generate(
        self,
        prompt: str | Sequence[int],
        sampling: SamplingParams,
        *,
        model: str | None = None,
        scope: Scope | None = None,
        request_id: str | None = None,
        priority: int = 0,
    ) -> AsyncGenerator[Output, None]:
        if self._closing:
            raise ShuttingDown("The server is shutting down and takes no new requests.")
        if isinstance(prompt, str) and len(prompt) > LONG_TEXT:
            prompt = await asyncio.to_thread(self.tokenize, prompt)
        store = self.parts.store
        if model is not None and model in store and store.current(model) is None:
            await asyncio.to_thread(store.resolve, model)  # its first use reads its config
        submissions = await self._prepare(prompt, sampling, model, scope, request_id, priority)
        queue: asyncio.Queue[Output] = asyncio.Queue()
        running: set[str] = set()
        try:
            for submission in submissions:
                submission.sink = lambda output: self._delivered.append((queue, output))
                self._core.submit(submission)
                running.add(submission.request.id)
            while running:
                output = await queue.get()
                if output.error is not None:
                    raise output.error
                if output.finish_reason is not None:
                    running.discard(output.request_id)
                yield output
        finally:
            for unfinished in running:
                self._core.abort(unfinished)

    async def _prepare(
        self,
        prompt: str | Sequence[int],
        sampling: SamplingParams,
        model: str | None,
        scope: Scope | None,
        request_id: str | None,
        priority: int,
    ) -> list[Submission]:
        """One submission for each of the n completions, each holding its adapter version."""
        tokens = self.tokenize(prompt) if isinstance(prompt, str) else list(prompt)
        self._check(tokens, sampling)
        matchers: list[Matcher | None] = [None] * sampling.n
        if sampling.structured is not None:
            if self.parts.structured is None:
                raise InvalidRequest("Structured output needs a tokenizer, and this model has none.")
            compile_one = partial(self.parts.structured.compile, sampling.structured)
            matchers = [await asyncio.to_thread(compile_one) for _ in range(sampling.n)]
        base_id = request_id or f"request-{next(self._numbers)}"
        left = self.max_model_len - len(tokens)
        max_tokens = min(left, sampling.max_tokens or left)
        submissions = []
        for i in range(sampling.n):
            child = sampling.nth(i)
            request = Request(
                base_id if sampling.n == 1 else f"{base_id}-{i}",
                tokens,
                child,
                max_len=len(tokens) + max_tokens,
                adapter=self._acquire(model, scope),
                priority=priority,
            )
            detokenizer = Detokenizer(self.parts.tokenizer, tokens, child) if self.parts.tokenizer else None
            submissions.append(Submission(request, _nowhere, index=i, detokenizer=detokenizer, matcher=matchers[i]))
        return submissions

    def _acquire(self, model: str | None, scope: Scope | None) -> AdapterRef | None:
        if model is None or model == self.model_name:
            if scope is not None:
                raise InvalidRequest(
                    f"scope is {scope.value!r}, but {self.model_name} is the base model: name an adapter as the model.",
                    param="scope",
                )
            return None
        ref = self.parts.store.resolve(model).scoped(scope)
        self.parts.store.acquire(ref)
        return ref

    def _check(self, tokens: list[int], sampling: SamplingParams) -> None:
        vocab, limit = self.parts.vocab_size, self.max_model_len
        if not tokens:
            raise InvalidRequest("The prompt is empty; it needs at least one token.", param="prompt")
        wrong = next((t for t in tokens if not 0 <= t < vocab), None)
        if wrong is not None:
            raise InvalidRequest(f"Token id {wrong} is outside the vocabulary (0 to {vocab - 1}).", param="prompt")
        if len(tokens) >= limit:
            raise ContextLengthExceeded(
                f"The prompt has {len(tokens)} tokens; this model's context of {limit} tokens leaves room for a prompt "
                f"of at most {limit - 1}.",
                param="prompt",
            )
        if sampling.max_tokens is not None and len(tokens) + sampling.max_tokens > limit:
            raise ContextLengthExceeded(
                f"The prompt has {len(tokens)} tokens and max_tokens is {sampling.max_tokens}: together "
                f"{len(tokens) + sampling.max_tokens}, more than this model's context of {limit} tokens. "
                f"At most {limit - len(tokens)} output tokens fit.",
                param="max_tokens",
            )
        self.parts.sampler.validate(sampling)
        if sampling.stop and self.parts.tokenizer is None:
            raise InvalidRequest("Stop strings need a tokenizer, and this model has none.", param="stop")

    def _step_end(self) -> None:
        """On the engine's thread: hand a step's outputs to the loop in one wake-up."""
        delivered, self._delivered = self._delivered, []
        try:
            self._loop.call_soon_threadsafe(_deliver, delivered)
        except RuntimeError:  # the loop is closed, nobody listens any more
            log.debug("%d outputs had no reader", len(delivered))

    # Text ------------------------------------------------------------------------------------------------------

    def _tokenizer(self) -> Any:
        if self.parts.tokenizer is None:
            raise InvalidRequest(f"{self.model_name} has no tokenizer; send token ids.")
        return self.parts.tokenizer

    def tokenize(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        return self._tokenizer()(text, add_special_tokens=add_special_tokens)["input_ids"]

    def detokenize(self, token_ids: Sequence[int]) -> str:
        vocab = self.parts.vocab_size
        wrong = next((t for t in token_ids if not 0 <= t < vocab), None)
        if wrong is not None:
            raise InvalidRequest(f"Token id {wrong} is outside the vocabulary (0 to {vocab - 1}).", param="tokens")
        return self._tokenizer().decode(list(token_ids))

    def token_texts(self, token_ids: Sequence[int]) -> list[str]:
        return self._tokenizer().batch_decode([[t] for t in token_ids])

    def apply_chat_template(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        template_kwargs: Mapping[str, Any] | None = None,
    ) -> list[int]:
        tokenizer = self._tokenizer()
        if not tokenizer.chat_template:
            raise InvalidRequest(f"{self.model_name} has no chat template; give one with --chat-template.")
        try:
            text = tokenizer.apply_chat_template(
                list(messages),
                tools=list(tools) if tools else None,
                tokenize=False,
                add_generation_prompt=add_generation_prompt,
                continue_final_message=continue_final_message,
                **(template_kwargs or {}),
            )
        except Exception as error:  # templates raise whatever they like; all of it is about these messages
            raise InvalidRequest(f"The chat template refuses these messages: {error}", param="messages") from error
        return self.tokenize(text, add_special_tokens=False)

    # Adapters --------------------------------------------------------------------------------------------------

    def models(self) -> list[ModelCard]:
        base = ModelCard(
            name=self.model_name,
            root=self.parts.config.model.model,
            created=self._created,
            max_model_len=self.max_model_len,
        )
        adapters = [
            ModelCard(
                name=info.name,
                root=str(info.path),
                parent=self.model_name,
                created=info.created,
                max_model_len=self.max_model_len,
                scope=info.scope,
                version=info.version,
                rank=info.rank,
            )
            for info in self.parts.store.list()
        ]
        return [base, *adapters]

    async def load_adapter(
        self, name: str, path: str, *, scope: Scope | None = None, in_place: bool = False, validate: bool = True
    ) -> ModelCard:
        """validate: read the weights now, rather than when they are first asked for."""
        store = self.parts.store
        known = any(info.name == name for info in store.list())
        change = store.reload if in_place and known else store.register
        await asyncio.to_thread(change, name, path, scope, validate=validate)
        return next(card for card in self.models() if card.name == name)

    async def unload_adapter(self, name: str) -> None:
        self.parts.store.unregister(name)

    # End -------------------------------------------------------------------------------------------------------

    async def shutdown(self, grace_s: float) -> None:
        self._closing = True
        training, self.training = self.training, None
        if training is not None:
            await training.close()
        deadline = time.monotonic() + grace_s
        while self._core.num_live and self._core.healthy and time.monotonic() < deadline:
            await asyncio.sleep(0.02)
        await asyncio.to_thread(self._core.stop, 30.0)
        await asyncio.to_thread(self.parts.store.close)


def _build(config: EngineConfig, progress: Callable[[str], None]) -> EngineParts:
    try:
        return build(config, progress)
    finally:
        release_pool()  # the engine's thread has the cores to itself


def _deliver(outputs: list[tuple[asyncio.Queue[Output], Output]]) -> None:
    for queue, output in outputs:
        queue.put_nowait(output)


def _nowhere(output: Output) -> None:
    raise AssertionError("a submission was run without a sink")
