"""Every error leaves the server as {"error": {message, type, param, code}}, whatever raised it."""

from __future__ import annotations

import logging
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.responses import Response

from multigraft.core.errors import MultigraftError

from .replies import JSONReply

log = logging.getLogger(__name__)

_HTTP_CODES = {404: "not_found", 405: "method_not_allowed", 413: "request_too_large"}


def error_body(message: str, *, status: int, code: str, param: str | None = None) -> dict[str, Any]:
    kind = "invalid_request_error" if status < 500 else "server_error"
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}


def describe(error: Exception) -> tuple[int, dict[str, Any]]:
    """Status and body for an error. Bugs of ours are told from users' mistakes, and their text is not given away."""
    if isinstance(error, MultigraftError):
        return error.status, error_body(error.message, status=error.status, code=error.code, param=error.param)
    return 500, error_body("Internal server error; the server's log has the cause.", status=500, code="internal_error")


def error_reply(message: str, *, status: int, code: str, headers: dict[str, str] | None = None) -> Response:
    return JSONReply(error_body(message, status=status, code=code), status_code=status, headers=headers)


def install(app: FastAPI) -> None:
    @app.exception_handler(MultigraftError)
    async def user_error(_: Request, error: MultigraftError) -> Response:
        status, body = describe(error)
        return JSONReply(body, status_code=status)

    @app.exception_handler(RequestValidationError)
    async def validation_error(request: Request, error: RequestValidationError) -> Response:
        return JSONReply(_validation_body(request, error), status_code=400)

    @app.exception_handler(HTTPException)
    async def http_error(request: Request, error: HTTPException) -> Response:
        message = str(error.detail)
        if error.status_code == 404:
            message = f"There is no {request.method} {request.url.path}."
        elif error.status_code == 405:
            message = f"{request.url.path} does not accept {request.method}."
        code = _HTTP_CODES.get(error.status_code, "invalid_request")
        headers = dict(error.headers) if error.headers else None
        return error_reply(message, status=error.status_code, code=code, headers=headers)

    @app.exception_handler(Exception)
    async def bug(request: Request, error: Exception) -> Response:
        log.error("%s %s failed", request.method, request.url.path, exc_info=error)
        status, body = describe(error)
        return JSONReply(body, status_code=status)


def _validation_body(request: Request, error: RequestValidationError) -> dict[str, Any]:
    first = error.errors()[0]
    cause = first.get("ctx", {}).get("error")
    if isinstance(cause, MultigraftError):  # raised by a validator of ours: it has its own words
        return describe(cause)[1]
    if first["type"] == "json_invalid":
        return error_body(f"The body is not valid JSON: {cause}.", status=400, code="invalid_json")

    path = [str(part) for part in first["loc"][1:]]  # without the leading "body"
    if not path:
        message = "The body must be a JSON object."
        if "json" not in request.headers.get("content-type", ""):
            message = "Send the body as JSON, with the header Content-Type: application/json."
        return error_body(message, status=400, code="invalid_request")
    message = f"{'.'.join(path)}: {first['msg']}"
    if isinstance(first.get("input"), str | int | float):
        message += f", got {first['input']!r:.100}"
    return error_body(f"{message}.", status=400, code="invalid_request", param=path[0])
