"""The segmented LoRA operation in plain torch: what the kernels must compute, and what runs on the CPU.

Arguments as in lora.py. Loops over the tiles and reads the tables on the host, so it is no fast path on a GPU.
Products are accumulated in at least float32 and rounded once.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch


def _used_tiles(tiles: torch.Tensor) -> Iterator[tuple[slice, int]]:
    for first, rows, slot in tiles.tolist():
        if slot >= 0:
            yield slice(first, first + rows), slot


def _members(
    arena: torch.Tensor, table: torch.Tensor, slot: int, in_features: int, out_features: Sequence[int]
) -> Iterator[tuple[int, slice, torch.Tensor, torch.Tensor]]:
    """(member, its columns of y, A (rank, in), B (rank, out)) of the members that the slot's adapter touches.

    A and B are views of the arena.
    """
    a_start, col = int(table[slot, 0, 0]), 0
    for m, ((_, b_start, rank), out) in enumerate(zip(table[slot].tolist(), out_features, strict=True)):
        if rank:
            a = arena[a_start : a_start + rank * in_features].view(rank, in_features)
            b = arena[b_start : b_start + rank * out].view(rank, out)
            yield m, slice(col, col + out), a, b
        a_start += rank * in_features
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
    """y (T, sum(out)) += the adapters' outputs for x (T, in), in place."""
    for rows, slot in _used_tiles(tiles):
        for m, cols, a, b in _members(arena, table, slot, x.shape[1], out_features):
            delta = scales[slot, m] * (_wide(x[rows]) @ _wide(a).T @ _wide(b))
            y[rows, cols] = (y[rows, cols] + delta).to(y.dtype)


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
        x_rows = _wide(x[rows])
        for (m, cols, a, b), (_, _, d_a, d_b) in zip(
            _members(arena, table, slot, x.shape[1], out_features),
            _members(d_arena, table, slot, x.shape[1], out_features),
            strict=True,
        ):
            g_rows = scales[slot, m] * _wide(g[rows, cols])
            u = g_rows @ _wide(b).T
            d_x[rows] += u @ _wide(a)
            d_a += u.T @ x_rows
            d_b += (x_rows @ _wide(a).T).T @ g_rows
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
        for m, _, a, b in _members(arena, table, slot, num_embeddings, [y.shape[1]]):
            delta = scales[slot, m] * (_wide(a[:, ids[rows]]).T @ _wide(b))
            y[rows] = (y[rows] + delta).to(y.dtype)
