"""Sends a workload to a live server, with the openai client, and records what a client sees of it."""

from __future__ import annotations

import asyncio
import time
from typing import Any

from multigraft.core.errors import InvalidRequest

from .record import Record, Served
from .workload import Workload, prompt_tokens

VOCAB = 256
"""Token ids below it exist in every model."""


async def replay(
    workload: Workload, url: str, *, base_model: str | None = None, api_key: str = "-", timeout: float = 3600.0
) -> Record:
    """url: of the interface, as http://127.0.0.1:8000/v1. base_model: its name; the server's first by default.

    Requests are sent at their times, as token ids, and end after their output length whatever is generated. A request
    that fails carries its error. InvalidRequest when the server cannot be reached or lacks an adapter; what the
    workload says of scopes and ranks is not checked.
    """
    from openai import AsyncOpenAI, OpenAIError

    record = Record(workload=workload, served=[Served(r) for r in workload.requests])
    async with AsyncOpenAI(base_url=url, api_key=api_key, timeout=timeout, max_retries=0) as client:
        try:
            known = [model.id async for model in client.models.list()]
        except OpenAIError as error:
            raise InvalidRequest(f"The server at {url} does not answer: {error}") from None
        if missing := sorted({r.adapter for r in workload.requests if r.adapter} - set(known)):
            raise InvalidRequest(
                f"The server at {url} has no adapter {missing[0]!r} ({len(missing)} of the workload's are missing); "
                f"it has {', '.join(known[:8])}{', ...' if len(known) > 8 else ''}."
            )
        start = time.monotonic()
        async with asyncio.TaskGroup() as group:
            for i, served in enumerate(record.served):
                await asyncio.sleep(max(0.0, start + served.request.time - time.monotonic()))
                group.create_task(_send(client, record, i, served.request.adapter or base_model or known[0], start))
        record.seconds = time.monotonic() - start
    return record


async def _send(client: Any, record: Record, index: int, model: str, start: float) -> None:
    from openai import OpenAIError

    served = record.served[index]
    r = served.request
    try:
        stream = await client.completions.create(
            model=model,
            prompt=prompt_tokens(index, r, VOCAB),
            max_tokens=r.output_len,
            seed=index,
            stream=True,
            extra_body={"ignore_eos": True, "return_token_ids": True},
        )
        async for chunk in stream:
            if not chunk.choices:
                continue
            # A server that sends no ids sends, as a rule, a chunk for each token.
            ids = getattr(chunk.choices[0], "token_ids", None)
            _note(record, served, 1 if ids is None else len(ids), time.monotonic() - start)
    except OpenAIError as error:
        served.error = str(error)
    served.num_tokens = min(served.num_tokens, r.output_len)


def _note(record: Record, served: Served, num: int, now: float) -> None:
    if not num:
        return
    if served.first is None:
        served.first = now
    elif served.last is not None:
        record.add_gap((now - served.last) / num, num)
    served.num_tokens += num
    served.last = now
