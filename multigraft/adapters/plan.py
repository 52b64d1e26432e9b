"""What every adapter method shares: the layout of a block, and filling it with a file's tensors."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NoReturn, Protocol, Self

import numpy as np
import torch

from multigraft.core.errors import AdapterError
from multigraft.core.region import Region

from .block_diagonal import DENSE, Blocks, to_dense
from .fields import Fields
from .site import PackedAdapter, Range, Site, SiteBlock

ALIGN = 64
"""Elements that every factor and every block is aligned to: 128 bytes in bf16, a GPU memory transaction."""


def align(numel: int) -> int:
    return -(-numel // ALIGN) * ALIGN


@dataclass(frozen=True, slots=True)
class Piece:
    """One tensor of the file and its place in the block, row-major there."""

    key: str
    offset: int
    """Elements from the block's start."""
    transpose: bool
    part: tuple[Range, ...]
    """What of the dense, transposed tensor goes there, axis by axis."""
    shape: tuple[int, ...]
    """Of the place; larger than the part where that is padded with zeros."""
    minus: str | None = None
    """A tensor to subtract from it first."""
    blocks: int = 1
    """The tensor's rows are this many blocks of a block-diagonal matrix, one below the other."""


@dataclass(frozen=True, slots=True)
class BaseCopy:
    """A base weight that the file carries along; it must equal the model's own."""

    key: str
    parameter: str
    """Its path in the base model."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """Where everything in an adapter's file goes; made from names and shapes alone."""

    sites: dict[int, SiteBlock]
    pieces: tuple[Piece, ...]
    base_copies: tuple[BaseCopy, ...]
    orthonormal: tuple[str, ...] = ()
    """Tensors whose rows the method wants orthonormal."""
    numel: int
    """Elements of the block, a multiple of ALIGN."""
    max_rank: int


class Method(Protocol):
    """An adapter method, as parsed from one adapter's config. A new method is one file and a line in peft_files."""

    @property
    def region(self) -> Region:
        """Where it acts, within its scope."""
        ...

    @classmethod
    def parse(cls, fields: Fields) -> Self:
        """Honour or refuse every field of the method; AdapterError names the field and its value."""
        ...

    def shapes(self, sites: Sequence[Site]) -> dict[str, tuple[int, ...]]:
        """Names and shapes of the tensors that a new adapter of this config has on these sites, for training."""
        ...

    def plan(self, shapes: Mapping[str, tuple[int, ...]], sites: Sequence[Site], *, max_rank: int) -> Plan:
        """shapes: of every tensor in the file. AdapterError when they do not fit the config or the base model."""
        ...


@dataclass(frozen=True, slots=True)
class MemberFactors:
    """A module's A (rank, in), Bᵀ (rank, out) and c (rank,), by the keys of the tensors that hold them."""

    a: str
    b: str
    rank: int
    scale: float
    b_is_transposed: bool = False
    """Whether the file holds Bᵀ and not B."""
    minus: str | None = None
    """Subtracted from the tensor `a` to make A."""
    c: str | None = None
    """None is zero."""
    blocks: Blocks = DENSE
    """Of the tensors `a` and `b`, if they are stored block by block."""


def lay_out(sites: Sequence[Site], modules: Mapping[str, MemberFactors], base_copies: Iterable[BaseCopy] = ()) -> Plan:
    """One block for an adapter with the given factors, by module path: for each site the A's, each Bᵀ, the c's.

    Of a site that is one rank's shard, the block holds what this rank multiplies.
    """
    blocks: dict[int, SiteBlock] = {}
    pieces: list[Piece] = []
    end = 0

    def place(key: str, transpose: bool, part: tuple[Range, ...], shape: tuple[int, ...], **how: Any) -> None:
        nonlocal end
        pieces.append(Piece(key, end, transpose, part, shape, **how))
        end += math.prod(shape)

    for site in sites:
        members = [modules.get(path) for path in site.members]
        if not any(members):
            continue
        parts = [_Part.of(f, site, m) if f else None for m, f in enumerate(members)]
        a = end
        for f, part in zip(members, parts, strict=True):
            if f and part:
                shape = (part.rows, site.in_features)
                place(f.a, False, (part.a, site.whole.inputs), shape, minus=f.minus, blocks=f.blocks.a)
        b: list[int] = []
        for m, (f, part) in enumerate(zip(members, parts, strict=True)):
            end = align(end)
            b.append(end)
            if f and part:
                first, stop = site.b_features[m]
                start, limit = site.whole.outputs[m]
                columns = (start + first, min(limit, start + stop))
                shape = (part.rows * site.gathered, stop - first)
                place(f.b, not f.b_is_transposed, (part.b, columns), shape, blocks=f.blocks.b)
        end = align(end)
        c = None
        if any(f and f.c for f in members):
            c = end
            for f, part in zip(members, parts, strict=True):
                if f and part and f.c:
                    place(f.c, False, (part.a,), (part.rows,))
                else:
                    end += part.rows if part else 0
            end = align(end)
        blocks[site.index] = SiteBlock(
            ranks=tuple(part.rows if part else 0 for part in parts),
            scales=tuple(f.scale if f else 0.0 for f in members),
            a=a,
            b=tuple(b),
            c=c,
        )
    return Plan(
        sites=blocks,
        pieces=tuple(pieces),
        base_copies=tuple(base_copies),
        numel=end,
        max_rank=max((f.rank for f in modules.values()), default=0),
    )


@dataclass(frozen=True, slots=True)
class _Part:
    """Which of an adapter's ranks a block holds at a module."""

    a: Range
    """Rows of A."""
    b: Range
    """Rows of Bᵀ."""
    rows: int
    """Of A in the block, with what pads them."""

    @classmethod
    def of(cls, f: MemberFactors, site: Site, member: int) -> _Part:
        shard = site.whole
        if shard.exchange is not None:
            rows = shard.exchange.width // site.gathered
            first = shard.exchange.rank * rows if site.gathered > 1 else 0
            return cls((min(first, f.rank), min(first + rows, f.rank)), (0, f.rank), rows)
        first, stop = 0, f.rank
        if shard.narrow:
            # A block-diagonal factor has ranks for the blocks that this rank's features lie in, and no others.
            if f.blocks.a > 1:
                first, stop = _ranks_of(shard.inputs, shard.whole_in, f.blocks.a, f.rank)
            elif f.blocks.b > 1:
                first, stop = _ranks_of(shard.outputs[member], shard.whole_out[member], f.blocks.b, f.rank)
        return cls((first, stop), (first, stop), stop - first)


def _ranks_of(features: Range, whole: int, blocks: int, rank: int) -> Range:
    """The ranks of the blocks that some features lie in."""
    size, ranks = whole // blocks, rank // blocks
    return features[0] // size * ranks, -(-features[1] // size) * ranks


def pack(plan: Plan, tensor: Callable[[str], torch.Tensor], dtype: torch.dtype) -> PackedAdapter:
    """Fill the plan's block; `tensor` reads a tensor by its key.

    AdapterError names the tensor that holds NaN or infinity, before or after the cast to dtype.
    """
    # NumPy's zeros are pages that the system clears as they are first written; torch.zeros would write them twice.
    block = torch.from_numpy(np.zeros(plan.numel * dtype.itemsize, np.uint8)).view(dtype)
    for piece in plan.pieces:
        source = _source(piece, tensor)
        target = block[piece.offset : piece.offset + math.prod(piece.shape)].view(piece.shape)
        target[tuple(slice(n) for n in source.shape)].copy_(source)
    if plan.numel and not _is_finite(block):
        _blame_infinite(plan, tensor, dtype)
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
