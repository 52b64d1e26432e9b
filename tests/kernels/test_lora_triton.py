"""The Triton kernels against the oracle of conftest.py and the plain reference."""

from __future__ import annotations

import pytest
import torch

from multigraft.kernels import lora_reference, lora_triton, lora_triton_grad
from tests.kernels.conftest import tiles_of_all_rows

TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 1e-2}
WIDTH = {4: 600, 16: 600, 64: 2100}
"""in_features by rows a tile, so that the columns are split among programs."""
GATED = [(torch.float32, 4), (torch.bfloat16, 16), (torch.bfloat16, 64)]
ALL_TILES_SEGMENTS = [(1, 2, 0), (4, 13, 2), (13, 14, 3), (15, 19, 1), (19, 21, 3), (21, 28, 0)]
"""Of five slots, among 34 rows."""


def forward(case, y, block_m):
    work = lora_triton.Work(case.table, case.scales, case.tiles(block_m), block_m, case.max_rank)
    lora_triton.forward(y, case.x, case.arena, work, case.out_features)
    return y


@pytest.mark.parametrize("block_m", [4, 16, 64])
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_forward(mixed_case, dtype, block_m):
    case = mixed_case(dtype, WIDTH[block_m])
    before = case.y.clone()
    y = forward(case, case.y, block_m)
    case.check_rows(y.double() - before.double(), case.delta(), TOLERANCE[dtype])  # the addend: y cannot hide it
    assert torch.equal(y[case.gap_rows()], before[case.gap_rows()])
    for rows, _, cols, factor in case.blocks():
        assert factor is not None or torch.equal(y[rows, cols], before[rows, cols])


@pytest.mark.parametrize("out_features", [[24], [8, 136]], ids=str)
def test_forward_with_fewer_members(lora_case, out_features, device):
    ranks = [[rank] * len(out_features) for rank in (1, 16, 128)]
    case = lora_case(ranks, [(0, 3, 2), (3, 20, 0), (20, 21, 1)], 64, out_features, device=device)
    for block_m in (4, 64):
        case.check_rows(forward(case, torch.zeros_like(case.y), block_m), case.delta(), 2e-6)


def test_forward_without_work(lora_case, device):
    case = lora_case([[4]], [], 32, [16], num_rows=3, device=device)
    before = case.y.clone()
    assert torch.equal(forward(case, case.y, 4), before)


def test_strided_rows(lora_case, device):
    """x and y may be columns of wider tensors."""
    case = lora_case([[5]], [(0, 4, 0)], 48, [32], num_rows=4, device=device)
    wide_y = torch.full((4, 100), torch.nan, device=device)
    wide_y[:, 10:42] = 0
    case.x = torch.cat([case.x, torch.full_like(case.x, torch.nan)], dim=1)[:, :48]
    forward(case, wide_y[:, 10:42], 4)
    case.check_rows(wide_y[:, 10:42], case.delta(), 2e-6)
    assert wide_y[:, :10].isnan().all() and wide_y[:, 42:].isnan().all()


@pytest.mark.parametrize("block_m", [4, 64])
def test_input_may_be_the_output(lora_case, block_m, device):
    """ReFT: the residual stream is both."""
    ranks, n = [[4], [1], [0], [40]], block_m
    segments = [(0, 3, 2), (3, n + 6, 0), (n + 6, n + 7, 1), (n + 8, 2 * n + 9, 3)]
    case = lora_case(ranks, segments, 1040, [1040], device=device)
    case.y = case.x
    expected = case.x.double().cpu() + case.delta()
    forward(case, case.y, block_m)
    case.check_rows(case.y, expected, 2e-6)
    assert case.y[case.gap_rows()].isnan().all()


def test_results_are_bits_of_the_request_alone(lora_case, device):
    """Neither a second run nor the rest of the batch changes a bit."""
    segments = [(0, 1, 0), (1, 2, 2), (2, 8, 1), (9, 11, 0)]
    case = lora_case([[3, 33], [64, 1], [0, 5]], segments, 600, [40, 17], device=device)  # three splits of x
    together = forward(case, case.y.clone(), 4)
    assert torch.equal(together, forward(case, case.y.clone(), 4))
    case.segments, rows = case.segments[2:3], slice(*case.segments[2][:2])
    assert torch.equal(together[rows], forward(case, case.y.clone(), 4)[rows])


