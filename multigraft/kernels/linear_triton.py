"""A linear of the base model and what adapters add to it, for few rows, in one Triton kernel.

With a row or two a step waits for the weights to be read, and for kernels to be launched one after another. Here the
programs that read the weights are joined by some that compute h = x Aᵀ (+ c), of every tile, and some that compute h B,
each row with its own adapter's B. So adapters cost their own bytes, and no launch.

    y = sum of parts    parts 0 … PARTS - 1: x Wᵀ over some columns of x; part PARTS: what the adapters add

Whichever program ends last of those of a block of y's columns adds the parts up. Who waits for whom: only the programs
of h B wait, for those of h, which come before them in the launch and wait for nobody. Sums have a fixed order, so equal
inputs give equal bits.
"""

from __future__ import annotations

import os
from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from multigraft.core.batch import LOW_RANK
from multigraft.kernels.lora_triton import (
    ALIGN,
    Work,
    _blocks,
    _factor,
    _locate,
    _overlap,
    _shrink_tile,
    _sum_splits,
    _workspace,
)

MAX_ROWS = 32
"""Of x. Each row reads its adapter's B, whoever else has: with 64 rows of as many adapters that takes longer than the
launches that it spares."""
PROGRAMS = 180
"""So many keep an H100's memory busy; with fewer blocks of y's columns, those of x and W are cut into parts."""
MAX_PARTS = 4
PART_COLUMNS = 512
"""Of x, in a part at least."""
INTERPRETED = tl.constexpr(os.environ.get("TRITON_INTERPRET") == "1")
"""There programs run one after another, and have no threads that could be waited for."""


@triton.jit
def _publish(counter, mask=None):
    """Count one more program whose stores are done; returns how many there were before. Of several counters at once,
    where mask says so."""
    if not INTERPRETED:
        tl.debug_barrier()  # all threads' stores come before the threads that count
    return tl.atomic_add(counter, 1, mask=mask, sem="acq_rel")


