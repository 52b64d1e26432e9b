"""The base product and the adapters' in one kernel, against float64."""

from __future__ import annotations

import pytest
import torch

from multigraft.kernels import linear_triton, lora_triton
from multigraft.kernels.tiles import DECODE_ROWS, HIGH_RANK_ROWS
from tests.kernels.conftest import LoraCase, tiles_of_all_rows

TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 1e-2}
RANKS = [[3, 16, 2], [0, 0, 0], [33, 1, 0], [8, 0, 16], [5, 5, 5]]
SEGMENTS = [(0, 2, 3), (3, 4, 0), (4, 9, 2), (9, 11, 1), (11, 12, 3)]


def run(case: LoraCase, weight: torch.Tensor, bias: torch.Tensor | None, tiles: torch.Tensor, block_m: int):
    work = lora_triton.Work(case.table, case.scales, tiles, block_m, case.max_rank)
    counters = linear_triton.new_counters(sum(case.out_features), case.x.device)
    y = linear_triton.linear(case.x, weight, bias, case.arena, work, case.out_features, counters)
    assert not counters.any()
    return y


def of_base(case: LoraCase, dtype: torch.dtype, num_rows: int, with_bias: bool = True):
    """Weight and bias; rows of x without an adapter are numbers, too."""
    n_in, device = case.x.shape[1], case.x.device
    case.x[case.gap_rows()] = torch.randn(int(case.gap_rows().sum()), n_in, device=device).to(dtype)
    weight = (torch.randn(sum(case.out_features), n_in, device=device) / n_in**0.5).to(dtype)
    return weight, torch.randn(len(weight), device=device).to(dtype) if with_bias else None


def check(case: LoraCase, y: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> None:
    x, weight = case.x.double().cpu(), weight.double().cpu()
    base = x @ weight.T + (0 if bias is None else bias.double().cpu())
    expected, tolerance = base + case.delta(), TOLERANCE[case.x.dtype]
    case.check_rows(y, expected, tolerance)  # adapters' outputs are as large as the base model's
    y = y.double().cpu()
    assert (y - expected).norm(dim=1).le(tolerance * expected.norm(dim=1)).all()


@pytest.mark.parametrize(
    ("dtype", "block_m", "num_rows", "in_features", "with_bias"),
    [
        (torch.float32, DECODE_ROWS, 13, 320, True),
        (torch.float32, HIGH_RANK_ROWS, 32, 192, False),
        (torch.bfloat16, DECODE_ROWS, 16, 320, False),
        (torch.bfloat16, HIGH_RANK_ROWS, 17, 576, True),
    ],
    ids=str,
)
@pytest.mark.parametrize("parts", [1, 4])
def test_base_and_adapters(lora_case, dtype, block_m, num_rows, in_features, with_bias, parts, device, monkeypatch):
    """Widths and inputs that no block divides, rows without an adapter, and an adapter that is not at this site."""
    monkeypatch.setattr(linear_triton, "PROGRAMS", 0 if parts == 1 else 10**9)
    monkeypatch.setattr(linear_triton, "PART_COLUMNS", 16)
    case = lora_case(RANKS, SEGMENTS, in_features, [130, 40, 17], dtype, num_rows=num_rows, device=device)
    weight, bias = of_base(case, dtype, num_rows, with_bias)
    y = run(case, weight, bias, tiles_of_all_rows(case, block_m), block_m)
    check(case, y, weight, bias)
    assert torch.equal(y, run(case, weight, bias, tiles_of_all_rows(case, block_m, spare=2), block_m))


def test_every_row_its_own_adapter(lora_case, device):
    """As many tiles as there may be; blocks that fit exactly."""
    n = linear_triton.MAX_ROWS
    segments = [(row, row + 1, (7 * row) % n) for row in range(n)]
    case = lora_case([[1 + slot % 16] for slot in range(n)], segments, 256, [128], num_rows=n, device=device)
    weight, _ = of_base(case, torch.float32, n, with_bias=False)
    check(case, run(case, weight, None, case.tiles(DECODE_ROWS, spare=0), DECODE_ROWS), weight, None)


def test_no_adapter_at_all(lora_case, device):
    case = lora_case([[4]], [], 256, [64], num_rows=2, device=device)
    weight, _ = of_base(case, torch.float32, 2, with_bias=False)
    check(case, run(case, weight, None, case.tiles(DECODE_ROWS), DECODE_ROWS), weight, None)


def test_a_row_does_not_depend_on_the_others(lora_case, device):
    case = lora_case(RANKS, SEGMENTS, 320, [130, 40, 17], num_rows=13, device=device)
    weight, _ = of_base(case, torch.float32, 13, with_bias=False)
    together = run(case, weight, None, case.tiles(DECODE_ROWS), DECODE_ROWS)
    first, stop, _ = case.segments[2]
    case.segments = case.segments[2:3]
    assert torch.equal(together[first:stop], run(case, weight, None, case.tiles(DECODE_ROWS), DECODE_ROWS)[first:stop])


@pytest.mark.skipif(not torch.cuda.is_available(), reason="programs at the same time are a GPU's")
def test_again_and_again_and_in_a_graph():
    """Programs wait for one another: a thousand calls, of two sites in turn, that share their counters."""
    from tests.kernels.conftest import make_case

    cases = []
    for n_in, outs in ((4096, [1024, 512, 512]), (1024, [4096])):
        ranks = [[16] * len(outs) for _ in range(4)]
        case = make_case(ranks, [(4 * i, 4 * i + 4, i) for i in range(4)], n_in, outs, torch.bfloat16, 16, "cuda")
        weight, _ = of_base(case, torch.bfloat16, 16, with_bias=False)
        work = lora_triton.Work(case.table, case.scales, case.tiles(DECODE_ROWS), DECODE_ROWS, 16)
        cases.append((case, weight, work))
    counters = linear_triton.new_counters(4096, torch.device("cuda"))

    def both():
        return [linear_triton.linear(c.x, w, None, c.arena, k, c.out_features, counters) for c, w, k in cases]

    first = both()
    for (case, weight, _), y in zip(cases, first, strict=True):
        check(case, y, weight, None)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        kept = [both() for _ in range(50)]
    for _ in range(20):
        graph.replay()
    assert all(torch.equal(a, b) for pair in kept for a, b in zip(pair, first, strict=True)) and not counters.any()
