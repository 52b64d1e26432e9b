"""The custom ops and the plain reference on the CPU; and the Triton kernels in Triton's interpreter."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from multigraft.kernels.lora import segmented_lora, segmented_lora_, segmented_lora_backward
from multigraft.kernels.lora_reference import embedding_lora_
from multigraft.kernels.tiles import DECODE_ROWS, HIGH_RANK_ROWS, PREFILL_ROWS, build_tiles, choose_block_m


def arguments(case, block_m=DECODE_ROWS):
    return case.table, case.scales, case.tiles(block_m), case.out_features, block_m, case.max_rank


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 2e-6), (torch.bfloat16, 5e-3)], ids=str)
def test_in_place_op(mixed_case, dtype, tolerance):
    case = mixed_case(dtype, device="cpu")
    before = case.y.clone()
    segmented_lora_(case.y, case.x, case.arena, *arguments(case))
    case.check_rows(case.y, before.double() + case.delta(), tolerance)
    assert torch.equal(case.y[case.gap_rows()], before[case.gap_rows()])


def test_functional_op(mixed_case):
    case = mixed_case(device="cpu")
    delta = segmented_lora(case.x, case.arena, *arguments(case))
    case.check_rows(delta, case.delta(), 2e-6)
    assert not delta[case.gap_rows()].any()


def small_double_case(lora_case):
    segments = [(0, 1, 2), (2, 5, 0), (5, 6, 1), (6, 8, 0)]
    case = lora_case([[2, 1], [0, 3], [1, 0], [2, 2]], segments, 5, [3, 4], torch.float64)
    case.arena.nan_to_num_(0.7)  # finite differences need every entry finite
    case.x.nan_to_num_(0.3)
    return case


def test_gradients_by_finite_differences(lora_case):
    case = small_double_case(lora_case)
    inputs = case.x.requires_grad_(), case.arena.requires_grad_()
    assert torch.autograd.gradcheck(lambda x, arena: segmented_lora(x, arena, *arguments(case, 2)), inputs)


def test_arena_gradient_is_confined_to_slots_in_use(lora_case):
    case = small_double_case(lora_case)
    segmented_lora(case.x, case.arena.requires_grad_(), *arguments(case)).sum().backward()
    unused_slot = int(case.table[3, 0, 0])
    assert case.arena.grad[:unused_slot].any() and not case.arena.grad[unused_slot:].any()


def test_ops_pass_torchs_own_checks(lora_case):
    case = small_double_case(lora_case)
    torch.library.opcheck(segmented_lora_, (case.y, case.x, case.arena, *arguments(case)))
    inputs = case.x.requires_grad_(), case.arena.requires_grad_()
    torch.library.opcheck(segmented_lora, (*inputs, *arguments(case)))
    for need_x, need_arena in ((True, True), (True, False), (False, True)):
        args = case.y, case.x.detach(), case.arena.detach(), *arguments(case), need_x, need_arena
        torch.library.opcheck(segmented_lora_backward, args)


def test_ops_under_torch_compile(lora_case):
    case = small_double_case(lora_case)

    def step(x, arena, weight):
        y = x @ weight
        segmented_lora_(y.detach(), x.detach(), arena.detach(), *args)
        return (y + segmented_lora(x, arena, *args)).square().sum()

    args = arguments(case)
    weight = torch.randn(5, 7, dtype=torch.float64)
    grads = []
    for run in (step, torch.compile(step, backend="aot_eager", fullgraph=True)):
        inputs = case.x.clone().requires_grad_(), case.arena.clone().requires_grad_()
        loss = run(*inputs, weight)
        grads.append([loss.detach(), *torch.autograd.grad(loss, inputs)])
    torch.testing.assert_close(grads[0], grads[1])


def test_embedding(lora_case):
    case = lora_case([[3], [0], [7]], [(1, 4, 2), (4, 5, 1), (5, 6, 0)], 50, [12], with_c=False)
    ids = torch.randint(50, (len(case.x),))
    before = case.y.clone()
    embedding_lora_(case.y, ids, case.arena, case.table, case.scales, case.tiles(2), num_embeddings=50)
    case.x = torch.nn.functional.one_hot(ids, 50).double()
    case.check_rows(case.y, before + case.delta(), 2e-6)
    assert torch.equal(case.y[case.gap_rows()], before[case.gap_rows()])


needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


@needs_gpu
def test_gpu_ops_agree_with_the_cpus(mixed_case):
    case = mixed_case(device="cuda")
    g = torch.randn_like(case.y)
    results = []
    for device in ("cuda", "cpu"):
        x, arena = (t.detach().to(device).requires_grad_() for t in (case.x, case.arena))
        table, scales, tiles, *rest = arguments(case, PREFILL_ROWS)  # gradients have these alone
        delta = segmented_lora(x, arena, table.to(device), scales.to(device), tiles.to(device), *rest)
        results.append([t.cpu() for t in (delta.detach(), *torch.autograd.grad(delta, (x, arena), g.to(device)))])
    for actual, expected in zip(*results, strict=True):
        assert (actual - expected).norm() <= 2e-6 * expected.norm()


@needs_gpu
def test_captured_launch_serves_other_tiles(mixed_case):
    """What a CUDA graph of a decode step relies on: the next step differs only in what the buffers hold."""
    case = mixed_case(device="cuda")
    args = [case.x.nan_to_num(), case.arena, *arguments(case)]
    tiles = args[4]
    y = case.y.clone()
    segmented_lora_(y, *args)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        segmented_lora_(y, *args)
    case.segments = [(5, 9, 3), (11, 26, 2)]
    tiles.fill_(-1)
    other = case.tiles(DECODE_ROWS, spare=0)
    tiles[: len(other)] = other
    y.copy_(case.y)
    graph.replay()
    expected = case.y.clone()
    segmented_lora_(expected, *args)
    assert torch.equal(y, expected) and not torch.equal(y, case.y)


@pytest.mark.parametrize("block_m", [1, 3, 16])
def test_tiles_cover_every_row_once_in_the_slots_order(block_m):
    torch.manual_seed(block_m)
    cuts = torch.randint(0, 400, (40,)).sort().values.view(20, 2)  # gaps, and empty segments where two are equal
    slots = torch.randint(0, 5, (20,))
    tiles = build_tiles(cuts.int(), slots.int(), block_m, num_tiles=450)
    assert tiles.dtype == torch.int32 and tiles.shape == (450, 3)
    expected = [set() for _ in range(5)]
    for (first, stop), slot in zip(cuts.tolist(), slots.tolist(), strict=True):
        expected[slot] |= set(range(first, stop))
    seen = [[] for _ in range(5)]
    used = tiles[tiles[:, 2] >= 0].tolist()
    for first, rows, slot in used:
        assert 1 <= rows <= block_m
        seen[slot] += range(first, first + rows)
    assert all(len(rows) == len(set(rows)) for rows in seen)
    assert [set(rows) for rows in seen] == expected
    assert (tiles[: len(used), 2].diff() >= 0).all() and (tiles[len(used) :, 2] == -1).all()


def test_tile_table_too_small():
    with pytest.raises(AssertionError, match="2 tiles do not fit into a table of 1"):
        build_tiles(torch.tensor([[0, 3]]), torch.tensor([0]), 2, num_tiles=1)


def test_overlapping_segments():
    with pytest.raises(AssertionError, match="overlap"):
        build_tiles(torch.tensor([[0, 3], [2, 4]]), torch.tensor([0, 1]), 2)


def test_choice_of_tile_rows():
    assert choose_block_m(256, 256, 16) == choose_block_m(256, 64, 8) == DECODE_ROWS
    assert choose_block_m(256, 256, 17) == HIGH_RANK_ROWS
    assert choose_block_m(8192, 64, 16) == choose_block_m(8192, 64, 128) == PREFILL_ROWS


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")
@pytest.mark.skipif(torch.cuda.is_available(), reason="test_lora_triton.py runs on the GPU")
def test_triton_kernels_in_the_interpreter():
    """In a process of its own: Triton reads TRITON_INTERPRET when it is first imported."""
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "--no-header",
        *map(str, sorted(Path(__file__).parent.glob("test_*_triton.py"))),
    ]
    env = {**os.environ, "TRITON_INTERPRET": "1"}
    result = subprocess.run(command, env=env, capture_output=True, text=True, cwd=Path(__file__).parents[2])
    assert result.returncode == 0 and "skipped" not in result.stdout, result.stdout[-6000:] + result.stderr[-2000:]
