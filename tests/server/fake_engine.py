"""An EngineClient without a model, for tests of its front ends.

Tokens are characters: token id = code point, so every text offset and count can be checked by hand. The answer
to a prompt is scripted; `delay` seconds pass before each token. What was asked and aborted is recorded.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from multigraft.core.errors import (
    AdapterError,
    ContextLengthExceeded,
    InvalidRequest,
    ModelNotFound,
    ShuttingDown,
)
from multigraft.core.request import FinishReason, Logprob, Output, SamplingParams, Scope, TokenLogprobs
from multigraft.engine.client import EngineInfo, EngineStats, ModelCard, TrainingClient


@dataclass
class Call:
    prompt: str | list[int]
    sampling: SamplingParams
    model: str | None
    request_id: str | None
    priority: int
    scope: Scope | None = None


class FakeEngine:
    model_name = "base"
    max_model_len = 200
    info = EngineInfo(device="cpu", dtype="float32", kv_tokens=1000)
    training: TrainingClient | None = None

    def __init__(self, answer: str = "Hello!", *, delay: float = 0.0, fail_at: int | None = None):
        """fail_at: raise RuntimeError in place of this token."""
        self.answer = answer
        self.delay = delay
        self.fail_at = fail_at
        self.healthy = True
        self.calls: list[Call] = []
        self.chats: list[dict[str, Any]] = []
        self.aborted: list[str | None] = []
        self.running = 0
        self.closing = False
        self.shutdowns: list[float] = []
        self.adapters = {"french": ModelCard(
            name="french", root="/adapters/french", parent="base", scope=Scope.PREFILL, version=1, rank=8
        )}  # fmt: skip

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
        if self.closing:
            raise ShuttingDown("The engine is shutting down.")
        if model not in (None, "base", *self.adapters):
            raise ModelNotFound(f"no {model}")
        ids = self.tokenize(prompt) if isinstance(prompt, str) else list(prompt)
        if len(ids) + (sampling.max_tokens or 1) > self.max_model_len:
            raise ContextLengthExceeded(f"{len(ids)} tokens do not fit {self.max_model_len}.", param="prompt")
        self.calls.append(Call(prompt, sampling, model, request_id, priority, scope))
        self.running += 1
        finished = False
        try:
            text = self.answer[: sampling.max_tokens]
            for at in range(len(text)):
                await asyncio.sleep(self.delay)
                for index in range(sampling.n):
                    if at == self.fail_at:
                        raise RuntimeError("the device is on fire")
                    yield self._output(ids, text, at, index, sampling, request_id)
            finished = True
        finally:
            self.running -= 1
            if not finished:
                self.aborted.append(request_id)

    def _output(
        self, ids: list[int], text: str, at: int, index: int, sampling: SamplingParams, request_id: str | None
    ) -> Output:
        first, last = at == 0, at == len(text) - 1
        cut = len(text) < len(self.answer)
        token = ord(text[at])
        prompt_logprobs = None
        if first and sampling.prompt_logprobs is not None:
            prompt_logprobs = [None, *(_logprobs(i, sampling.prompt_logprobs) for i in ids[1:])]
        return Output(
            request_id=request_id or "",
            index=index,
            text=text[at],
            token_ids=[token],
            logprobs=None if sampling.logprobs is None else [_logprobs(token, sampling.logprobs)],
            prompt_logprobs=prompt_logprobs,
            finish_reason=(FinishReason.LENGTH if cut else FinishReason.STOP) if last else None,
            prompt_token_ids=ids if first else (),
            num_cached_tokens=len(ids) // 2 if first else 0,
            queue_seconds=0.25 if first else None,
        )

    def models(self) -> list[ModelCard]:
        base = ModelCard(name="base", root="/models/base", created=7, max_model_len=self.max_model_len)
        return [base, *(self.adapters[name] for name in sorted(self.adapters))]

    def tokenize(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        return ([2] if add_special_tokens else []) + [ord(c) for c in text]

    def detokenize(self, token_ids: Sequence[int]) -> str:
        return "".join(chr(i) for i in token_ids if i != 2)

    def token_texts(self, token_ids: Sequence[int]) -> list[str]:
        return [chr(i) for i in token_ids]

    def apply_chat_template(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        template_kwargs: Mapping[str, Any] | None = None,
    ) -> list[int]:
        if messages[0]["role"] == "martian":
            raise InvalidRequest("The chat template refuses the role 'martian'.", param="messages")
        self.chats.append(
            {
                "messages": list(messages),
                "tools": tools,
                "add_generation_prompt": add_generation_prompt,
                "continue_final_message": continue_final_message,
                "template_kwargs": dict(template_kwargs or {}),
            }
        )
        return [ord(c) for m in messages for c in f"{m['role']}:{m['content']}\n"]

    async def load_adapter(
        self, name: str, path: str, *, scope: Scope | None = None, in_place: bool = False
    ) -> ModelCard:
        if path == "/broken":
            raise AdapterError("/broken has no adapter_model.safetensors.", param="lora_path")
        version = self.adapters[name].version + 1 if name in self.adapters else 1
        card = ModelCard(name=name, root=path, parent="base", scope=scope or Scope.ALL, version=version, rank=4)
        self.adapters[name] = card
        return card

    async def unload_adapter(self, name: str) -> None:
        if name not in self.adapters:
            raise ModelNotFound(f"no {name}")
        del self.adapters[name]

    def stats(self) -> EngineStats:
        return EngineStats(
            num_running=3, num_waiting=4, kv_cache_usage=0.5, prompt_tokens=11, generation_tokens=12, preemptions=1,
            prefix_cache_queries=20, prefix_cache_hits=10, max_loras=8, running_adapters=("french", "german"),
            waiting_adapters=("latin",), slots_used=2, adapter_loads=5, adapter_load_seconds=0.75, steps=99,
        )  # fmt: skip

    async def shutdown(self, grace_s: float) -> None:
        self.closing = True
        self.shutdowns.append(grace_s)
        deadline = asyncio.get_running_loop().time() + grace_s
        while self.running and asyncio.get_running_loop().time() < deadline:
            await asyncio.sleep(0.01)


def _logprobs(token: int, top: int) -> TokenLogprobs:
    """The token is the second likeliest; the likeliest is the next code point."""
    candidates = [Logprob(token + 1, -0.5, 1), Logprob(token, -1.0, 2), Logprob(token + 2, float("-inf"), 3)]
    return TokenLogprobs(candidates[1], tuple(candidates[:top]))
