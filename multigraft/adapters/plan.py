"""What every adapter method shares: the layout of a block."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, Self

from multigraft.core.region import Region

from .block_diagonal import DENSE, Blocks
from .fields import Fields
from .site import Range, Site, SiteBlock

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
