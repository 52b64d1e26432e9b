"""The CPU's GEMM forms of y += s · Bᵀ(A x + c) against the formula, with and without c, in place on x too."""

from __future__ import annotations

import pytest
import torch

from multigraft.kernels.lora_gemm import Factors, add_equal_segments, add_segment

IN, ROWS = 12, 5


def make(seed: int, ranks: tuple[int, ...], outs: tuple[int, ...], with_c: bool) -> Factors:
    g = torch.Generator().manual_seed(seed)
    return Factors(
        a=torch.randn(sum(ranks), IN, generator=g),
        b=tuple(torch.randn(rank, out, generator=g) for rank, out in zip(ranks, outs, strict=True)),
        ranks=ranks,
        scales=tuple(0.5 + m for m in range(len(ranks))),
        c=torch.randn(sum(ranks), generator=g) if with_c else None,
    )


def formula(x: torch.Tensor, f: Factors) -> torch.Tensor:
    """Member by member, in float64."""
    parts, row = [], 0
    for rank, scale, b in zip(f.ranks, f.scales, f.b, strict=True):
        h = x.double() @ f.a[row : row + rank].double().T
        if f.c is not None:
            h = h + f.c[row : row + rank].double()
        parts.append(scale * h @ b.double())
        row += rank
    return torch.cat(parts, dim=1)


SHAPES = [((3,), (IN,)), ((2, 0, 4), (6, 7, 8))]


@pytest.mark.parametrize("in_place", [False, True])
@pytest.mark.parametrize("with_c", [False, True])
@pytest.mark.parametrize(("ranks", "outs"), SHAPES)
def test_equal_segments(ranks: tuple[int, ...], outs: tuple[int, ...], with_c: bool, in_place: bool) -> None:
    if in_place and sum(outs) != IN:
        pytest.skip("y is not as wide as x")
    factors = [make(seed, ranks, outs, with_c) for seed in range(4)]
    x = torch.randn(4 * ROWS, IN)
    y = x.clone() if in_place else torch.randn(4 * ROWS, sum(outs))
    want = y + torch.cat([formula(part, f) for part, f in zip(x.split(ROWS), factors, strict=True)]).float()
    add_equal_segments(y, y if in_place else x, factors)
    torch.testing.assert_close(y, want, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("in_place", [False, True])
@pytest.mark.parametrize(("ranks", "outs"), SHAPES)
def test_single_segments_with_and_without_c(ranks: tuple[int, ...], outs: tuple[int, ...], in_place: bool) -> None:
    if in_place and sum(outs) != IN:
        pytest.skip("y is not as wide as x")
    other = tuple(rank and rank + 1 for rank in ranks)
    factors = [make(0, ranks, outs, True), None, make(1, other, outs, False), make(2, ranks, outs, True)]
    owner = torch.tensor([0, 2, -1, 3, 1, 2, 0])
    x = torch.randn(len(owner), IN)
    start = x.clone() if in_place else torch.randn(len(owner), sum(outs))
    want = start.clone()
    for row, i in enumerate(owner.tolist()):
        if i >= 0 and factors[i] is not None:
            want[row] += formula(x[row : row + 1], factors[i])[0].float()
    y = start.clone()
    for row, i in enumerate(owner.tolist()):
        if i >= 0 and factors[i] is not None:
            add_segment(y[row : row + 1], (y if in_place else x)[row : row + 1], factors[i])
    torch.testing.assert_close(y, want, atol=1e-4, rtol=1e-4)
