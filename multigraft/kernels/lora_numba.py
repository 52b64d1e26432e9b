"""The segmented adapter operation for few rows an adapter, on the CPU: the factors in use are read once, straight from
the arena.

    shrink   h = x Aᵀ + c      a unit of work: a tile of rows, one member, RANKS rows of A
    expand   y += s · h B      a unit of work: a tile of rows, COLUMNS columns of one member

What bounds it is the memory: 16 adapters of rank 8 on all linears of SmolLM2, two rows each, are 78 MB, 6 ms at
13 GB/s; the kernels took 7.2 alone, and 13 were added to a step in the engine (docs/log.md).
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from functools import cache
from typing import Any, NamedTuple

import numpy as np
import torch
from numba import carray

from .jit import VERSION, add_rows, float_at, inlined, int32_at, int64_at, kernel, load, next_unit, size_of, store
from .openmp import run_on_team
from .tiles import DECODE_ROWS, cut_tiles

RANKS = 8
COLUMNS = 512
"""Of float32 sums that a unit keeps: 2 KiB, beside the rows of B in the first-level cache."""
MAX_MEMBERS = 8


class _Arguments(ctypes.Structure):
    _fields_ = (
        *((name, ctypes.c_int64) for name in (
            "counter", "x", "x_stride", "y", "y_stride", "arena", "table", "table_stride", "scales", "scales_stride",
            "tiles", "num_tiles", "h", "max_rank", "in_features", "num_members",
        )),
        ("out_features", ctypes.c_int64 * MAX_MEMBERS),
    )  # fmt: skip


class Tiles:
    """Which rows of a step use which slots, and the workspace of the sites, one after the other."""

    def __init__(self, row_slot: np.ndarray, max_rank: int):
        """row_slot: (rows,) slot of each row, negative for none. max_rank: bound on the rank of one member."""
        self._table = cut_tiles(row_slot, DECODE_ROWS)
        self._h = np.empty((len(row_slot), MAX_MEMBERS * max_rank), dtype=np.float32)
        self.table_address, self.h_address = self._table.ctypes.data, self._h.ctypes.data
        self.num = len(self._table)
        self.max_rank = max_rank


class SiteAdapters:
    """The operation at one site; arguments as in lora.py, in bf16 or float32. Not thread-safe."""

    def __init__(
        self,
        arena: torch.Tensor,
        table: torch.Tensor,
        scales: torch.Tensor,
        in_features: int,
        out_features: Sequence[int],
    ):
        assert len(out_features) <= MAX_MEMBERS, out_features
        self._kernels = compiled(arena.dtype)
        self._tensors = arena, table, scales  # kept alive, as their addresses are
        # Made once: in a step's cold caches Python's part of a call costs as much as the kernels'.
        self._arguments = _Arguments(
            arena=arena.data_ptr(),
            table=table.data_ptr(),
            table_stride=table.stride(0),
            scales=scales.data_ptr(),
            scales_stride=scales.stride(0),
            in_features=in_features,
            num_members=len(out_features),
            out_features=tuple(out_features),
        )

    def add(self, y: torch.Tensor, x: torch.Tensor, tiles: Tiles) -> None:
        """y (T, sum(out_features)) += the adapters' outputs for x (T, in), in place; y may be x.

        Both in the arena's dtype, rows contiguous; sums are float32 and rounded once.
        """
        assert x.dtype == y.dtype == self._tensors[0].dtype and x.stride(1) == y.stride(1) == 1
        a = self._arguments
        a.x, a.x_stride, a.y, a.y_stride = x.data_ptr(), x.stride(0), y.data_ptr(), y.stride(0)
        a.tiles, a.num_tiles, a.h, a.max_rank = tiles.table_address, tiles.num, tiles.h_address, tiles.max_rank
        run_on_team(self._kernels.shrink, a)
        run_on_team(self._kernels.expand, a)


class Kernels(NamedTuple):
    shrink: int
    expand: int
    keep: tuple[Any, ...]
    """Whose addresses they are."""


@cache
def compiled(dtype: torch.dtype) -> Kernels:
    shrink, expand = _compile({torch.bfloat16: True, torch.float32: False}[dtype], VERSION)
    return Kernels(shrink.address, expand.address, (shrink, expand))


@inlined
def _dot_pair(h0, h1, x0, x1, w, n, half):
    """*h0 = x0 · w, *h1 = x1 · w, of n elements each."""
    s0, s1 = np.float32(0), np.float32(0)
    for k in range(n):
        v = load(w, k, half)
        s0 += load(x0, k, half) * v
        s1 += load(x1, k, half) * v
    float_at(h0)[0] = s0
    float_at(h1)[0] = s1


@inlined
def _shrink_unit(a, unit, half):
    groups = (a.max_rank + RANKS - 1) // RANKS
    tile, member, first = unit // (a.num_members * groups), unit // groups % a.num_members, unit % groups * RANKS
    row, rows, slot = int32_at(a.tiles)[3 * tile], int32_at(a.tiles)[3 * tile + 1], int32_at(a.tiles)[3 * tile + 2]
    entry = int64_at(a.table + 8 * slot * a.table_stride)
    above = 0  # rows of A that are earlier members'
    for m in range(member):
        above += entry[4 * m + 2]
    stop = min(first + RANKS, entry[4 * member + 2])
    n, width = a.in_features, a.num_members * a.max_rank
    w = a.arena + size_of(half) * (entry[0] + above * n)
    c = -1 if entry[3] < 0 else entry[3] + above
    # Rows in pairs, which share the loads of A; an odd last one is its own partner.
    for i in range(row, row + rows, 2):
        k = min(i + 1, row + rows - 1)
        x0, x1 = a.x + size_of(half) * i * a.x_stride, a.x + size_of(half) * k * a.x_stride
        h0, h1 = a.h + 4 * (i * width + member * a.max_rank), a.h + 4 * (k * width + member * a.max_rank)
        for j in range(first, stop):
            s0, s1 = _dot_pair(x0, x1, w + size_of(half) * j * n, n, half)
            add = np.float32(0) if c < 0 else load(a.arena, c + j, half)
            float_at(h0)[j], float_at(h1)[j] = s0 + add, s1 + add


@inlined
def _dot_pair(x0, x1, w, n, half):
    """(x0 · w, x1 · w) of n elements."""
    s0, s1 = np.float32(0), np.float32(0)
    for k in range(n):
        v = load(w, k, half)
        s0 += load(x0, k, half) * v
        s1 += load(x1, k, half) * v
    return s0, s1


@inlined
def _expand_unit(a, unit, blocks, acc, half):
    tile, block, member, left = unit // blocks, unit % blocks, 0, 0
    while block >= _blocks(a.out_features[member]):
        block -= _blocks(a.out_features[member])
        left += a.out_features[member]
        member += 1
    row, rows, slot = int32_at(a.tiles)[3 * tile], int32_at(a.tiles)[3 * tile + 1], int32_at(a.tiles)[3 * tile + 2]
    entry = int64_at(a.table + 8 * slot * a.table_stride)
    rank, out = entry[4 * member + 2], a.out_features[member]
    if rank == 0:
        return
    first = block * COLUMNS
    n = min(COLUMNS, out - first)
    b = a.arena + size_of(half) * (entry[4 * member + 1] + first)
    scale = float_at(a.scales)[slot * a.scales_stride + member]
    width = a.num_members * a.max_rank
    for i in range(row, row + rows):
        for k in range(n):
            float_at(acc)[k] = 0
        add_rows(acc, a.h + 4 * (i * width + member * a.max_rank), b, out, rank, n, half)
        y = a.y + size_of(half) * (i * a.y_stride + left + first)
        for k in range(n):
            store(y, k, load(y, k, half) + scale * float_at(acc)[k], half)


@inlined
def _blocks(width):
    return (width + COLUMNS - 1) // COLUMNS


def _compile(half: bool, version: int):
    @kernel(_Arguments)
    def shrink(arguments):
        _ = version
        a = carray(arguments, 1)[0]
        units = a.num_tiles * a.num_members * ((a.max_rank + RANKS - 1) // RANKS)
        while True:
            unit = next_unit(a.counter)
            if unit >= units:
                return
            _shrink_unit(a, unit, half)

    @kernel(_Arguments)
    def expand(arguments):
        _ = version
        a = carray(arguments, 1)[0]
        acc = np.empty(COLUMNS, dtype=np.float32)
        blocks = 0
        for m in range(a.num_members):
            blocks += _blocks(a.out_features[m])
        while True:
            unit = next_unit(a.counter)
            if unit >= a.num_tiles * blocks:
                return
            _expand_unit(a, unit, blocks, acc.ctypes.data, half)

    return shrink, expand
