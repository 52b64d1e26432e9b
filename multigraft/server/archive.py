"""A folder as a zip archive that is made while it is sent."""

from __future__ import annotations

import zipfile
from collections.abc import Iterator
from pathlib import Path

from starlette.responses import StreamingResponse

PIECE = 2**20


def zip_reply(folder: Path, name: str) -> StreamingResponse:
    """The files of `folder`, which holds no folders, below a folder `name`; uncompressed, as weights do not shrink."""
    headers = {"Content-Disposition": f'attachment; filename="{name}.zip"'}
    return StreamingResponse(_pieces(folder, name), media_type="application/zip", headers=headers)


class _Outbox(list[bytes]):
    """Takes what ZipFile writes; without seek(), it writes a stream."""

    def write(self, data: bytes) -> int:
        self.append(bytes(data))
        return len(data)

    def flush(self) -> None:
        pass

    def take(self) -> bytes:
        data = b"".join(self)
        self.clear()
        return data


def _pieces(folder: Path, name: str) -> Iterator[bytes]:
    outbox = _Outbox()
    with zipfile.ZipFile(outbox, "w") as archive:  # type: ignore[arg-type]
        for path in sorted(folder.iterdir()):
            entry = zipfile.ZipInfo.from_file(path, f"{name}/{path.name}")
            with path.open("rb") as file, archive.open(entry, "w", force_zip64=True) as target:
                while piece := file.read(PIECE):
                    target.write(piece)
                    yield outbox.take()
    yield outbox.take()
