"""The segmented LoRA operation in Triton: kernels that serve the forward pass and, with `outer` in
lora_triton_grad.py, the backward pass.

    shrink   h = x Wᵀ      forward: W = A, and + c  backward: x = g, W = B
    expand   y += h W      forward: W = B           backward: y = d_x, W = A
    gated    z = silu(gate + h W) * (up + h W')     expand inside SwiGLU, which spares a pass over the widest y
    outer    d_W = hᵀ x    backward: (hᵀ g for B, uᵀ x for A, with which d_c is the sum of u over the rows)

A kernel works on one side of the adapters. Side "a": the members' A lie one after another, so they are one
(sum(ranks), in) matrix over all columns of x. Side "b": each member's B (rank, out) over its own columns of y; the
members' scales are applied here. `widths` are the columns of a side: (in,) or out_features.

h is float32 (splits, T, columns): the columns of x are split among programs so that a decode step, a row or two an
adapter, still fills the card; whoever reads h adds the splits up in a fixed order, so results are reproducible to
the bit. Column j of a row belongs to row j of the row's own (sum(ranks), in) matrix A: ranks are exact.

Arguments as in lora.py. A program whose tile is unused returns at once: the launch grid depends on the shapes alone,
so a launch can be captured in a CUDA graph.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from multigraft.core.batch import LOW_RANK
from multigraft.kernels.tiles import BASE, HIGH_RANK_ROWS, PREFILL_ROWS

MAX_SPLITS = 8
ALIGN = tl.constexpr(8)
"""Elements; factor offsets are multiples of it, which makes 16-byte loads possible."""

MANY_TILES = 32
"""So many fill the card. With fewer, x is cut into smaller pieces for shrink, and expand takes more ranks at a time."""

# Block sizes. "few" and "many" tiles of DECODE_ROWS (shrink: or of HIGH_RANK_ROWS), "high" ranks, whose tiles are of
# HIGH_RANK_ROWS, and "prompts", of PREFILL_ROWS, without and with high ranks. CHUNK: columns of x one program reads at
# least. DOT_N: columns at a time on tensor cores; 0: without those. Then 32 threads a warp, 8 columns a load: BLOCK_N
# is a multiple of what the warps load at once, so that a thread holds all the ranks of its columns (else the sum over
# ranks goes through shared memory, and takes three times as long).
SHRINK = {
    "few": {"BLOCK_R": 16, "BLOCK_K": 128, "CHUNK": 256, "num_warps": 2, "num_stages": 4},
    "many": {"BLOCK_R": 16, "BLOCK_K": 64, "CHUNK": 1024, "num_warps": 1, "num_stages": 6},
    "prompts": {"BLOCK_R": 64, "BLOCK_K": 64, "CHUNK": 2048, "num_warps": 4, "num_stages": 4},
}
EXPAND = {
    "few": {"BLOCK_R": 8, "BLOCK_N": 1024, "DOT_N": 0, "STAGES": 1, "num_warps": 4},
    "many": {"BLOCK_R": 4, "BLOCK_N": 1024, "DOT_N": 0, "STAGES": 1, "num_warps": 4},
    "high": {"BLOCK_R": 64, "BLOCK_N": 512, "DOT_N": 128, "STAGES": 3, "num_warps": 4},
    "prompts": {"BLOCK_R": 16, "BLOCK_N": 1024, "DOT_N": 128, "STAGES": 3, "num_warps": 4},
    "prompts, high": {"BLOCK_R": 64, "BLOCK_N": 512, "DOT_N": 64, "STAGES": 3, "num_warps": 4},
}
GATED = {
    "few": {"BLOCK_R": 8, "BLOCK_N": 1024, "DOT_N": 0, "STAGES": 1, "num_warps": 4},
    "many": {"BLOCK_R": 4, "BLOCK_N": 1024, "DOT_N": 0, "STAGES": 1, "num_warps": 4},
    "high": {"BLOCK_R": 64, "BLOCK_N": 512, "DOT_N": 128, "STAGES": 3, "num_warps": 4},
    "prompts": {"BLOCK_R": 16, "BLOCK_N": 1024, "DOT_N": 128, "STAGES": 3, "num_warps": 4},
    "prompts, high": {"BLOCK_R": 64, "BLOCK_N": 512, "DOT_N": 64, "STAGES": 2, "num_warps": 8},
}


# ---------------------------------------------------------------------------------------------------------- kernels


@triton.jit
def _locate(block, WIDTHS: tl.constexpr, BLOCKS: tl.constexpr):
    """Member m owns WIDTHS[m] columns, worked on by BLOCKS[m] blocks.

    Returns the block's (member, first column of the member, width of the member, index within the member's blocks).
    """
    member, left, width, first = 0, 0, WIDTHS[0], 0
    next_left, next_first = WIDTHS[0], BLOCKS[0]
    for m in tl.static_range(1, len(WIDTHS)):
        beyond = block >= next_first
        member = tl.where(beyond, m, member)
        left = tl.where(beyond, next_left, left)
        width = tl.where(beyond, WIDTHS[m], width)
        first = tl.where(beyond, next_first, first)
        next_left += WIDTHS[m]
        next_first += BLOCKS[m]
    return member, left, width, block - first


@triton.jit
def _factor(
    arena, table, scales, table_stride, scales_stride, slot, member, MEMBERS: tl.constexpr, SIDE: tl.constexpr
):  # fmt: skip
    """(pointer to the factor's first element, its rows, the column of h of its first row, scale)."""
    entry = table + slot.to(tl.int64) * table_stride
    first = 0
    rank = 0
    for m in tl.static_range(MEMBERS):
        r = tl.load(entry + 4 * m + 2).to(tl.int32)
        if SIDE == "a":
            rank += r
        else:
            first += tl.where(m < member, r, 0)
            rank += tl.where(m == member, r, 0)
    if SIDE == "a":
        offset = tl.load(entry)
        scale = 1.0
    else:
        offset = tl.load(entry + 4 * member + 1)
        scale = tl.load(scales + slot.to(tl.int64) * scales_stride + member)
    return arena + tl.multiple_of(offset, ALIGN), rank, first, scale


@triton.jit
def _c_offset(table, table_stride, slot):
    """Where the slot's c, of all members, begins; negative: there is none."""
    return tl.load(table + slot.to(tl.int64) * table_stride + 3)


@triton.jit
def _sum_splits(h, mask, split_stride, SPLITS: tl.constexpr):
    total = tl.load(h, mask=mask, other=0.0)
    for s in tl.static_range(1, SPLITS):
        total += tl.load(h + s * split_stride, mask=mask, other=0.0)
    return total


@triton.jit
def _shrink_tile(
    h, x, w, arena, table, table_stride, slot, scale, split, r_start, rank, rows, width, h_stride, x_stride,
    SIDE: tl.constexpr, CHUNK: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_K: tl.constexpr,
    STAGES: tl.constexpr,
):  # fmt: skip
    """BLOCK_R columns of a tile's h, from the columns of x in the split. STAGES: None leaves it to the launch."""
    k_start = split * CHUNK
    k_stop = tl.minimum(k_start + CHUNK, width)
    offs_m, offs_r = tl.arange(0, BLOCK_M), r_start + tl.arange(0, BLOCK_R)
    acc = tl.zeros((BLOCK_M, BLOCK_R), tl.float32)
    for k in tl.range(k_start, k_stop, BLOCK_K, num_stages=STAGES):
        offs_k = k + tl.arange(0, BLOCK_K)
        in_k = offs_k < k_stop
        mask = (offs_m < rows)[:, None] & in_k[None, :]
        x_mk = tl.load(x + offs_m[:, None] * x_stride + offs_k[None, :], mask=mask, other=0.0)
        mask = in_k[:, None] & (offs_r < rank)[None, :]
        w_kr = tl.load(w + offs_k[:, None] + offs_r[None, :] * width, mask=mask, other=0.0)
        acc = tl.dot(x_mk, w_kr.to(x_mk.dtype), acc, input_precision="ieee")
    if SIDE == "a":
        c = _c_offset(table, table_stride, slot)
        if (c >= 0) & (split == 0):
            acc += tl.load(arena + c + offs_r, mask=offs_r < rank, other=0.0).to(tl.float32)[None, :]
    mask = (offs_m < rows)[:, None] & (offs_r < rank)[None, :]
    tl.store(h + offs_m[:, None] * h_stride + offs_r[None, :], scale * acc, mask=mask)


@triton.jit
def _shrink_kernel(
    h, x, arena, table, scales, tiles, table_stride, scales_stride, split_stride, h_stride, x_stride,
    WIDTHS: tl.constexpr, BLOCKS: tl.constexpr, MEMBERS: tl.constexpr, SIDE: tl.constexpr,
    CHUNK: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_K: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """h[split, rows, first : first + rank] = scale * x[rows, columns of the split] Wᵀ; on side "a" split 0 adds c."""
    tile = tiles + tl.program_id(1) * 3
    slot = tl.load(tile + 2)
    if PDL:
        gdc_launch_dependents()
    if slot < 0:
        if PDL:
            gdc_wait()
        return
    first_row, rows = tl.load(tile).to(tl.int64), tl.load(tile + 1)
    member, left, width, split = _locate(tl.program_id(0), WIDTHS, BLOCKS)
    w, rank, first, scale = _factor(arena, table, scales, table_stride, scales_stride, slot, member, MEMBERS, SIDE)
    r_start = tl.program_id(2) * BLOCK_R
    if PDL:
        gdc_wait()
    if r_start >= rank:
        return
    x += first_row * x_stride + left
    h += split.to(tl.int64) * split_stride + first_row * h_stride + first
    _shrink_tile(
        h, x, w, arena, table, table_stride, slot, scale, split, r_start, rank, rows, width, h_stride, x_stride,
        SIDE, CHUNK, BLOCK_M, BLOCK_R, BLOCK_K, None,
    )  # fmt: skip


@triton.jit
def _four_products(
    h, w, rank, rows, offs_n, in_n, width, split_stride, h_stride,
    SPLITS: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Rows 0 to 3 of h W, float32 (BLOCK_N,) each, by multiplying and adding: for few rows a tensor core's operands
    cost more to lay out than the products. `rows`: 1 to 4; each has its own accumulator, so W is read once."""
    acc0 = tl.zeros((BLOCK_N,), tl.float32)
    acc1 = tl.zeros((BLOCK_N,), tl.float32)
    acc2 = tl.zeros((BLOCK_N,), tl.float32)
    acc3 = tl.zeros((BLOCK_N,), tl.float32)
    for r_start in range(0, rank, BLOCK_R):
        offs_r = r_start + tl.arange(0, BLOCK_R)
        in_r = offs_r < rank
        w_rn = tl.load(w + offs_r[:, None] * width + offs_n[None, :], mask=in_r[:, None] & in_n[None, :], other=0.0)
        w_rn = w_rn.to(tl.float32)
        h0 = _sum_splits(h + offs_r, in_r, split_stride, SPLITS)
        acc0 += tl.sum(h0[:, None] * w_rn, axis=0)
        if rows > 1:
            h1 = _sum_splits(h + h_stride + offs_r, in_r, split_stride, SPLITS)
            acc1 += tl.sum(h1[:, None] * w_rn, axis=0)
        if rows > 2:
            h2 = _sum_splits(h + 2 * h_stride + offs_r, in_r, split_stride, SPLITS)
            acc2 += tl.sum(h2[:, None] * w_rn, axis=0)
        if rows > 3:
            h3 = _sum_splits(h + 3 * h_stride + offs_r, in_r, split_stride, SPLITS)
            acc3 += tl.sum(h3[:, None] * w_rn, axis=0)
    return acc0, acc1, acc2, acc3


@triton.jit
def _tile_of_h(
    h, r_start, rank, rows, split_stride, h_stride, dtype: tl.constexpr,
    SPLITS: tl.constexpr, DOT_M: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    offs_m, offs_r = tl.arange(0, DOT_M), r_start + tl.arange(0, BLOCK_R)
    mask = (offs_m < rows)[:, None] & (offs_r < rank)[None, :]
    return _sum_splits(h + offs_m[:, None] * h_stride + offs_r[None, :], mask, split_stride, SPLITS).to(dtype)


@triton.jit
def _rows_of_w(w, r_start, rank, offs_n, width, dtype: tl.constexpr, BLOCK_R: tl.constexpr):
    offs_r = r_start + tl.arange(0, BLOCK_R)
    mask = (offs_r < rank)[:, None] & (offs_n < width)[None, :]
    return tl.load(w + offs_r[:, None] * width + offs_n[None, :], mask=mask, other=0.0).to(dtype)


@triton.jit
def _add_row(y, offs_n, mask, old, delta):
    tl.store(y + offs_n, (old.to(tl.float32) + delta).to(y.dtype.element_ty), mask=mask)


@triton.jit
def _expand_kernel(
    y, h, arena, table, scales, tiles, table_stride, scales_stride, split_stride, h_stride, y_stride,
    WIDTHS: tl.constexpr, BLOCKS: tl.constexpr, MEMBERS: tl.constexpr, SIDE: tl.constexpr, SPLITS: tl.constexpr,
    BLOCK_R: tl.constexpr, BLOCK_N: tl.constexpr, DOT_M: tl.constexpr, DOT_N: tl.constexpr, STAGES: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    """y[rows, a block of the member's columns] += scale * h[rows, first : first + rank] W."""
    tile = tiles + tl.program_id(1) * 3
    slot = tl.load(tile + 2)
    if slot < 0:
        if PDL:
            gdc_wait()
        return
    first_row, rows = tl.load(tile).to(tl.int64), tl.load(tile + 1)
    member, left, width, block = _locate(tl.program_id(0), WIDTHS, BLOCKS)
    w, rank, first, scale = _factor(arena, table, scales, table_stride, scales_stride, slot, member, MEMBERS, SIDE)
    if PDL:
        gdc_wait()
    if rank == 0:
        return
    h += first_row * h_stride + first
    y += first_row * y_stride + left
    if DOT_N == 0:
        offs_n = block * BLOCK_N + tl.arange(0, BLOCK_N)
        in_n = offs_n < width
        nth = tl.zeros_like(offs_n)
        n1, n2, n3 = in_n & (nth + 1 < rows), in_n & (nth + 2 < rows), in_n & (nth + 3 < rows)
        y0 = tl.load(y + offs_n, mask=in_n, other=0.0)  # before the products: its latency hides behind theirs
        y1 = tl.load(y + y_stride + offs_n, mask=n1, other=0.0)
        y2 = tl.load(y + 2 * y_stride + offs_n, mask=n2, other=0.0)
        y3 = tl.load(y + 3 * y_stride + offs_n, mask=n3, other=0.0)
        d0, d1, d2, d3 = _four_products(
            h, w, rank, rows, offs_n, in_n, width, split_stride, h_stride, SPLITS, BLOCK_R, BLOCK_N
        )  # fmt: skip
        _add_row(y, offs_n, in_n, y0, scale * d0)
        _add_row(y + y_stride, offs_n, n1, y1, scale * d1)
        _add_row(y + 2 * y_stride, offs_n, n2, y2, scale * d2)
        _add_row(y + 3 * y_stride, offs_n, n3, y3, scale * d3)
    else:
        # Tile by tile of W, the next ones under way, h at hand.
        offs_m = tl.arange(0, DOT_M)
        in_m = offs_m < rows
        stop = tl.minimum((block + 1) * BLOCK_N, width)
        for r_start in range(0, rank, BLOCK_R):
            h_mr = _tile_of_h(
                h, r_start, rank, rows, split_stride, h_stride, y.dtype.element_ty, SPLITS, DOT_M, BLOCK_R
            )  # fmt: skip
            for n_start in tl.range(block * BLOCK_N, stop, DOT_N, num_stages=STAGES):
                offs_n = n_start + tl.arange(0, DOT_N)
                w_rn = _rows_of_w(w, r_start, rank, offs_n, width, y.dtype.element_ty, BLOCK_R)
                y_mn = y + offs_m[:, None] * y_stride + offs_n[None, :]
                y_mask = in_m[:, None] & (offs_n < width)[None, :]
                old = tl.load(y_mn, mask=y_mask, other=0.0).to(tl.float32)
                delta = scale * tl.dot(h_mr, w_rn, input_precision="ieee")
                tl.store(y_mn, (old + delta).to(y.dtype.element_ty), mask=y_mask)


@triton.jit
def _swiglu(gate, up):
    return gate / (1.0 + tl.exp(-gate)) * up


@triton.jit
def _gated_row(z, offs_n, mask, gate, up):
    tl.store(z + offs_n, _swiglu(gate, up).to(z.dtype.element_ty), mask=mask)


@triton.jit
def _gated_tile(
    z, y, offs_n, rows, WIDTH: tl.constexpr, y_stride, z_stride, gate_delta, up_delta, DOT_M: tl.constexpr
):  # fmt: skip
    offs_m = tl.arange(0, DOT_M)
    mask = (offs_m < rows)[:, None] & (offs_n < WIDTH)[None, :]
    y_mn = y + offs_m[:, None] * y_stride + offs_n[None, :]
    gate = tl.load(y_mn, mask=mask, other=0.0).to(tl.float32) + gate_delta
    up = tl.load(y_mn + WIDTH, mask=mask, other=0.0).to(tl.float32) + up_delta
    tl.store(z + offs_m[:, None] * z_stride + offs_n[None, :], _swiglu(gate, up).to(z.dtype.element_ty), mask=mask)


@triton.jit
def _gated_kernel(
    z, y, h, arena, table, scales, tiles, table_stride, scales_stride, split_stride, h_stride, y_stride, z_stride,
    WIDTH: tl.constexpr, BASE: tl.constexpr, SPLITS: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_N: tl.constexpr,
    DOT_M: tl.constexpr, DOT_N: tl.constexpr, STAGES: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """z[rows, a block of columns] = silu(gate + its adapter's) * (up + its adapter's); gate and up lie side by side in
    y."""
    tile = tiles + tl.program_id(1) * 3
    slot = tl.load(tile + 2)
    if (slot < 0) & (slot != BASE):
        if PDL:
            gdc_wait()
        return
    first_row, rows = tl.load(tile).to(tl.int64), tl.load(tile + 1)
    block = tl.program_id(0)
    known = tl.maximum(slot, 0)
    gate_w, gate_rank, _, gate_scale = _factor(arena, table, scales, table_stride, scales_stride, known, 0, 2, "b")
    up_w, up_rank, up_first, up_scale = _factor(arena, table, scales, table_stride, scales_stride, known, 1, 2, "b")
    gate_rank = tl.where(slot < 0, 0, gate_rank)
    up_rank = tl.where(slot < 0, 0, up_rank)
    if PDL:
        gdc_wait()
    h += first_row * h_stride
    y += first_row * y_stride
    z += first_row * z_stride
    if DOT_N == 0:
        offs_n = block * BLOCK_N + tl.arange(0, BLOCK_N)
        in_n = offs_n < WIDTH
        nth = tl.zeros_like(offs_n)
        n1, n2, n3 = in_n & (nth + 1 < rows), in_n & (nth + 2 < rows), in_n & (nth + 3 < rows)
        y0 = tl.load(y + offs_n, mask=in_n, other=0.0)  # before the products: its latency hides behind theirs
        y1 = tl.load(y + y_stride + offs_n, mask=n1, other=0.0)
        y2 = tl.load(y + 2 * y_stride + offs_n, mask=n2, other=0.0)
        y3 = tl.load(y + 3 * y_stride + offs_n, mask=n3, other=0.0)
        g0, g1, g2, g3 = _four_products(
            h, gate_w, gate_rank, rows, offs_n, in_n, WIDTH, split_stride, h_stride, SPLITS, BLOCK_R, BLOCK_N
        )  # fmt: skip
        g0 = y0.to(tl.float32) + gate_scale * g0
        g1 = y1.to(tl.float32) + gate_scale * g1
        g2 = y2.to(tl.float32) + gate_scale * g2
        g3 = y3.to(tl.float32) + gate_scale * g3
        y += WIDTH
        y0 = tl.load(y + offs_n, mask=in_n, other=0.0)
        y1 = tl.load(y + y_stride + offs_n, mask=n1, other=0.0)
        y2 = tl.load(y + 2 * y_stride + offs_n, mask=n2, other=0.0)
        y3 = tl.load(y + 3 * y_stride + offs_n, mask=n3, other=0.0)
        u0, u1, u2, u3 = _four_products(
            h + up_first, up_w, up_rank, rows, offs_n, in_n, WIDTH, split_stride, h_stride, SPLITS, BLOCK_R, BLOCK_N
        )  # fmt: skip
        _gated_row(z, offs_n, in_n, g0, y0.to(tl.float32) + up_scale * u0)
        _gated_row(z + z_stride, offs_n, n1, g1, y1.to(tl.float32) + up_scale * u1)
        _gated_row(z + 2 * z_stride, offs_n, n2, g2, y2.to(tl.float32) + up_scale * u2)
        _gated_row(z + 3 * z_stride, offs_n, n3, g3, y3.to(tl.float32) + up_scale * u3)
    else:
        dtype: tl.constexpr = y.dtype.element_ty
        start, stop = block * BLOCK_N, tl.minimum((block + 1) * BLOCK_N, WIDTH)
        gate_h = _tile_of_h(h, 0, gate_rank, rows, split_stride, h_stride, dtype, SPLITS, DOT_M, BLOCK_R)
        up_h = _tile_of_h(h + up_first, 0, up_rank, rows, split_stride, h_stride, dtype, SPLITS, DOT_M, BLOCK_R)
        rank = tl.maximum(gate_rank, up_rank)
        if rank <= BLOCK_R:  # no loop inside, so that the next tiles of W are under way
            for n_start in tl.range(start, stop, DOT_N, num_stages=STAGES):
                offs_n = n_start + tl.arange(0, DOT_N)
                gate_w_rn = _rows_of_w(gate_w, 0, gate_rank, offs_n, WIDTH, dtype, BLOCK_R)
                up_w_rn = _rows_of_w(up_w, 0, up_rank, offs_n, WIDTH, dtype, BLOCK_R)
                gate_d = gate_scale * tl.dot(gate_h, gate_w_rn, input_precision="ieee")
                up_d = up_scale * tl.dot(up_h, up_w_rn, input_precision="ieee")
                _gated_tile(z, y, offs_n, rows, WIDTH, y_stride, z_stride, gate_d, up_d, DOT_M)
        else:
            # Nothing under way ahead: with the splits of h, it would not fit shared memory.
            for n_start in tl.range(start, stop, DOT_N, num_stages=1):
                offs_n = n_start + tl.arange(0, DOT_N)
                gate_d = tl.dot(
                    gate_h, _rows_of_w(gate_w, 0, gate_rank, offs_n, WIDTH, dtype, BLOCK_R), input_precision="ieee"
                )  # fmt: skip
                up_d = tl.dot(up_h, _rows_of_w(up_w, 0, up_rank, offs_n, WIDTH, dtype, BLOCK_R), input_precision="ieee")
                for r in tl.range(BLOCK_R, rank, BLOCK_R, num_stages=1):
                    h_mr = _tile_of_h(h, r, gate_rank, rows, split_stride, h_stride, dtype, SPLITS, DOT_M, BLOCK_R)
                    w_rn = _rows_of_w(gate_w, r, gate_rank, offs_n, WIDTH, dtype, BLOCK_R)
                    gate_d = tl.dot(h_mr, w_rn, gate_d, input_precision="ieee")
                    h_mr = _tile_of_h(
                        h + up_first, r, up_rank, rows, split_stride, h_stride, dtype, SPLITS, DOT_M, BLOCK_R
                    )  # fmt: skip
                    w_rn = _rows_of_w(up_w, r, up_rank, offs_n, WIDTH, dtype, BLOCK_R)
                    up_d = tl.dot(h_mr, w_rn, up_d, input_precision="ieee")
                gate_d, up_d = gate_scale * gate_d, up_scale * up_d
                _gated_tile(z, y, offs_n, rows, WIDTH, y_stride, z_stride, gate_d, up_d, DOT_M)


# --------------------------------------------------------------------------------------------------------- launches


class Work(NamedTuple):
    """What every launch of one operation shares; see lora.py."""

    table: torch.Tensor
    scales: torch.Tensor
    tiles: torch.Tensor
    block_m: int
    max_rank: int

    @property
    def num_members(self) -> int:
        return self.table.shape[1]

    @property
    def strides(self) -> tuple[int, int]:
        """From slot to slot in table and scales, which may be a site's part of wider ones."""
        assert self.table.stride()[1:] == (4, 1) and self.scales.stride(1) == 1 and self.tiles.is_contiguous()
        return self.table.stride(0), self.scales.stride(0)


def _blocks(widths: Sequence[int], size: int) -> tuple[int, ...]:
    return tuple(triton.cdiv(w, size) for w in widths)


@cache
def _overlap(device: torch.device) -> dict[str, bool]:
    """Launch options. From Hopper on, a kernel may start while the one before it runs (programmatic dependent launch):
    it reads its tables, and waits before it touches x, h or y. Every program waits, also those without work: the
    kernel after this one takes its end for the end of all before."""
    if device.type == "cuda" and torch.cuda.get_device_capability(device)[0] >= 9:
        return {"PDL": True, "launch_pdl": True}
    return {"PDL": False}


@cache
def _most_stages(device: torch.device) -> int:
    """Of gated: the GPUs that give a block 99 KiB of shared memory hold a tile of W less than those that give 163."""
    if device.type != "cuda":
        return 3
    return 3 if torch.cuda.get_device_properties(device).shared_memory_per_block_optin > 2**17 else 2


def shrink(x: torch.Tensor, arena: torch.Tensor, work: Work, side: str, widths: Sequence[int]) -> torch.Tensor:
    """h float32 (splits, T, columns) of x (T, sum(widths)); rows and columns of no tile and no rank stay unwritten."""
    assert x.stride(1) == 1, "rows of x must be contiguous"
    h, chunk, blocks = _workspace(x, work, widths)
    most = work.max_rank * (work.num_members if side == "a" else 1)
    _shrink_kernel[(len(h) * len(widths), len(work.tiles), triton.cdiv(most, blocks["BLOCK_R"]))](
        h, x, arena, work.table, work.scales, work.tiles, *work.strides, h.stride(0), h.stride(1), x.stride(0),
        WIDTHS=tuple(widths), BLOCKS=(len(h),) * len(widths), MEMBERS=work.num_members, SIDE=side,
        CHUNK=chunk, BLOCK_M=work.block_m, **blocks, **_overlap(x.device),
    )  # fmt: skip
    return h


def unwritten(x: torch.Tensor, work: Work) -> torch.Tensor:
    """h as of `shrink`, side "a", where no tile is to be read."""
    return _workspace(x, work, [x.shape[1]])[0]


def _workspace(x: torch.Tensor, work: Work, widths: Sequence[int]) -> tuple[torch.Tensor, int, dict[str, int]]:
    """(h, columns of x of each of its splits, the further block sizes)."""
    few_or_many = "many" if len(work.tiles) >= MANY_TILES else "few"
    blocks = dict(SHRINK["prompts" if work.block_m == PREFILL_ROWS else few_or_many])
    chunk = max(blocks.pop("CHUNK"), triton.cdiv(max(widths), MAX_SPLITS))
    chunk = triton.cdiv(chunk, blocks["BLOCK_K"]) * blocks["BLOCK_K"]
    splits = triton.cdiv(max(widths), chunk)  # for every member, so that each column has all its splits
    columns = triton.cdiv(work.num_members * work.max_rank, 16) * 16
    h = torch.empty(splits, x.shape[0], columns, dtype=torch.float32, device=x.device)
    return h, chunk, blocks


def expand(y: torch.Tensor, h: torch.Tensor, arena: torch.Tensor, work: Work, side: str, widths: Sequence[int]) -> None:
    """y (T, sum(widths)) += what h (splits, T, columns) gives on this side, in place."""
    options = EXPAND[_kind(work, work.tiles)]
    blocks = _blocks(widths, options["BLOCK_N"])
    _expand_kernel[(sum(blocks), len(work.tiles))](
        y, h, arena, work.table, work.scales, work.tiles, *work.strides, h.stride(0), h.stride(1), y.stride(0),
        WIDTHS=tuple(widths), BLOCKS=blocks, MEMBERS=work.num_members, SIDE=side, SPLITS=len(h),
        DOT_M=max(16, work.block_m), **options, **_overlap(y.device),
    )  # fmt: skip


def _kind(work: Work, tiles: torch.Tensor) -> str:
    """Which block sizes of EXPAND and GATED to take."""
    if work.block_m == PREFILL_ROWS:
        return "prompts, high" if work.max_rank > LOW_RANK else "prompts"
    if work.block_m == HIGH_RANK_ROWS:
        return "high"
    return "many" if len(tiles) >= MANY_TILES else "few"


def forward(y: torch.Tensor, x: torch.Tensor, arena: torch.Tensor, work: Work, out_features: Sequence[int]) -> None:
    """y (T, sum(out)) += the adapters' outputs for x (T, in), in place; y may be x: shrink has read it all by then."""
    assert y.stride(1) == 1, "rows of y must be contiguous"
    h = shrink(x, arena, work, "a", [x.shape[1]])
    expand(y, h, arena, work, "b", out_features)


def gated(y: torch.Tensor, h: torch.Tensor, arena: torch.Tensor, work: Work, all_tiles: torch.Tensor) -> torch.Tensor:
    """(T, width): silu(gate) * up, of gate and up side by side in y (T, 2 width), each with what h, of shrink, gives
    added, which y itself does not get.

    all_tiles: those of work, and tiles of the slot BASE for all rows without an adapter.
    """
    assert y.stride(1) == 1, "rows of y must be contiguous"
    width = y.shape[1] // 2
    z = y.new_empty(y.shape[0], width)
    options = GATED[_kind(work, all_tiles)]
    options = options | {"STAGES": min(options["STAGES"], _most_stages(y.device))}
    _gated_kernel[(triton.cdiv(width, options["BLOCK_N"]), len(all_tiles))](
        z, y, h, arena, work.table, work.scales, all_tiles, *work.strides,
        h.stride(0), h.stride(1), y.stride(0), z.stride(0),
        WIDTH=width, BASE=BASE, SPLITS=len(h), DOT_M=max(16, work.block_m), **options, **_overlap(y.device),
    )  # fmt: skip
    return z
