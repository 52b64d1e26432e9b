"""POST /v1/completions"""

from __future__ import annotations

import time
from collections.abc import AsyncGenerator
from contextlib import aclosing
from dataclasses import replace
from typing import Any

from fastapi import APIRouter, Request
from starlette.responses import Response

from multigraft.core.request import FinishReason, Output, TokenLogprobs

from .choices import Choice, Usage, collect, ending
from .logprobs import TokenNames, completion_logprobs, prompt_logprobs
from .parameters import sampling_params
from .schemas import CompletionRequest
from .service import Service
from .streaming import EventStream, reply


def router(service: Service) -> APIRouter:
    routes = APIRouter()

    @routes.post("/v1/completions")
    async def create_completion(body: CompletionRequest, request: Request) -> Response:
        completion = Completion(service, body)
        if body.stream:
            return EventStream(completion.events())
        return await reply(request, completion.response())

    return routes


class Completion:
    """One request to /v1/completions."""

    def __init__(self, service: Service, body: CompletionRequest):
        self.body = body
        self.service = service
        echoed = body.logprobs if body.echo else None
        self.scores_only = body.max_tokens == 0
        """With echo: the client wants the prompt back, usually with its log-probabilities, and nothing new."""
        sampling = sampling_params(
            body,
            max_tokens=max(body.max_tokens, 1),
            logprobs=body.logprobs,
            prompt_logprobs=echoed if body.prompt_logprobs is None else body.prompt_logprobs,
        )
        self.job = service.job("cmpl", body.prompt, sampling, body)
        self.names = TokenNames(service.client, as_ids=body.return_tokens_as_token_ids)
        self.head = {
            "id": self.job.id,
            "object": "text_completion",
            "created": int(time.time()),
            "model": self.job.model,
        }

    async def outputs(self) -> AsyncGenerator[tuple[int, Output], None]:
        async with aclosing(self.service.run(self.job)) as outputs:
            async for i, output in outputs:
                if self.scores_only:  # the engine generates at least one token: drop it
                    reason = output.finish_reason and FinishReason.LENGTH
                    output = replace(output, text="", token_ids=[], logprobs=None, finish_reason=reason)
                yield i, output

    async def response(self) -> dict[str, Any]:
        async with aclosing(self.outputs()) as outputs:
            choices, usage = await collect(outputs, self.job.num_choices)
        return self.head | {
            "choices": [self._choice(i, choice) for i, choice in enumerate(choices)],
            "usage": usage.as_dict(),
        }

    async def events(self) -> AsyncGenerator[dict[str, Any], None]:
        options = self.body.stream_options
        usage = Usage()
        lengths: dict[int, int] = {}  # characters sent, by choice; its keys are the choices begun
        async with aclosing(self.outputs()) as outputs:
            async for i, output in outputs:
                usage.add(output)
                first = i not in lengths
                if not (output.text or output.token_ids or output.finish_reason or (first and self.body.echo)):
                    continue
                delta = self._delta(i, output, lengths.get(i, 0), first)
                lengths[i] = lengths.get(i, 0) + len(delta["text"])
                event = self.head | {"choices": [delta]}
                if options and options.include_usage:
                    event["usage"] = usage.as_dict() if options.continuous_usage_stats else None
                yield event
        if options and options.include_usage:
            yield self.head | {"choices": [], "usage": usage.as_dict()}

    def _choice(self, i: int, choice: Choice) -> dict[str, Any]:
        text, shown_ids, entries = choice.text, choice.token_ids, list[TokenLogprobs | None](choice.logprobs)
        if self.body.echo:
            text = self._prompt_text(i) + text
            shown_ids = choice.prompt_token_ids + shown_ids
            entries = (choice.prompt_logprobs or []) + entries
        shown = {"index": i, "text": text, "logprobs": self._logprobs(shown_ids, entries, 0), **choice.ending()}
        if self.body.prompt_logprobs is not None:
            shown["prompt_logprobs"] = prompt_logprobs(choice.prompt_logprobs or [], self.names)
        if self.body.return_token_ids:
            shown |= {"prompt_token_ids": choice.prompt_token_ids, "token_ids": choice.token_ids}
        return shown

    def _delta(self, i: int, output: Output, offset: int, first: bool) -> dict[str, Any]:
        text, shown_ids, entries = output.text, output.token_ids, list[TokenLogprobs | None](output.logprobs or [])
        if self.body.echo and first:
            text = self._prompt_text(i) + text
            shown_ids = [*output.prompt_token_ids, *shown_ids]
            entries = (output.prompt_logprobs or []) + entries
        shown = {
            "index": i,
            "text": text,
            "logprobs": self._logprobs(shown_ids, entries, offset),
            **ending(output.finish_reason, output.stop_reason),
        }
        if self.body.return_token_ids:
            if first:
                shown["prompt_token_ids"] = list(output.prompt_token_ids)
            shown["token_ids"] = output.token_ids
        return shown

    def _logprobs(self, ids: list[int], entries: list[TokenLogprobs | None], offset: int) -> dict[str, Any] | None:
        if self.body.logprobs is None:
            return None
        return completion_logprobs(ids, entries, self.names, offset)

    def _prompt_text(self, i: int) -> str:
        prompt = self.body.prompt[i // self.body.n]
        return prompt if isinstance(prompt, str) else self.service.client.detokenize(prompt)
