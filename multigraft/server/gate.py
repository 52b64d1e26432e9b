"""What every request passes before it reaches an endpoint: shutdown, API key, size of the body."""

from __future__ import annotations

import hmac

from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from multigraft.core.errors import ShuttingDown

from .errors import error_reply
from .service import Service

OPEN_PATHS = frozenset({"/health", "/ping", "/version", "/metrics"})
"""Probes: answered without a key, and while shutting down."""

STREAMED_PATHS = frozenset({"/v1/files"})
"""Their endpoints take a body in pieces and bound it themselves."""


class Gate:
    """ASGI middleware. Refuses before the body is read, and never holds more of it than is allowed."""

    def __init__(self, app: ASGIApp, service: Service):
        self.app = app
        self.service = service
        self.keys = [key.encode() for key in service.config.api_key]
        self.limit = service.config.max_request_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        refusal = self._refusal(scope["path"], Headers(scope=scope))
        if refusal is not None:
            await refusal(scope, receive, send)
            return
        streamed = scope["path"] in STREAMED_PATHS
        await self.app(scope, receive if streamed else self._bounded(receive), send)

    def _refusal(self, path: str, headers: Headers) -> Response | None:
        if path not in OPEN_PATHS:
            if self.service.draining:
                message = "The server is shutting down; send the request to another one."
                return error_reply(message, status=ShuttingDown.status, code=ShuttingDown.code)
            if self.keys and not self._authorized(headers.get("authorization", "")):
                return error_reply(
                    "A valid API key is needed: send the header Authorization: Bearer KEY.",
                    status=401,
                    code="invalid_api_key",
                    headers={"WWW-Authenticate": "Bearer"},
                )
        length = headers.get("content-length", "")
        if path not in STREAMED_PATHS and length.isdecimal() and int(length) > self.limit:
            return error_reply(self._too_large(), status=413, code="request_too_large")
        return None

    def _authorized(self, header: str) -> bool:
        scheme, _, key = header.partition(" ")
        # Every key is compared, in constant time: how long it takes tells nothing about them.
        matches = [hmac.compare_digest(key.strip().encode(), known) for known in self.keys]
        return scheme.lower() == "bearer" and any(matches)

    def _bounded(self, receive: Receive) -> Receive:
        """Counts the body as it arrives: Content-Length may be absent (chunked)."""
        received = 0

        async def bounded() -> Message:
            nonlocal received
            message = await receive()
            received += len(message.get("body", b""))
            if received > self.limit:
                raise HTTPException(413, self._too_large())
            return message

        return bounded

    def _too_large(self) -> str:
        return f"The request's body is larger than the {self.limit} bytes that this server accepts."
