"""Server-sent events, and work that ends when its client goes away."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncGenerator, Coroutine
from contextlib import aclosing
from typing import Any, TypeVar

from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from .errors import describe
from .replies import JSONReply, dumps

T = TypeVar("T")
log = logging.getLogger(__name__)


class ClientGone(Exception):
    """The client closed its connection; nobody reads what comes next."""


async def while_connected(receive: Receive, work: Coroutine[Any, Any, T]) -> T:
    """The result of `work`, which is cancelled when the client disconnects; then raises ClientGone.

    The request's body must have been read: only the disconnect is left to receive.
    """

    async def disconnect() -> None:
        while (await receive())["type"] != "http.disconnect":
            pass

    task, gone = asyncio.create_task(work), asyncio.create_task(disconnect())
    try:
        await asyncio.wait({task, gone}, return_when=asyncio.FIRST_COMPLETED)
        if task.done():
            return task.result()
        raise ClientGone
    finally:
        # Waiting for the cancelled tasks lets the generators within them close, which aborts the engine's request.
        task.cancel()
        gone.cancel()
        await asyncio.gather(task, gone, return_exceptions=True)


async def reply(request: Request, work: Coroutine[Any, Any, dict[str, Any]]) -> Response:
    """The JSON response that `work` computes while the client waits."""
    try:
        return JSONReply(await while_connected(request.receive, work))
    except ClientGone:
        return Response(status_code=499)  # never read; nginx's number for it, in the access log


class EventStream(Response):
    """Sends each event as `data: JSON`, then `data: [DONE]`.

    Headers wait for the first event, so an error before it has its own status; a later one is sent as an event.
    """

    media_type = "text/event-stream"

    def __init__(self, events: AsyncGenerator[dict[str, Any], None]):
        super().__init__(headers={"Cache-Control": "no-cache", "X-Accel-Buffering": "no"})
        del self.headers["content-length"]
        self.events = events

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async with aclosing(self.events):
            try:
                await while_connected(receive, self._send_events(send))
            except ClientGone:
                log.debug("client gone: %s", scope["path"])

    async def _send_events(self, send: Send) -> None:
        async def data(payload: bytes, more: bool = True) -> None:
            await send({"type": "http.response.body", "body": b"data: " + payload + b"\n\n", "more_body": more})

        first = await anext(self.events)
        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        try:
            await data(dumps(first))
            async for event in self.events:
                await data(dumps(event))
        except Exception as error:
            status, body = describe(error)
            if status >= 500:
                log.error("stream failed", exc_info=error)
            await data(dumps(body))
        await data(b"[DONE]", more=False)
