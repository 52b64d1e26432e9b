"""Running the application under uvicorn until a signal ends it."""

from __future__ import annotations

import asyncio
import logging
import socket
from collections.abc import Callable
from types import FrameType

import uvicorn

from multigraft.core.config import ServerConfig
from multigraft.core.errors import InvalidRequest
from multigraft.engine.client import EngineClient

from .app import create_app
from .service import Service

log = logging.getLogger(__name__)

# Once the engine has finished its requests, only the last bytes of their responses are left to send.
FLUSH_SECONDS = 5


def bind(config: ServerConfig) -> socket.socket:
    """A bound socket that does not listen yet, so that a taken port is known before a model is loaded."""
    where = f"{config.host} port {config.port}"
    if not 0 <= config.port <= 65535:
        raise InvalidRequest(f"Cannot listen on {where}: a port is between 0 (any free one) and 65535.", param="port")
    try:
        info = socket.getaddrinfo(config.host, config.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
        family, kind, proto, _, address = info[0]
        sock = socket.socket(family, kind, proto)
    except OSError as error:
        raise InvalidRequest(f"Cannot listen on {where}: {error}.", param="host") from None
    try:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.bind(address)
    except OSError as error:
        sock.close()
        raise InvalidRequest(f"Cannot listen on {where}: {error.strerror}.", param="port") from None
    return sock


async def serve(
    client: EngineClient,
    config: ServerConfig,
    *,
    sock: socket.socket | None = None,
    on_ready: Callable[[str], None] | None = None,
) -> None:
    """Serve until SIGTERM or SIGINT, then let running requests finish for shutdown_grace_s seconds.

    The engine has been shut down on return. A second signal ends at once.
    sock: from bind(); the default binds here. on_ready: called with the server's URL once it answers.
    """
    sock = sock or bind(config)
    app = create_app(client, config)
    host, port = sock.getsockname()[:2]
    url = f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
    uvicorn_config = uvicorn.Config(
        app,
        log_config=None,  # logging is the caller's
        access_log=config.access_log,
        timeout_graceful_shutdown=FLUSH_SECONDS,
        lifespan="off",
    )
    server = _Server(uvicorn_config, app.state.service, lambda: on_ready and on_ready(url))
    try:
        await server.serve(sockets=[sock])
    finally:
        await client.shutdown(0.0)


class _Server(uvicorn.Server):
    """uvicorn stops listening at the first signal; this one goes on, to answer 503, while requests finish."""

    def __init__(self, config: uvicorn.Config, service: Service, on_ready: Callable[[], object]):
        super().__init__(config)
        self.service = service
        self.on_ready = on_ready
        self.loop = asyncio.get_running_loop()
        self.draining: asyncio.Task[None] | None = None

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        self.on_ready()

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        # A signal handler may interrupt anything: only hand over to the loop.
        self.loop.call_soon_threadsafe(self._begin_drain)

    def _begin_drain(self) -> None:
        if self.draining is None:
            self.draining = asyncio.create_task(self._drain())
        else:
            log.warning("second signal: ending at once")
            self.should_exit = self.force_exit = True

    async def _drain(self) -> None:
        grace = self.service.config.shutdown_grace_s
        log.info("shutting down: running requests may finish within %g s", grace)
        self.service.draining = True
        try:
            await self.service.client.shutdown(grace)
        finally:
            self.should_exit = True
