"""safetensors files read whole, with read(2) into memory of our own.

Pages of a mapped file that somebody overwrites kill the process (SIGBUS). And a call for each tensor lets the GIL go
and asks for it again, which takes long beside the engine's thread and other readers: so a file is one call.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import torch

from multigraft.core.errors import AdapterError

DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
"""safetensors' names of the types a weight may have."""
MAX_HEADER_BYTES = 100_000_000
"""safetensors' own limit."""
MAX_KEPT_BYTES = 2**27
"""Larger buffers are not kept for the next file."""


@dataclass(frozen=True, slots=True)
class Stored:
    """A tensor's place in a file, row-major there."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int
    """Bytes from the data's start."""

    @property
    def stop(self) -> int:
        return self.start + math.prod(self.shape) * self.dtype.itemsize


@dataclass(frozen=True, slots=True)
class RawHeader:
    """What says how a file's data are laid out; equal ones say the same."""

    text: bytes
    data_bytes: int
    """Bytes of the file after the header."""

    @classmethod
    def read(cls, path: Path) -> RawHeader:
        with path.open("rb", buffering=0) as file:
            room = os.fstat(file.fileno()).st_size - 8
            size = int.from_bytes(file.read(8), "little")
            if not 0 < size <= min(room, MAX_HEADER_BYTES):
                _refuse(path.name, f"a header of {size} bytes does not fit")
            text = file.read(size)
        if len(text) < size:
            _refuse(path.name, "the header is cut off")
        return cls(text, room - size)

    def parse(self, name: str) -> dict[str, Stored]:
        """The tensors by key; together they are all of the data, and no byte is two tensors'.

        name: the file's, for AdapterError.
        """
        try:
            entries = json.loads(self.text)
        except (ValueError, RecursionError) as e:  # ValueError: bad JSON or bad UTF-8
            _refuse(name, f"its header is not JSON: {e}")
        if not isinstance(entries, dict):
            _refuse(name, "its header is not an object")
        tensors = {key: _stored(name, key, entry) for key, entry in entries.items() if key != "__metadata__"}
        end = 0
        for key, stored in sorted(tensors.items(), key=lambda item: (item[1].start, item[1].stop)):
            if stored.start != end:
                _refuse(name, f"`{key}` begins at byte {stored.start} of the data, not at {end}")
            end = stored.stop
        if end != self.data_bytes:
            _refuse(name, f"its tensors have {end} bytes, the file {self.data_bytes}")
        return tensors


def _stored(name: str, key: str, entry: Any) -> Stored:
    try:
        dtype, shape, (start, stop) = entry["dtype"], tuple(entry["shape"]), entry["data_offsets"]
        valid = all(type(n) is int and n >= 0 for n in (*shape, start, stop))
    except (TypeError, KeyError, ValueError):
        valid = False
    if not valid:
        _refuse(name, f"its entry of `{key}` lacks a type, shape or place")
    if not isinstance(dtype, str) or dtype not in DTYPES:
        raise AdapterError(f"`{key}` is of type {dtype}; supported: {', '.join(DTYPES)}.")
    stored = Stored(DTYPES[dtype], shape, start)
    if stored.stop != stop:
        _refuse(name, f"`{key}`, {dtype} {list(shape)}, has {stop - start} bytes")
    return stored


def _refuse(name: str, why: str) -> NoReturn:
    raise AdapterError(f"{name} is truncated or not a safetensors file: {why}.")


class Buffers:
    """Memory that files are read into, kept for later ones: reading 42 MB takes 4 ms so, and 9 into fresh memory.
    Thread-safe."""

    def __init__(self, keep: int):
        """keep: how many, when nobody uses them."""
        self._keep = keep
        self._free: list[np.ndarray] = []

    @contextmanager
    def use(self, nbytes: int) -> Iterator[np.ndarray]:
        """(nbytes,) uint8, whatever it holds."""
        try:
            buffer = self._free.pop()
        except IndexError:
            buffer = np.empty(0, np.uint8)
        if buffer.nbytes < nbytes:
            buffer = np.empty(nbytes, np.uint8)
        try:
            yield buffer[:nbytes]
        finally:
            if len(self._free) < self._keep and buffer.nbytes <= MAX_KEPT_BYTES:
                self._free.append(buffer)


class TensorFile:
    """The tensors of a file in memory."""

    def __init__(self, tensors: Mapping[str, Stored], data: torch.Tensor):
        """data: (bytes,) uint8, what follows the file's header."""
        self.data = data
        self._tensors = tensors

    @classmethod
    @contextmanager
    def load(
        cls, path: Path, header: RawHeader, tensors: Mapping[str, Stored], buffers: Buffers
    ) -> Iterator[TensorFile]:
        """Inside, all of the file is in memory; later that is another file's. AdapterError when it is cut off.

        header, tensors: the file's, as parsed.
        """
        with buffers.use(header.data_bytes) as buffer:
            left = memoryview(buffer)
            with path.open("rb", buffering=0) as file:
                file.seek(8 + len(header.text))
                while left:
                    count = file.readinto(left)
                    if not count:
                        raise AdapterError(f"{path.name} is cut off.")
                    left = left[count:]
            yield cls(tensors, torch.from_numpy(buffer))

    def read(self, key: str) -> torch.Tensor:
        """A tensor: a view of the data, where its place allows one."""
        stored = self._tensors[key]
        data = self.data[stored.start : stored.stop]
        if stored.start % stored.dtype.itemsize:
            data = data.clone()
        return data.view(stored.dtype).view(stored.shape)
