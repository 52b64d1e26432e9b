"""The segmented LoRA operation in plain torch: what the kernels must compute, and what runs on the CPU.

Arguments as in lora.py. Loops over the tiles and reads the tables on the host, so it is no fast path on a GPU.
Products are accumulated in at least float32 and rounded once.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F


def _used_tiles(tiles: torch.Tensor) -> Iterator[tuple[slice, int]]:
    for first, rows, slot in tiles.tolist():
        if slot >= 0:
            yield slice(first, first + rows), slot


class _Member(NamedTuple):
    """A member that a slot's adapter touches; factors are views of the arena."""

    index: int
    cols: slice
    """Its columns of y."""
    a: torch.Tensor
    """(rank, in)"""
    b: torch.Tensor
    """(rank, out)"""
    c: torch.Tensor | None
    """(rank,)"""

    def hidden(self, x: torch.Tensor) -> torch.Tensor:
        """(rows, rank) for x (rows, in)."""
        h = _wide(x) @ _wide(self.a).T
        return h if self.c is None else h + _wide(self.c)


def _members(
    arena: torch.Tensor, table: torch.Tensor, slot: int, in_features: int, out_features: Sequence[int]
) -> Iterator[_Member]:
    a_start, c_start, col = int(table[slot, 0, 0]), int(table[slot, 0, 3]), 0
    for m, ((_, b_start, rank, _), out) in enumerate(zip(table[slot].tolist(), out_features, strict=True)):
        if rank:
            a = arena[a_start : a_start + rank * in_features].view(rank, in_features)
            b = arena[b_start : b_start + rank * out].view(rank, out)
            yield _Member(m, slice(col, col + out), a, b, arena[c_start : c_start + rank] if c_start >= 0 else None)
        a_start += rank * in_features
        c_start += rank if c_start >= 0 else 0
        col += out


def _wide(t: torch.Tensor) -> torch.Tensor:
    return t.to(torch.promote_types(t.dtype, torch.float32))


def forward(
    y: torch.Tensor,
    x: torch.Tensor,
    arena: torch.Tensor,
    table: torch.Tensor,
    scales: torch.Tensor,
    tiles: torch.Tensor,
    out_features: Sequence[int],
) -> None:
    """y (T, sum(out)) += the adapters' outputs for x (T, in), in place; y may be x."""
    for rows, slot in _used_tiles(tiles):
        for m in _members(arena, table, slot, x.shape[1], out_features):
            delta = scales[slot, m.index] * (m.hidden(x[rows]) @ _wide(m.b))
            y[rows, m.cols] = (y[rows, m.cols] + delta).to(y.dtype)


def swiglu(y: torch.Tensor) -> torch.Tensor:
    """(..., width): silu(gate) * up, of gate and up side by side in y (..., 2 width)."""
    gate, up = y.chunk(2, dim=-1)
    return F.silu(gate) * up


def backward(
    g: torch.Tensor,
    x: torch.Tensor,
    arena: torch.Tensor,
    table: torch.Tensor,
    scales: torch.Tensor,
    tiles: torch.Tensor,
    out_features: Sequence[int],
) -> tuple[torch.Tensor, torch.Tensor]:
    """(d_x, d_arena) for the gradient g (T, sum(out)) of the adapters' outputs; zero where nothing acts."""
    d_x, d_arena = torch.zeros_like(_wide(x)), torch.zeros_like(_wide(arena))
    for rows, slot in _used_tiles(tiles):
        for m, d in zip(
            _members(arena, table, slot, x.shape[1], out_features),
            _members(d_arena, table, slot, x.shape[1], out_features),
            strict=True,
        ):
            g_rows = scales[slot, m.index] * _wide(g[rows, m.cols])
            u = g_rows @ _wide(m.b).T
            d_x[rows] += u @ _wide(m.a)
            d.a.add_(u.T @ _wide(x[rows]))
            d.b.add_(m.hidden(x[rows]).T @ g_rows)
            if d.c is not None:
                d.c.add_(u.sum(0))
    return d_x.to(x.dtype), d_arena.to(arena.dtype)


def embedding_lora_(
    y: torch.Tensor,
    ids: torch.Tensor,
    arena: torch.Tensor,
    table: torch.Tensor,
    scales: torch.Tensor,
    tiles: torch.Tensor,
    num_embeddings: int,
) -> None:
    """LoRA on an embedding: y[row] += scale * A[:, ids[row]] @ B, in place.

    y (T, out); ids int (T,); A (rank, num_embeddings) and B (rank, out) as at a site with one member.
    """
    for rows, slot in _used_tiles(tiles):
        for m in _members(arena, table, slot, num_embeddings, [y.shape[1]]):
            delta = scales[slot, m.index] * (_wide(m.a[:, ids[rows]]).T @ _wide(m.b))
            y[rows] = (y[rows] + delta).to(y.dtype)
