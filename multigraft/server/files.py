"""/v1/files: the data that jobs learn from, and the tables of losses they leave."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from fastapi import APIRouter, Query, Request
from starlette.responses import FileResponse, Response

from multigraft.core.errors import InvalidRequest, TooLarge
from multigraft.core.training import FINE_TUNE, MAX_FILE_BYTES, DataFile
from multigraft.engine.client import TrainingClient, Upload

from .multipart import PartStart, parts
from .replies import JSONReply, listed

MAX_FIELD_BYTES = 2**16
MAX_BODY_BYTES = MAX_FILE_BYTES + 2**20
"""What surrounds the file's content is far smaller than the second term."""


def router(training: TrainingClient) -> APIRouter:
    routes = APIRouter(prefix="/v1/files")

    @routes.post("")
    async def create_file(request: Request) -> Response:
        length = request.headers.get("content-length", "")
        if length.isdecimal() and int(length) > MAX_BODY_BYTES:
            raise TooLarge(f"The file is larger than the limit of {MAX_FILE_BYTES} bytes (1 GiB).", param="file")
        upload = await training.upload()
        try:
            filename, purpose = await _receive(request, upload)
            return JSONReply(_show(await upload.finish(filename, purpose)))
        finally:
            await upload.discard()

    @routes.get("")
    async def list_files(
        after: str | None = None,
        limit: Annotated[int, Query(ge=1, le=10_000)] = 10_000,
        order: Literal["asc", "desc"] = "desc",
        purpose: str | None = None,
    ) -> Response:
        page = await training.files(after=after, limit=limit, purpose=purpose, ascending=order == "asc")
        return JSONReply(listed(page, _show))

    @routes.get("/{file_id}")
    async def get_file(file_id: str) -> Response:
        return JSONReply(_show(await training.file(file_id)))

    @routes.get("/{file_id}/content")
    async def get_content(file_id: str) -> Response:
        file = await training.file(file_id)
        path = await training.file_path(file_id)
        return FileResponse(path, media_type="application/octet-stream", filename=file.filename)

    @routes.delete("/{file_id}")
    async def delete_file(file_id: str) -> Response:
        await training.delete_file(file_id)
        return JSONReply({"id": file_id, "object": "file", "deleted": True})

    return routes


async def _receive(request: Request, upload: Upload) -> tuple[str, str]:
    """Stream the form's file into `upload`; the file's name and the purpose, whichever comes first."""
    fields: dict[str, bytearray] = {}
    filename: str | None = None
    into: bytearray | Upload = bytearray()
    async for piece in parts(request):
        if isinstance(piece, PartStart):
            if piece.name != "file":
                into = fields.setdefault(piece.name, bytearray())
            elif filename is None and piece.filename is not None:
                filename, into = piece.filename, upload
            else:
                raise InvalidRequest("file must be one file with a filename.", param="file")
        elif isinstance(into, bytearray):
            into += piece
            if sum(map(len, fields.values())) > MAX_FIELD_BYTES:
                raise TooLarge(f"The fields beside the file are larger than {MAX_FIELD_BYTES} bytes.")
        else:
            await into.write(piece)
    for name in fields:
        if name.startswith("expires_after"):
            raise InvalidRequest("expires_after is not supported: files stay until they are deleted.", param=name)
    purpose = fields.get("purpose", b"").decode(errors="replace")
    if purpose != FINE_TUNE:
        raise InvalidRequest(f"purpose must be {FINE_TUNE!r}, got {purpose!r:.100}.", param="purpose")
    if not filename:
        raise InvalidRequest("file is missing: a part of that name, with a filename.", param="file")
    return filename, purpose


def _show(file: DataFile) -> dict[str, Any]:
    return {
        "id": file.id,
        "object": "file",
        "bytes": file.num_bytes,
        "created_at": file.created,
        "expires_at": None,
        "filename": file.filename,
        "purpose": file.purpose,
        "status": "processed",
        "status_details": None,
    }
