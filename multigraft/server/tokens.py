"""POST /tokenize and /detokenize, in vLLM's shapes."""

from __future__ import annotations

from fastapi import APIRouter
from starlette.responses import Response

from multigraft.core.messages import check_text

from .chat import render
from .replies import JSONReply
from .schemas import DetokenizeRequest, TokenizeRequest
from .service import Service


def router(service: Service) -> APIRouter:
    routes = APIRouter()
    client = service.client

    @routes.post("/tokenize")
    async def tokenize(body: TokenizeRequest) -> Response:
        service.check_model(body.model)
        if body.prompt is None:
            tokens = render(service, body)
        else:
            text = check_text(body.prompt, "prompt")
            tokens = client.tokenize(text, add_special_tokens=body.add_special_tokens)
        return JSONReply(
            {
                "count": len(tokens),
                "max_model_len": client.max_model_len,
                "tokens": tokens,
                "token_strs": client.token_texts(tokens) if body.return_token_strs else None,
            }
        )

    @routes.post("/detokenize")
    async def detokenize(body: DetokenizeRequest) -> Response:
        service.check_model(body.model)
        return JSONReply({"prompt": client.detokenize(body.tokens)})

    return routes
