"""The application: one router for each feature, behind one gate."""

from __future__ import annotations

from fastapi import FastAPI

from multigraft import __version__
from multigraft.core.config import ServerConfig
from multigraft.engine.client import EngineClient

from . import chat, completions, errors, files, fine_tuning, models, probes, tokens
from .gate import Gate
from .service import Service


def create_app(client: EngineClient, config: ServerConfig) -> FastAPI:
    """An ASGI application in front of a running engine, which stays the caller's to shut down.

    `app.state.service` is the Service behind it; setting its `draining` refuses new requests.
    """
    service = Service(client, config)
    app = FastAPI(title="Multigraft", version=__version__)
    app.state.service = service
    errors.install(app)
    app.add_middleware(Gate, service=service)
    for feature in (probes, models, chat, completions, tokens):
        app.include_router(feature.router(service))
    if config.allow_lora_updating:
        app.include_router(models.adapter_router(service))
    if client.training is not None:
        app.include_router(files.router(client.training))
        app.include_router(fine_tuning.router(client.training))
    return app
