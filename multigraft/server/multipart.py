"""multipart/form-data taken apart as it arrives, so that a file of any size passes through a few kilobytes."""

from __future__ import annotations

from collections.abc import AsyncIterator
from dataclasses import dataclass

from python_multipart.exceptions import FormParserError
from python_multipart.multipart import MultipartParser, parse_options_header
from starlette.requests import Request

from multigraft.core.errors import InvalidRequest


@dataclass(frozen=True, slots=True)
class PartStart:
    name: str
    filename: str | None
    """None for a plain field."""


class _Pieces:
    """The parser's callbacks, as a list of what they told."""

    def __init__(self, boundary: bytes):
        self.found: list[PartStart | bytes] = []
        self.complete = False
        self._field = self._value = b""
        self._disposition = b""
        self._parser = MultipartParser(
            boundary,
            {
                "on_header_field": self._header_field,
                "on_header_value": self._header_value,
                "on_header_end": self._header_end,
                "on_headers_finished": self._headers_finished,
                "on_part_data": self._data,
                "on_end": self._end,
            },
        )

    def feed(self, data: bytes) -> list[PartStart | bytes]:
        self._parser.write(data)
        found, self.found = self.found, []
        return found

    def _header_field(self, data: bytes, start: int, end: int) -> None:
        self._field += data[start:end]

    def _header_value(self, data: bytes, start: int, end: int) -> None:
        self._value += data[start:end]

    def _header_end(self) -> None:
        if self._field.lower() == b"content-disposition":
            self._disposition = self._value
        self._field = self._value = b""

    def _headers_finished(self) -> None:
        options = parse_options_header(self._disposition)[1]
        self._disposition = b""
        filename = options.get(b"filename")
        self.found.append(
            PartStart(
                options.get(b"name", b"").decode(errors="replace"),
                None if filename is None else filename.decode(errors="replace"),
            )
        )

    def _data(self, data: bytes, start: int, end: int) -> None:
        self.found.append(data[start:end])

    def _end(self) -> None:
        self.complete = True


async def parts(request: Request) -> AsyncIterator[PartStart | bytes]:
    """The parts of a form in their order: of each its start, then its content in pieces. InvalidRequest."""
    kind, options = parse_options_header(request.headers.get("content-type", ""))
    boundary = options.get(b"boundary")
    if kind != b"multipart/form-data" or not boundary:
        raise InvalidRequest("Send the file as multipart/form-data, with the fields purpose and file.")
    pieces = _Pieces(boundary)
    try:
        async for chunk in request.stream():
            for piece in pieces.feed(chunk):
                yield piece
    except FormParserError as error:
        raise InvalidRequest(f"The body is not valid multipart/form-data: {error}.") from None
    if not pieces.complete:
        raise InvalidRequest("The body ends before its last part does.")