@pytest.mark.parametrize("dtype, block_m", [(torch.float32, 64), (torch.bfloat16, 64)], ids=str)
def test_backward(mixed_case, dtype, block_m):
    case = mixed_case(dtype, 200)
    tiles = case.tiles(block_m)
    work = lora_triton.Work(case.table, case.scales, tiles, block_m, case.max_rank)
    g = torch.randn_like(case.y)
    g[case.gap_rows()] = torch.nan
    d_x, d_arena = lora_triton_grad.backward(g, case.x, case.arena, work, case.out_features)

    exact = [t.cpu().double() for t in (g, case.x, case.arena)]
    tables = [t.cpu() for t in (case.table, case.scales, tiles)]
    ref_x, ref_arena = lora_reference.backward(*exact, *tables, case.out_features)
    assert d_x.dtype == dtype and d_arena.dtype == dtype
    assert not d_x[case.gap_rows()].any()
    for first, stop, _ in case.segments:
        error = (d_x[first:stop].cpu().double() - ref_x[first:stop]).norm()
        assert error <= TOLERANCE[dtype] * ref_x[first:stop].norm()
    assert not d_arena.cpu()[ref_arena == 0].any()
    for (a, *_), (_, b, *_) in zip(case.table[:, 0].tolist(), case.table[:, -1].tolist(), strict=True):
        actual, expected = d_arena[a:b].cpu().double(), ref_arena[a:b]  # one slot's A and most of its B
        assert (actual - expected).norm() <= TOLERANCE[dtype] * expected.norm()
    assert (d_arena.cpu().double() - ref_arena).norm() <= TOLERANCE[dtype] * ref_arena.norm()


def test_backward_computes_only_what_is_needed(lora_case, device):
    case = lora_case([[4]], [(0, 3, 0)], 32, [16], device=device)
    work = lora_triton.Work(case.table, case.scales, case.tiles(64), 64, case.max_rank)
    g = torch.randn_like(case.y)
    d_x, d_arena = lora_triton_grad.backward(g, case.x, case.arena, work, [16])
    only_x, nothing = lora_triton_grad.backward(g, case.x, case.arena, work, [16], need_arena=False)
    assert torch.equal(only_x, d_x) and nothing.numel() == 0
    nothing, only_arena = lora_triton_grad.backward(g, case.x, case.arena, work, [16], need_x=False)
    assert torch.equal(only_arena, d_arena) and nothing.numel() == 0


def test_arena_in_float32_under_bf16_activations(lora_case, device):
    """Training keeps float32 factors; gradients come back in float32."""
    case = lora_case([[8, 3]], [(0, 40, 0)], 64, [48, 24], torch.bfloat16, device=device)
    case.arena = case.arena.float()
    case.check_rows(forward(case, torch.zeros_like(case.y), 4), case.delta(), 1e-2)
    work = lora_triton.Work(case.table, case.scales, case.tiles(64), 64, case.max_rank)
    assert lora_triton_grad.backward(case.y, case.x, case.arena, work, case.out_features)[1].dtype == torch.float32


@pytest.mark.parametrize("dtype, block_m", GATED, ids=str)
def test_gated(lora_case, dtype, block_m, device):
    """SwiGLU of gate and up with their adapters' outputs; rows without an adapter get it, too, and y nothing."""
    ranks = [[3, 33], [0, 0], [64, 1], [8, 0], [5, 5]]
    case = lora_case(ranks, ALL_TILES_SEGMENTS, 320, [530, 530], dtype, num_rows=34, device=device)
    case.y[case.gap_rows()] *= 3
    y = case.y.clone()
    gate, up = (y.double().cpu() + case.delta()).chunk(2, dim=1)
    expected = gate * torch.sigmoid(gate) * up
    every = tiles_of_all_rows(case, block_m)
    work = lora_triton.Work(case.table, case.scales, case.tiles(block_m), block_m, case.max_rank)
    h = lora_triton.shrink(case.x, case.arena, work, "a", [320])
    z = lora_triton.gated(y, h, case.arena, work, every)
    assert z.dtype == dtype and torch.equal(y, case.y)
    for row in range(34):
        error = (z[row].double().cpu() - expected[row]).norm()
        assert error <= 2 * TOLERANCE[dtype] * expected[row].norm(), (row, float(error))  # a product of two
    # The base model's part alone, as in a step whose adapters act elsewhere.
    nothing = case.table.clone()
    nothing[:, :, 2] = 0
    h = lora_triton.unwritten(case.x, work).fill_(torch.nan)
    base = lora_triton.gated(y, h, case.arena, work._replace(table=nothing), every)
    gate, up = y.double().cpu().chunk(2, dim=1)
    assert (base.double().cpu() - gate * torch.sigmoid(gate) * up).norm() <= TOLERANCE[dtype] * base.double().norm()
