"""The segmented adapter operation: many adapters on one token axis, as torch custom ops with autograd.

For every tile (first row, rows, slot) and every member m of the site, with (a, b, rank, c) = table[slot, m]:

    y[rows, columns of m] += scales[slot, m] * (x[rows] @ A.T + c) @ B

LoRA has no c. ReFT's form is the same with x = y, the residual stream (adapters.reft).

Arguments of all functions:
    x           (T, in), rows contiguous. Rows of no tile are never read, and nothing is added to them.
    arena       1-D, all factors. bf16, fp16 or fp32; another dtype than x's is converted as it is read.
    table       int64 (slots, members, 4) of (a, b, rank, c), offsets in elements. B is stored transposed, (rank, out_m)
                row-major, at b. The members' A, (rank, in) row-major, lie one after another from table[slot, 0, 0] on,
                and their c, (rank,), from table[slot, 0, 3] on unless that is NO_OFFSET; the other members' a and c
                are not looked at. rank 0: the adapter leaves this member alone. The first a and every b are multiples
                of ALIGN.
    scales      float32 (slots, members). Both may be the first members of wider tables.
    tiles       int32 (n, 3), from tiles.build_tiles.
    out_features  widths of the members, whose columns lie one after another in y.
    block_m     rows a tile: what the tiles were built with.
    max_rank    bound on the rank of one member. It sizes a workspace; no traffic depends on it.

On CUDA nothing waits for the host and the launch grids depend on shapes only, so calls can be captured in a CUDA
graph; tables and tiles may change between replays. float32 accumulation, no atomics: equal inputs give equal bits.
On the CPU the plain reference runs, in whatever dtype it is given.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from . import lora_reference as reference

ALIGN = 8
"""Elements. The kernels load 16 bytes at a time."""
NO_OFFSET = -1
"""Offset of a c that is zero."""


@torch.library.custom_op("multigraft::segmented_lora_", mutates_args=("y",), device_types="cpu")
def segmented_lora_(
    y: Tensor,
    x: Tensor,
    arena: Tensor,
    table: Tensor,
    scales: Tensor,
    tiles: Tensor,
    out_features: Sequence[int],
    block_m: int,
    max_rank: int,
) -> None:
    """y (T, sum(out_features)) += the adapters' outputs, in place. For inference: has no gradient.

    x may be y, except under torch.compile, which takes no two inputs that are one when one of them is changed.
    """
    reference.forward(y, x, arena, table, scales, tiles, out_features)


@segmented_lora_.register_kernel("cuda")
def _(y, x, arena, table, scales, tiles, out_features, block_m, max_rank):
    from . import lora_triton  # here, as machines without a GPU may have no Triton

    work = lora_triton.Work(table, scales, tiles, block_m, max_rank)
    lora_triton.forward(y, x, arena, work, out_features)


@segmented_lora_.register_fake
def _(y, x, arena, table, scales, tiles, out_features, block_m, max_rank):
    return None


@torch.library.custom_op("multigraft::segmented_lora", mutates_args=())
def segmented_lora(
    x: Tensor,
    arena: Tensor,
    table: Tensor,
    scales: Tensor,
    tiles: Tensor,
    out_features: Sequence[int],
    block_m: int,
    max_rank: int,
) -> Tensor:
    """The adapters' outputs (T, sum(out_features)) alone, zero where nothing acts. Differentiable in x and arena.

    The gradient of the arena has the arena's shape, so for training pass the part of it that holds this site.
    """
    delta = x.new_zeros(x.shape[0], sum(out_features))
    segmented_lora_(delta, x, arena, table, scales, tiles, out_features, block_m, max_rank)
    return delta


@segmented_lora.register_fake
def _(x, arena, table, scales, tiles, out_features, block_m, max_rank):
    return x.new_empty(x.shape[0], sum(out_features))


@torch.library.custom_op("multigraft::segmented_lora_backward", mutates_args=(), device_types="cpu")
def segmented_lora_backward(
    g: Tensor,
    x: Tensor,
    arena: Tensor,
    table: Tensor,
    scales: Tensor,
    tiles: Tensor,
    out_features: Sequence[int],
    block_m: int,
    max_rank: int,
    need_x: bool,
    need_arena: bool,
) -> tuple[Tensor, Tensor]:
    """(d_x, d_arena) for the gradient g of segmented_lora's result; an empty tensor for one not needed."""
    d_x, d_arena = reference.backward(g, x, arena, table, scales, tiles, out_features)
    return d_x if need_x else x.new_empty(0), d_arena if need_arena else arena.new_empty(0)


@segmented_lora_backward.register_kernel("cuda")
def _(g, x, arena, table, scales, tiles, out_features, block_m, max_rank, need_x, need_arena):
    from . import lora_triton_grad

    work = lora_triton_grad.Work(table, scales, tiles, block_m, max_rank)
    return lora_triton_grad.backward(g, x, arena, work, out_features, need_x, need_arena)


@segmented_lora_backward.register_fake
def _(g, x, arena, table, scales, tiles, out_features, block_m, max_rank, need_x, need_arena):
    d_x = torch.empty_like(x, memory_format=torch.contiguous_format)
    return d_x if need_x else x.new_empty(0), torch.empty_like(arena) if need_arena else arena.new_empty(0)


def _setup_context(ctx, inputs, output) -> None:
    *tensors, ctx.out_features, ctx.block_m, ctx.max_rank = inputs
    ctx.save_for_backward(*tensors)


def _backward(ctx, g: Tensor):
    need_x, need_arena = ctx.needs_input_grad[:2]
    d_x, d_arena = segmented_lora_backward(
        g.contiguous(), *ctx.saved_tensors, ctx.out_features, ctx.block_m, ctx.max_rank, need_x, need_arena
    )
    return d_x if need_x else None, d_arena if need_arena else None, None, None, None, None, None, None


torch.library.register_autograd(segmented_lora, _backward, setup_context=_setup_context)
