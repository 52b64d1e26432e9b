"""What completions and chat completions both need to turn Outputs into responses."""

from __future__ import annotations

from collections.abc import AsyncIterable
from dataclasses import dataclass, field
from typing import Any

from multigraft.core.request import FinishReason, Output, TokenLogprobs


@dataclass(slots=True)
class Choice:
    """The Outputs of one choice put together."""

    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprobs] = field(default_factory=list)
    prompt_token_ids: list[int] = field(default_factory=list)
    prompt_logprobs: list[TokenLogprobs | None] | None = None
    finish_reason: FinishReason | None = None
    stop_reason: int | str | None = None

    def add(self, output: Output) -> None:
        self.text += output.text
        self.token_ids += output.token_ids
        self.logprobs += output.logprobs or ()
        if output.prompt_token_ids:
            self.prompt_token_ids = list(output.prompt_token_ids)
        if output.prompt_logprobs is not None:
            self.prompt_logprobs = output.prompt_logprobs
        if output.finish_reason is not None:
            self.finish_reason, self.stop_reason = output.finish_reason, output.stop_reason

    def ending(self) -> dict[str, Any]:
        return ending(self.finish_reason, self.stop_reason)


def ending(finish_reason: FinishReason | None, stop_reason: int | str | None) -> dict[str, Any]:
    return {"finish_reason": finish_reason.value if finish_reason else None, "stop_reason": stop_reason}


class Usage:
    """Counts tokens over all choices of a response; a prompt counts once for its n completions."""

    def __init__(self) -> None:
        self.prompt = self.completion = self.cached = 0

    def add(self, output: Output) -> None:
        self.completion += len(output.token_ids)
        if output.index == 0:
            self.prompt += len(output.prompt_token_ids)
            if output.prompt_token_ids:
                self.cached += output.num_cached_tokens

    def as_dict(self) -> dict[str, Any]:
        return {
            "prompt_tokens": self.prompt,
            "completion_tokens": self.completion,
            "total_tokens": self.prompt + self.completion,
            "prompt_tokens_details": {"cached_tokens": self.cached},
        }


async def collect(outputs: AsyncIterable[tuple[int, Output]], num_choices: int) -> tuple[list[Choice], Usage]:
    choices = [Choice() for _ in range(num_choices)]
    usage = Usage()
    async for i, output in outputs:
        choices[i].add(output)
        usage.add(output)
    return choices, usage
