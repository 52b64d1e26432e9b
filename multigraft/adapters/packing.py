"""Filling an adapter's block with a file's tensors, with few calls: each is Python, and asks for the GIL twice."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import NoReturn

import torch

from multigraft.core.errors import AdapterError

from .block_diagonal import to_dense
from .plan import Piece, Plan
from .site import PackedAdapter, Range
from .tensor_file import Stored, TensorFile
from .transfer import new_block

COPIED_AT_ONCE = 2**17
"""Elements of a transposed tensor: what the first of its rows brings into the cache is there still for the last. Of
2**30, rank 64 in float32 took four times as long; less than 2**17 gains little and makes many copies."""
_NUMBERS = re.compile(r"\d+")


Strides = tuple[int, ...]
_Part = tuple[torch.dtype, tuple[int, ...], Strides, Strides]
"""The type, shape and strides of a copy's source, and the strides of its target."""


@dataclass(frozen=True, slots=True)
class StridedCopy:
    """Equal parts of a file's tensors, at equal distances there and in the block. Offsets and strides in elements."""

    dtype: torch.dtype
    """In the file."""
    shape: tuple[int, ...]
    """Parts first."""
    source: int
    source_strides: Strides
    target: int
    target_strides: Strides


@dataclass(frozen=True, slots=True)
class FilePlan:
    """A plan for files of one header: what is copied as it is, equal parts of many layers at once, and the rest."""

    plan: Plan
    copies: tuple[StridedCopy, ...]
    rest: tuple[Piece, ...]
    """Pieces that something is computed for."""
    gaps: tuple[Range, ...]
    """Of the block, what the copies do not write all of."""

    @classmethod
    def of(cls, plan: Plan, tensors: Mapping[str, Stored]) -> FilePlan:
        """tensors: what the header says."""
        alike: dict[tuple[str, int, _Part], list[tuple[int, int]]] = {}
        rest, whole = [], []
        for piece in plan.pieces:
            stored = tensors[piece.key]
            if piece.minus is not None or piece.blocks > 1 or stored.start % stored.dtype.itemsize:
                rest.append(piece)
                continue
            if _extent(piece, stored) == piece.shape:
                whole.append((piece.offset, piece.offset + math.prod(piece.shape)))
            name = _NUMBERS.sub("", piece.key)
            for column, part, places in _cut(piece, stored):
                alike.setdefault((name, column, part), []).append(places)
        copies = []
        for (_, _, (dtype, shape, *strides)), places in alike.items():
            for number, (source, target), steps in _runs(sorted(places)):
                source_strides, target_strides = ((step, *s) for step, s in zip(steps, strides, strict=True))
                copies.append(StridedCopy(dtype, (number, *shape), source, source_strides, target, target_strides))
        return cls(plan, tuple(copies), tuple(rest), tuple(_between(whole, plan.numel)))

    def pack(self, file: TensorFile, dtype: torch.dtype, device: torch.device | str = "cpu") -> PackedAdapter:
        """As `pack`, from a file of that header. device: what the block is to be copied to."""
        block = new_block(self.plan.numel, dtype, device)
        if self.gaps:  # and not all of the block, which takes 4 ms of 42 MB
            torch._foreach_zero_([block[first:stop] for first, stop in self.gaps])
        views = {c.dtype: file.data[: file.data.numel() // c.dtype.itemsize * c.dtype.itemsize] for c in self.copies}
        views = {dtype: data.view(dtype) for dtype, data in views.items()}
        if self.copies:
            # One call: each by its own would ask for the GIL a hundred times. With the parts' axis they have three, and
            # torch's way for matrices, which it would take for two, is a third as fast with few ranks.
            torch._foreach_copy_(
                [block.as_strided(c.shape, c.target_strides, c.target) for c in self.copies],
                [views[c.dtype].as_strided(c.shape, c.source_strides, c.source) for c in self.copies],
            )
        return _fill(block, self.plan, self.rest, file.read)


def pack(plan: Plan, tensor: Callable[[str], torch.Tensor], dtype: torch.dtype) -> PackedAdapter:
    """Fill the plan's block; `tensor` reads a tensor by its key.

    AdapterError names the tensor that holds NaN or infinity, before or after the cast to dtype.
    """
    return _fill(new_block(plan.numel, dtype).zero_(), plan, plan.pieces, tensor)


def _cut(piece: Piece, stored: Stored) -> Iterator[tuple[int, _Part, tuple[int, int]]]:
    """The copies that a piece takes: first column, and where it begins in the file and the block."""
    shape, strides = stored.shape, _row_major(stored.shape)
    if piece.transpose:
        shape, strides = shape[::-1], strides[::-1]
    source = stored.start // stored.dtype.itemsize + sum(r[0] * s for r, s in zip(piece.part, strides, strict=True))
    *rows, columns = _extent(piece, stored)
    target_strides = _row_major(piece.shape)
    if not columns or 0 in rows:
        return
    width = max(1, COPIED_AT_ONCE // math.prod(rows)) if piece.transpose else columns
    for column in range(0, columns, width):
        part = (stored.dtype, (*rows, min(width, columns - column)), strides, target_strides)
        yield column, part, (source + column * strides[-1], piece.offset + column)


def _extent(piece: Piece, stored: Stored) -> tuple[int, ...]:
    """Shape of what the tensor has for the piece."""
    shape = stored.shape[::-1] if piece.transpose else stored.shape
    return tuple(max(0, min(r[1], n) - r[0]) for r, n in zip(piece.part, shape, strict=True))


def _between(ranges: Iterable[Range], stop: int) -> Iterator[Range]:
    """What disjoint ranges leave of 0 to stop."""
    end = 0
    for r in (*sorted(ranges), (stop, stop)):
        if end < r[0]:
            yield end, r[0]
        end = r[1]


def _row_major(shape: Sequence[int]) -> Strides:
    return tuple(math.prod(shape[axis + 1 :]) for axis in range(len(shape)))


def _runs(places: Iterable[tuple[int, int]]) -> Iterator[tuple[int, tuple[int, int], tuple[int, int]]]:
    """Runs of places at equal distances, forward: their number, the first, and the distance."""
    number, first, last, step = 0, (0, 0), (0, 0), (0, 0)
    for place in places:
        distance = (place[0] - last[0], place[1] - last[1])
        if number == 1 and distance[1] > 0:
            step = distance
        elif number and distance != step:
            yield number, first, step
            number = 0
        if not number:
            first, step = place, (0, 0)
        number, last = number + 1, place
    if number:
        yield number, first, step


def _fill(
    block: torch.Tensor, plan: Plan, pieces: Iterable[Piece], tensor: Callable[[str], torch.Tensor]
) -> PackedAdapter:
    """Put these pieces, the last that are missing, into the block."""
    for piece in pieces:
        source = _source(piece, tensor)
        target = block[piece.offset : piece.offset + math.prod(piece.shape)].view(piece.shape)
        target[tuple(slice(n) for n in source.shape)].copy_(source)
    if plan.numel and not _is_finite(block):
        _blame_infinite(plan, tensor, block.dtype)
    return PackedAdapter(block=block, sites=plan.sites)


def _source(piece: Piece, tensor: Callable[[str], torch.Tensor]) -> torch.Tensor:
    """What goes to the piece's place, in the file's type."""
    source = tensor(piece.key)
    if piece.minus is not None:
        source = source.float() - tensor(piece.minus).float()
    oriented = to_dense(source, piece.blocks)
    oriented = oriented.T if piece.transpose else oriented
    return oriented[tuple(slice(*r) for r in piece.part)]


def _blame_infinite(plan: Plan, tensor: Callable[[str], torch.Tensor], dtype: torch.dtype) -> NoReturn:
    """Raise AdapterError for the piece that makes the block infinite."""
    for piece in plan.pieces:
        source = _source(piece, tensor)
        if not source.numel() or _is_finite(source.to(dtype)):
            continue
        if _is_finite(source):
            peak = source.abs().max().item()
            raise AdapterError(f"`{piece.key}` holds {peak:.3g}, which is too large for {_name(dtype)}.")
        raise AdapterError(f"`{piece.key}` holds NaN or infinite values.")
    raise AdapterError("its weights held NaN or infinite values while they were read, and no longer do.")


def _is_finite(x: torch.Tensor) -> bool:
    # Both extremes are NaN when any element is. 15 times as fast as isfinite().all(): 0.02 ms for 131072 in bf16.
    return all(math.isfinite(extreme.item()) for extreme in x.aminmax())


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
