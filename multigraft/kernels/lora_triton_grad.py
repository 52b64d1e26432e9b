"""Gradients of the segmented LoRA operation in Triton; see lora_triton.py for the kernels shared with it."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl

from multigraft.kernels.lora_triton import Work, _blocks, _c_offset, _factor, _locate, _sum_splits, expand, shrink

OUTER = {
    64: {"BLOCK_R": 32, "BLOCK_N": 64, "num_warps": 4, "num_stages": 3},
}


@triton.jit
def _outer_kernel(
    d_arena, h, x, table, scales, tiles, num_tiles, table_stride, scales_stride, split_stride, h_stride, x_stride,
    WIDTHS: tl.constexpr, BLOCKS: tl.constexpr, MEMBERS: tl.constexpr, SIDE: tl.constexpr, SPLITS: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_T: tl.constexpr,
):  # fmt: skip
    """d_W[a block of ranks, a block of columns] = scale * hᵀ x, summed over the slot's tiles in the table's order.

    On side "a" the first block of columns also sums h over the rows, which is d_c.
    """
    slot = tl.program_id(2)
    start = 0
    count = 0
    for t in range(0, num_tiles, BLOCK_T):
        offs_t = t + tl.arange(0, BLOCK_T)
        slots = tl.load(tiles + offs_t * 3 + 2, mask=offs_t < num_tiles, other=-1)
        start += tl.sum(((slots >= 0) & (slots < slot)).to(tl.int32))
        count += tl.sum((slots == slot).to(tl.int32))
    member, left, width, block = _locate(tl.program_id(0), WIDTHS, BLOCKS)
    d_w, rank, first, scale = _factor(d_arena, table, scales, table_stride, scales_stride, slot, member, MEMBERS, SIDE)
    offs_r = tl.program_id(1) * BLOCK_R + tl.arange(0, BLOCK_R)
    in_r = offs_r < rank
    if (count == 0) | (tl.program_id(1) * BLOCK_R >= rank):
        return
    offs_n = block * BLOCK_N + tl.arange(0, BLOCK_N)
    in_n = offs_n < width
    offs_m = tl.arange(0, BLOCK_M)
    acc = tl.zeros((BLOCK_R, BLOCK_N), tl.float32)
    h_sum = tl.zeros((BLOCK_R,), tl.float32)
    for t in range(start, start + count):
        first_row, rows = tl.load(tiles + t * 3).to(tl.int64), tl.load(tiles + t * 3 + 1)
        in_m = offs_m < rows
        h_rm = h + first_row * h_stride + first + offs_r[:, None] + offs_m[None, :] * h_stride
        h_rm = _sum_splits(h_rm, in_r[:, None] & in_m[None, :], split_stride, SPLITS)
        x_mn = x + first_row * x_stride + left + offs_m[:, None] * x_stride + offs_n[None, :]
        x_mn = tl.load(x_mn, mask=in_m[:, None] & in_n[None, :], other=0.0)
        acc = tl.dot(h_rm.to(x_mn.dtype), x_mn, acc, input_precision="ieee")
        h_sum += tl.sum(h_rm, axis=1)
    if SIDE == "a":
        c = _c_offset(table, table_stride, slot)
        if (c >= 0) & (block == 0):
            tl.store(d_arena + c + offs_r, h_sum.to(d_arena.dtype.element_ty), mask=in_r)
    d_w += offs_r[:, None] * width + offs_n[None, :]
    tl.store(d_w, (scale * acc).to(d_arena.dtype.element_ty), mask=in_r[:, None] & in_n[None, :])


def outer(
    d_arena: torch.Tensor, h: torch.Tensor, x: torch.Tensor, work: Work, side: str, widths: Sequence[int]
) -> None:
    """Write the gradient of one side's factors into d_arena, for the slots that have tiles."""
    options = OUTER[work.block_m]
    blocks = _blocks(widths, options["BLOCK_N"])
    max_rows = work.max_rank * (work.num_members if side == "a" else 1)
    _outer_kernel[(sum(blocks), triton.cdiv(max_rows, options["BLOCK_R"]), work.table.shape[0])](
        d_arena, h, x, work.table, work.scales, work.tiles, len(work.tiles),
        *work.strides, h.stride(0), h.stride(1), x.stride(0),
        WIDTHS=tuple(widths), BLOCKS=blocks, MEMBERS=work.num_members, SIDE=side, SPLITS=len(h),
        BLOCK_M=work.block_m, BLOCK_T=256, **options,
    )  # fmt: skip


def backward(
    g: torch.Tensor,
    x: torch.Tensor,
    arena: torch.Tensor,
    work: Work,
    out_features: Sequence[int],
    need_x: bool = True,
    need_arena: bool = True,
) -> tuple[torch.Tensor, torch.Tensor]:
    """(d_x, d_arena) for the gradient g (T, sum(out)) of the adapters' outputs; empty where not needed."""
    assert x.stride(1) == 1 and g.stride(1) == 1, "rows of x and g must be contiguous"
    d_x, d_arena = x.new_empty(0), arena.new_empty(0)
    u = shrink(g, arena, work, "b", out_features)
    if need_x:
        d_x = torch.zeros_like(x, memory_format=torch.contiguous_format)
        expand(d_x, u, arena, work, "a", [x.shape[1]])
    if need_arena:
        d_arena = torch.zeros_like(arena)
        outer(d_arena, u, x, work, "a", [x.shape[1]])
        outer(d_arena, shrink(x, arena, work, "a", [x.shape[1]]), g, work, "b", out_features)
    return d_x, d_arena
