"""GET /health, /ping, /version and /metrics: what load balancers and dashboards ask. They need no key."""

from __future__ import annotations

from fastapi import APIRouter
from prometheus_client import CONTENT_TYPE_LATEST
from starlette.responses import Response

from multigraft import __version__
from multigraft.core.errors import ShuttingDown

from .errors import error_reply
from .replies import JSONReply
from .service import Service


def router(service: Service) -> APIRouter:
    routes = APIRouter()

    @routes.get("/health")
    @routes.get("/ping")
    async def health() -> Response:
        if service.draining:
            return error_reply("The server is shutting down.", status=503, code=ShuttingDown.code)
        if not service.client.healthy:
            return error_reply("The engine has stopped; the server's log has the cause.", status=503, code="unhealthy")
        return JSONReply({"status": "ok"})

    @routes.get("/version")
    async def version() -> Response:
        return JSONReply({"version": __version__})

    @routes.get("/metrics")
    async def metrics() -> Response:
        return Response(service.metrics.render(), media_type=CONTENT_TYPE_LATEST)

    return routes
