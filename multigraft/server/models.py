"""GET /v1/models, and vLLM's endpoints that load and unload adapters."""

from __future__ import annotations

import logging
from typing import Any

from fastapi import APIRouter
from starlette.responses import PlainTextResponse, Response

from multigraft.core.errors import InvalidRequest, ModelNotFound
from multigraft.engine.client import ModelCard

from .replies import JSONReply
from .schemas import LoadAdapterRequest, UnloadAdapterRequest
from .service import Service, model_not_found

log = logging.getLogger(__name__)


def router(service: Service) -> APIRouter:
    routes = APIRouter()

    @routes.get("/v1/models")
    async def list_models() -> Response:
        return JSONReply({"object": "list", "data": [_show(card) for card in service.client.models()]})

    @routes.get("/v1/models/{name:path}")
    async def get_model(name: str) -> Response:
        for card in service.client.models():
            if card.name == name:
                return JSONReply(_show(card))
        raise model_not_found(name)

    return routes


def _show(card: ModelCard) -> dict[str, Any]:
    shown = {
        "id": card.name,
        "object": "model",
        "created": card.created,
        "owned_by": "multigraft",
        "root": card.root,
        "parent": card.parent,
        "max_model_len": card.max_model_len,
    }
    if card.parent is not None:
        shown |= {"scope": card.scope.value if card.scope else None, "version": card.version, "rank": card.rank}
    return shown


def adapter_router(service: Service) -> APIRouter:
    """Texts and statuses are vLLM's: its users' scripts match them."""
    routes = APIRouter()
    client = service.client

    def registered(name: str) -> bool:
        return any(card.name == name for card in client.models())

    @routes.post("/v1/load_lora_adapter")
    async def load_adapter(body: LoadAdapterRequest) -> Response:
        name = body.lora_name
        if not name or not body.lora_path:
            missing = "lora_path" if name else "lora_name"
            raise InvalidRequest("Both 'lora_name' and 'lora_path' must be provided.", param=missing)
        if not body.load_inplace and registered(name):
            raise InvalidRequest(
                f"The lora adapter '{name}' has already been loaded. If you want to load the adapter in place, "
                "set 'load_inplace' to True.",
                param="lora_name",
            )
        await client.load_adapter(name, body.lora_path, scope=body.scope, in_place=body.load_inplace)
        log.info("adapter loaded: %s from %s", name, body.lora_path)
        return PlainTextResponse(f"Success: LoRA adapter '{name}' added successfully.")

    @routes.post("/v1/unload_lora_adapter")
    async def unload_adapter(body: UnloadAdapterRequest) -> Response:
        name = body.lora_name
        if not name:
            raise InvalidRequest("'lora_name' needs to be provided to unload a LoRA adapter.", param="lora_name")
        try:
            await client.unload_adapter(name)
        except ModelNotFound:
            raise ModelNotFound(f"The lora adapter '{name}' cannot be found.", param="lora_name") from None
        log.info("adapter unloaded: %s", name)
        return PlainTextResponse(f"Success: LoRA adapter '{name}' removed successfully.")

    return routes