@triton.jit
def _shrink(
    h, x, arena, table, scales, tile, table_stride, scales_stride, split_stride, h_stride, x_stride, split,
    WIDTH: tl.constexpr, MEMBERS: tl.constexpr, CHUNK: tl.constexpr, TILE_M: tl.constexpr,
    BLOCK_R: tl.constexpr, BLOCK_K: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """h[split, the tile's rows], of all members and ranks."""
    slot = tl.load(tile + 2)
    if slot >= 0:
        first_row, rows = tl.load(tile), tl.load(tile + 1)
        w, rank, _, scale = _factor(arena, table, scales, table_stride, scales_stride, slot, 0, MEMBERS, "a")
        x += first_row * x_stride
        h += split * split_stride + first_row * h_stride
        for r_start in range(0, rank, BLOCK_R):
            _shrink_tile(
                h, x, w, arena, table, table_stride, slot, scale, split, r_start, rank, rows, WIDTH, h_stride, x_stride,
                "a", CHUNK, TILE_M, BLOCK_R, BLOCK_K, STAGES,
            )  # fmt: skip


@triton.jit
def _product(
    x, w, num_rows, x_stride, k_start, k_stop, offs_m, offs_n, in_n,
    WIDTH: tl.constexpr, EVEN: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr, STAGES: tl.constexpr, SWAP: tl.constexpr,
):  # fmt: skip
    """x[:, k_start : k_stop] W[offs_n, k_start : k_stop]ᵀ, float32 (BLOCK_M, BLOCK_N). EVEN: nothing of W is beyond.
    SWAP: as W xᵀ, whose 64 rows a group of four warps multiplies from shared memory."""
    if SWAP:
        acc = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
    else:
        acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    in_m = (offs_m < num_rows)[:, None]
    for k in tl.range(k_start, k_stop, BLOCK_K, num_stages=STAGES):
        offs_k = k + tl.arange(0, BLOCK_K)
        x_ptr = x + offs_m[:, None] * x_stride + offs_k[None, :]
        w_ptr = w + offs_n[:, None] * WIDTH + offs_k[None, :]
        if EVEN:
            x_mk = tl.load(x_ptr, mask=in_m, other=0.0)
            w_nk = tl.load(w_ptr)
        else:
            in_k = (offs_k < k_stop)[None, :]
            x_mk = tl.load(x_ptr, mask=in_m & in_k, other=0.0)
            w_nk = tl.load(w_ptr, mask=in_n[:, None] & in_k, other=0.0)
        if SWAP:
            acc = tl.dot(w_nk, x_mk.T, acc, input_precision="ieee")
        else:
            acc = tl.dot(x_mk, w_nk.T, acc, input_precision="ieee")
    if SWAP:
        acc = acc.T
    return acc


@triton.jit
def _finish(
    y, bias, partial, counter, block, num_rows, y_stride, left, offs_n, in_n,
    PARTS: tl.constexpr, HAS_BIAS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Add up a block's parts, into columns left + offs_n of y."""
    offs_m = tl.arange(0, BLOCK_M)
    in_m = (offs_m < num_rows)[:, None]
    part = partial + block * ((PARTS + 1) * BLOCK_M * BLOCK_N)
    part += offs_m[:, None] * BLOCK_N + tl.arange(0, BLOCK_N)[None, :]
    total = tl.load(part, mask=in_m, other=0.0, cache_modifier=".cg")
    for i in tl.static_range(1, PARTS + 1):
        total += tl.load(part + i * (BLOCK_M * BLOCK_N), mask=in_m, other=0.0, cache_modifier=".cg")
    if HAS_BIAS:
        total += tl.load(bias + left + offs_n, mask=in_n, other=0.0).to(tl.float32)[None, :]
    y_mn = y + offs_m[:, None] * y_stride + (left + offs_n)[None, :]
    tl.store(y_mn, total.to(y.dtype.element_ty), mask=in_m & in_n[None, :])
    tl.store(counter, 0)


@triton.jit
def _rows_of_b(b, r_start, rank, offs_n, in_n, width, BLOCK_R: tl.constexpr):
    """(rows, BLOCK_R, columns), each row's of its own adapter."""
    offs_r = r_start + tl.arange(0, BLOCK_R)
    mask = (offs_r[None, :] < rank[:, None])[:, :, None] & in_n[None, None, :]
    return tl.load(b[:, None, None] + (offs_r[None, :, None] * width + offs_n[None, None, :]), mask=mask, other=0.0)


@triton.jit
def _times_b(h_m, b_mrn, r_start, rank, split_stride, SPLITS: tl.constexpr, BLOCK_R: tl.constexpr):
    """h B, float32 (rows, columns). h_m: of each row, the column of its rank 0."""
    offs_r = r_start + tl.arange(0, BLOCK_R)
    in_r = offs_r[None, :] < rank[:, None]
    h_mr = _sum_splits(h_m[:, None] + offs_r[None, :], in_r, split_stride, SPLITS)
    return tl.sum(h_mr[:, :, None] * b_mrn.to(tl.float32), axis=1)


@triton.jit
def _expand(
    y, bias, partial, counters, h, arena, table, scales, tiles, table_stride, scales_stride, split_stride, h_stride,
    y_stride, num_rows, num_tiles, shrinks, rows_start, wide_block, num_parts,
    WIDTHS: tl.constexpr, BLOCKS: tl.constexpr, WIDE_BLOCKS: tl.constexpr, MEMBERS: tl.constexpr,
    HAS_BIAS: tl.constexpr, SPLITS: tl.constexpr, TILES: tl.constexpr, PARTS: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr, WIDE: tl.constexpr, ROWS: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """What adapters add to ROWS rows in WIDE blocks of y's columns, all of one member."""
    member, left, width, wide = _locate(wide_block, WIDTHS, WIDE_BLOCKS)
    first_block, num_blocks = wide * WIDE, tl.cdiv(width, BLOCK_N)
    before = 0
    for m in tl.static_range(MEMBERS):
        before += tl.where(m < member, BLOCKS[m], 0)
    offs_m = rows_start + tl.arange(0, ROWS)
    offs_w = tl.arange(0, WIDE * BLOCK_N)
    offs_n = first_block * BLOCK_N + offs_w
    in_n = offs_n < width

    offs_t = tl.arange(0, TILES)
    in_t = offs_t < num_tiles
    t_first, t_rows = tl.load(tiles + 3 * offs_t, in_t, other=0), tl.load(tiles + 3 * offs_t + 1, in_t, other=0)
    t_slot = tl.load(tiles + 3 * offs_t + 2, mask=in_t, other=-1)
    mine = (offs_m[:, None] >= t_first[None, :]) & (offs_m[:, None] < (t_first + t_rows)[None, :])
    slot = tl.max(tl.where(mine, t_slot[None, :], -1), axis=1)
    known = tl.maximum(slot, 0).to(tl.int64)
    entry = table + known * table_stride
    first, rank = tl.zeros_like(slot), tl.zeros_like(slot)
    for m in tl.static_range(MEMBERS):
        r = tl.load(entry + 4 * m + 2).to(tl.int32)
        first += tl.where(m < member, r, 0)
        rank += tl.where(m == member, r, 0)
    rank = tl.where(slot < 0, 0, rank)
    b = arena + tl.multiple_of(tl.where(rank > 0, tl.load(entry + 4 * member + 1), 0), ALIGN)
    scale = tl.where(rank > 0, tl.load(scales + known * scales_stride + member), 0.0)
    b_mrn = _rows_of_b(b, 0, rank, offs_n, in_n, width, BLOCK_R)  # under way while h is waited for

    arrived = tl.atomic_add(counters, 0, sem="acquire")
    while arrived < shrinks:
        arrived = tl.atomic_add(counters, 0, sem="acquire")
    h_m = h + offs_m * h_stride + first
    delta = _times_b(h_m, b_mrn, 0, rank, split_stride, SPLITS, BLOCK_R)
    for r_start in range(BLOCK_R, tl.max(rank, axis=0), BLOCK_R):
        b_mrn = _rows_of_b(b, r_start, rank, offs_n, in_n, width, BLOCK_R)
        delta += _times_b(h_m, b_mrn, r_start, rank, split_stride, SPLITS, BLOCK_R)
    own = partial + ((before + first_block + offs_w // BLOCK_N) * (PARTS + 1) + PARTS) * (BLOCK_M * BLOCK_N)
    own += offs_w % BLOCK_N
    mask = (offs_m < num_rows)[:, None] & (first_block + offs_w // BLOCK_N < num_blocks)[None, :]
    tl.store(own[None, :] + offs_m[:, None] * BLOCK_N, scale[:, None] * delta, mask=mask)
    offs_b = tl.arange(0, WIDE)
    counter = counters + 2 + before + first_block
    ended = _publish(counter + offs_b, first_block + offs_b < num_blocks)
    for i in range(WIDE):
        if (first_block + i < num_blocks) & (tl.sum(tl.where(offs_b == i, ended, 0)) == num_parts - 1):
            offs_i = (first_block + i) * BLOCK_N + tl.arange(0, BLOCK_N)
            _finish(
                y, bias, partial, counter + i, before + first_block + i, num_rows, y_stride, left, offs_i,
                offs_i < width, PARTS, HAS_BIAS, BLOCK_M, BLOCK_N,
            )  # fmt: skip


@triton.jit(do_not_specialize=["num_rows", "num_tiles"])
def _linear_kernel(
    y, x, weight, bias, partial, h, counters, arena, table, scales, tiles, table_stride, scales_stride, split_stride,
    h_stride, x_stride, y_stride, num_rows, num_tiles,
    WIDTH: tl.constexpr, WIDTHS: tl.constexpr, BLOCKS: tl.constexpr, WIDE_BLOCKS: tl.constexpr,
    NUM_WIDE: tl.constexpr, MEMBERS: tl.constexpr, HAS_BIAS: tl.constexpr, SPLITS: tl.constexpr, CHUNK: tl.constexpr,
    SHRINK_M: tl.constexpr, SHRINK_R: tl.constexpr, SHRINK_K: tl.constexpr, SHRINK_STAGES: tl.constexpr,
    TILES: tl.constexpr, PARTS: tl.constexpr, PART: tl.constexpr, EVEN: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, STAGES: tl.constexpr, WIDE: tl.constexpr, ROWS: tl.constexpr,
    BLOCK_R: tl.constexpr, LAST: tl.constexpr, SWAP: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """y = x Wᵀ (+ bias) + the adapters' outputs. WIDTH: columns of x; WIDTHS: of y, by member. Programs are launched in
    this order: those of h, of h B, of x Wᵀ; with LAST those of h B come last."""
    program, shrinks = tl.program_id(0), num_tiles * SPLITS
    row_blocks = tl.cdiv(num_rows, ROWS)
    expands, num_parts = NUM_WIDE * row_blocks, PARTS + row_blocks
    if LAST:
        products = tl.num_programs(0) - shrinks - expands
        if program >= shrinks + products:
            program -= products
        elif program >= shrinks:
            program += expands
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    if program < shrinks:
        _shrink(
            h, x, arena, table, scales, tiles + program // SPLITS * 3, table_stride, scales_stride, split_stride,
            h_stride, x_stride, program % SPLITS, WIDTH, MEMBERS, CHUNK, SHRINK_M, SHRINK_R, SHRINK_K, SHRINK_STAGES,
        )  # fmt: skip
        _publish(counters)
    elif program < shrinks + expands:
        program -= shrinks
        _expand(
            y, bias, partial, counters, h, arena, table, scales, tiles, table_stride, scales_stride, split_stride,
            h_stride, y_stride, num_rows, num_tiles, shrinks, program % row_blocks * ROWS, program // row_blocks,
            num_parts, WIDTHS, BLOCKS, WIDE_BLOCKS, MEMBERS, HAS_BIAS, SPLITS, TILES, PARTS, BLOCK_M, BLOCK_N, WIDE,
            ROWS, BLOCK_R,
        )  # fmt: skip
        if tl.atomic_add(counters + 1, 1, sem="acq_rel") == expands - 1:  # nobody waits for h any more
            tl.store(counters, 0)
            tl.store(counters + 1, 0)
    else:
        part, column_block = (program - shrinks - expands) % PARTS, (program - shrinks - expands) // PARTS
        _, left, width, block = _locate(column_block, WIDTHS, BLOCKS)
        offs_m = tl.arange(0, BLOCK_M)
        offs_n = block * BLOCK_N + tl.arange(0, BLOCK_N)
        in_n = offs_n < width
        acc = _product(
            x, weight + left * WIDTH, num_rows, x_stride, part * PART, tl.minimum((part + 1) * PART, WIDTH),
            offs_m, offs_n, in_n, WIDTH, EVEN, BLOCK_M, BLOCK_N, BLOCK_K, STAGES, SWAP,
        )  # fmt: skip
        own = partial + (column_block * (PARTS + 1) + part) * (BLOCK_M * BLOCK_N)
        own += offs_m[:, None] * BLOCK_N + tl.arange(0, BLOCK_N)[None, :]
        tl.store(own, acc, mask=(offs_m < num_rows)[:, None])
        counter = counters + 2 + column_block
        if _publish(counter) == num_parts - 1:
            _finish(
                y, bias, partial, counter, column_block, num_rows, y_stride, left, offs_n, in_n, PARTS, HAS_BIAS,
                BLOCK_M, BLOCK_N,
            )  # fmt: skip


def fits(num_rows: int, max_rank: int) -> bool:
    """Whether `linear` is the faster way for so many rows, and adapters of ranks up to max_rank. With higher ones, the
    programs of h B have most of their work still before them when h is there at last."""
    return num_rows <= MAX_ROWS and max_rank <= LOW_RANK


def new_counters(most_columns: int, device: torch.device) -> torch.Tensor:
    """What `linear` counts its programs in, for outputs of so many columns at most; zero between calls. Calls that run
    at the same time need counters of their own."""
    return torch.zeros(2 + most_columns, dtype=torch.int32, device=device)


def linear(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    arena: torch.Tensor,
    work: Work,
    out_features: Sequence[int],
    counters: torch.Tensor,
) -> torch.Tensor:
    """y (T, sum(out)) = x Wᵀ + bias + the adapters' outputs, for x (T, in) of MAX_ROWS rows at most.

    weight: (sum(out), in), row-major, of x's dtype. bias: (sum(out),). The rest as in lora.py.
    """
    num_rows, width = x.shape
    assert num_rows <= MAX_ROWS and x.stride(1) == 1 and weight.is_contiguous() and weight.dtype == x.dtype
    assert weight.numel() < 2**31, "offsets have 32 bits"
    h, chunk, _ = _workspace(x, work, [width])
    sizes = _sizes(num_rows, width, out_features, x.element_size())
    blocks = _blocks(out_features, sizes["BLOCK_N"])
    parts, num_blocks, num_tiles = sizes["PARTS"], sum(blocks), len(work.tiles)
    assert num_tiles <= MAX_ROWS and 2 + num_blocks <= len(counters)
    y = x.new_empty(num_rows, sum(out_features))
    room = num_blocks * (parts + 1) * sizes["BLOCK_M"] * sizes["BLOCK_N"]
    partial = torch.empty(room, dtype=torch.float32, device=x.device)
    wide_blocks = _blocks(out_features, sizes["WIDE"] * sizes["BLOCK_N"])
    expands = sum(wide_blocks) * triton.cdiv(num_rows, sizes["ROWS"])
    _linear_kernel[(num_tiles * len(h) + expands + num_blocks * parts,)](
        y, x, weight, x if bias is None else bias, partial, h, counters, arena,
        work.table, work.scales, work.tiles, *work.strides, h.stride(0), h.stride(1), x.stride(0), y.stride(0),
        num_rows, num_tiles,
        WIDTH=width, WIDTHS=tuple(out_features), BLOCKS=blocks, WIDE_BLOCKS=wide_blocks, NUM_WIDE=sum(wide_blocks),
        MEMBERS=work.num_members,
        HAS_BIAS=bias is not None, SPLITS=len(h), CHUNK=chunk, SHRINK_M=max(16, work.block_m),
        SHRINK_R=min(64, triton.next_power_of_2(h.shape[2])), SHRINK_K=64, SHRINK_STAGES=4, TILES=MAX_ROWS,
        EVEN=width % (parts * sizes["BLOCK_K"]) == 0 and all(n % sizes["BLOCK_N"] == 0 for n in out_features),
        **sizes, **_overlap(x.device),
    )  # fmt: skip
    return y


def _sizes(num_rows: int, width: int, out_features: Sequence[int], element_size: int) -> dict[str, int]:
    """Block sizes with which a processor has room for three or four programs, by their registers and shared memory."""
    block_m, block_n, block_k, stages = 16 if num_rows <= 16 else 32, 64, 256 // element_size, 3
    num_blocks = sum(_blocks(out_features, block_n))
    parts = 1
    while parts < MAX_PARTS and num_blocks * parts < PROGRAMS and width >= 2 * parts * PART_COLUMNS:
        parts *= 2
    if num_rows > 16:
        block_k, stages = block_k // 2, 4
    part = triton.cdiv(triton.cdiv(width, parts), block_k) * block_k
    sizes = {"BLOCK_M": block_m, "BLOCK_N": block_n, "BLOCK_K": block_k, "PARTS": parts, "PART": part, "num_warps": 4}
    # Where W's programs fill the card by themselves, those of h B would only keep some of them waiting.
    sizes |= {"LAST": parts == 1, "SWAP": parts == 1 and num_rows > 4, "STAGES": stages}
    if num_rows <= 4:
        return sizes | {"WIDE": 2, "ROWS": 4, "BLOCK_R": 8}
    return sizes | {"WIDE": 4, "ROWS": 4, "BLOCK_R": 4} | ({} if parts == 1 else {"maxnreg": 128})
