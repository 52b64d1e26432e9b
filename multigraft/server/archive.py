"""A folder of files as a tar archive that is made while it is sent."""

from __future__ import annotations

import tarfile
from collections.abc import Iterator
from pathlib import Path

from starlette.responses import StreamingResponse

PIECE = 2**20


def tar_reply(folder: Path, name: str) -> StreamingResponse:
    """The files of `folder`, which holds no folders, below a folder `name`; uncompressed, as weights do not shrink."""
    files = [(path, path.stat().st_size) for path in sorted(folder.iterdir())]
    padded = sum(tarfile.BLOCKSIZE + _padded(size) for _, size in files)
    headers = {
        "Content-Disposition": f'attachment; filename="{name}.tar"',
        "Content-Length": str(padded + 2 * tarfile.BLOCKSIZE),
    }
    return StreamingResponse(_blocks(files, name), media_type="application/x-tar", headers=headers)


def _blocks(files: list[tuple[Path, int]], name: str) -> Iterator[bytes]:
    for path, size in files:
        info = tarfile.TarInfo(f"{name}/{path.name}")
        info.size = size
        info.mtime = path.stat().st_mtime
        yield info.tobuf(tarfile.USTAR_FORMAT)
        with path.open("rb") as file:
            while piece := file.read(PIECE):
                yield piece
        yield bytes(_padded(size) - size)
    yield bytes(2 * tarfile.BLOCKSIZE)


def _padded(size: int) -> int:
    return -(-size // tarfile.BLOCKSIZE) * tarfile.BLOCKSIZE
