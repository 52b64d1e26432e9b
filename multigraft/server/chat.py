"""POST /v1/chat/completions"""

from __future__ import annotations

import time
from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Any

from fastapi import APIRouter, Request
from starlette.responses import Response

from multigraft.core.messages import plain_message
from multigraft.core.request import Output

from .choices import Choice, Usage, collect, ending
from .logprobs import TokenNames, chat_logprobs, prompt_logprobs
from .parameters import sampling_params
from .schemas import ChatRequest, ChatTemplateRequest
from .service import Service
from .streaming import EventStream, reply


def router(service: Service) -> APIRouter:
    routes = APIRouter()

    @routes.post("/v1/chat/completions")
    async def create_chat_completion(body: ChatRequest, request: Request) -> Response:
        chat = Chat(service, body)
        if body.stream:
            return EventStream(chat.events())
        return await reply(request, chat.response())

    return routes


def render(service: Service, body: ChatTemplateRequest, **template_kwargs: Any) -> list[int]:
    """Token ids of the messages under the model's chat template; InvalidRequest names what it cannot take."""
    return service.client.apply_chat_template(
        [plain_message(message.model_dump(), f"messages[{i}]") for i, message in enumerate(body.messages)],
        tools=body.tools or None,
        add_generation_prompt=body.add_generation_prompt,
        continue_final_message=body.continue_final_message,
        template_kwargs=template_kwargs | body.chat_template_kwargs,
    )


class Chat:
    """One request to /v1/chat/completions."""

    def __init__(self, service: Service, body: ChatRequest):
        self.body = body
        self.service = service
        max_tokens = body.max_tokens if body.max_completion_tokens is None else body.max_completion_tokens
        sampling = sampling_params(
            body,
            max_tokens=max_tokens,
            logprobs=body.top_logprobs if body.logprobs else None,
            prompt_logprobs=body.prompt_logprobs,
        )
        if body.tool_choice == "none":
            body = body.model_copy(update={"tools": []})
        effort = {} if body.reasoning_effort is None else {"reasoning_effort": body.reasoning_effort}
        self.job = service.job("chatcmpl", [render(service, body, **effort)], sampling, body)
        self.names = TokenNames(service.client, as_ids=body.return_tokens_as_token_ids)
        self.head = {"id": self.job.id, "created": int(time.time()), "model": self.job.model}

    async def response(self) -> dict[str, Any]:
        async with aclosing(self.service.run(self.job)) as outputs:
            choices, usage = await collect(outputs, self.job.num_choices)
        response = self.head | {
            "object": "chat.completion",
            "choices": [self._choice(i, choice) for i, choice in enumerate(choices)],
            "usage": usage.as_dict(),
        }
        if self.body.prompt_logprobs is not None:
            response["prompt_logprobs"] = prompt_logprobs(choices[0].prompt_logprobs or [], self.names)
        if self.body.return_token_ids:
            response["prompt_token_ids"] = choices[0].prompt_token_ids
        return response

    async def events(self) -> AsyncGenerator[dict[str, Any], None]:
        options = self.body.stream_options
        usage = Usage()
        begun: set[int] = set()
        head = self.head | {"object": "chat.completion.chunk"}

        def event(choice: dict[str, Any], extra: dict[str, Any] | None = None) -> dict[str, Any]:
            body = head | {"choices": [choice]} | (extra or {})
            if options and options.include_usage:
                body["usage"] = usage.as_dict() if options.continuous_usage_stats else None
            return body

        async with aclosing(self.service.run(self.job)) as outputs:
            async for i, output in outputs:
                usage.add(output)
                if i not in begun:
                    first = not begun
                    begun.add(i)
                    delta = {"role": "assistant", "content": ""}
                    ids = {"prompt_token_ids": list(output.prompt_token_ids)}
                    yield event(
                        {"index": i, "delta": delta, "logprobs": None, "finish_reason": None},
                        ids if first and self.body.return_token_ids else None,
                    )
                if output.text or output.token_ids or output.finish_reason:
                    yield event(self._delta(i, output))
        if options and options.include_usage:
            yield head | {"choices": [], "usage": usage.as_dict()}

    def _choice(self, i: int, choice: Choice) -> dict[str, Any]:
        shown = {
            "index": i,
            "message": {"role": "assistant", "content": choice.text, "refusal": None},
            "logprobs": chat_logprobs(choice.logprobs, self.names) if self.body.logprobs else None,
            **choice.ending(),
        }
        if self.body.return_token_ids:
            shown["token_ids"] = choice.token_ids
        return shown

    def _delta(self, i: int, output: Output) -> dict[str, Any]:
        shown = {
            "index": i,
            "delta": {"content": output.text} if output.text or not output.finish_reason else {},
            "logprobs": chat_logprobs(output.logprobs or [], self.names) if self.body.logprobs else None,
            **ending(output.finish_reason, output.stop_reason),
        }
        if self.body.return_token_ids:
            shown["token_ids"] = output.token_ids
        return shown
