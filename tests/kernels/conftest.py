"""Cases for the segmented LoRA operation, with an oracle that shares no code and no layout with it.

test_*_triton.py run where Triton can: on a GPU, or in Triton's interpreter when TRITON_INTERPRET=1 was set
before Triton's first import. Elsewhere test_lora.py runs them in a process of its own, which leaves other tests alone.
"""

from __future__ import annotations

import os
from dataclasses import dataclass

import pytest
import torch

from multigraft.kernels.lora import ALIGN, NO_OFFSET
from multigraft.kernels.tiles import BASE, UNUSED, build_tiles, cut_tiles

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cpu" if INTERPRETED or not torch.cuda.is_available() else "cuda"

collect_ignore_glob = [] if INTERPRETED or DEVICE == "cuda" else ["test_*_triton.py"]

Factor = tuple[torch.Tensor, torch.Tensor, torch.Tensor, float]
"""A (rank, in), B (rank, out) and c (rank,) in float64, scale."""


@dataclass
class LoraCase:
    x: torch.Tensor
    y: torch.Tensor
    arena: torch.Tensor
    table: torch.Tensor
    scales: torch.Tensor
    segments: list[tuple[int, int, int]]
    """(first row, last row + 1, slot)"""
    out_features: list[int]
    factors: list[list[Factor | None]]
    """By slot and member; None where the rank is 0."""
    max_rank: int

    def tiles(self, block_m: int, spare: int = 3) -> torch.Tensor:
        rows = torch.tensor([s[:2] for s in self.segments]).view(-1, 2)
        slots = torch.tensor([s[2] for s in self.segments], dtype=torch.int64)
        used = len(build_tiles(rows, slots, block_m))
        return build_tiles(rows, slots, block_m, used + spare).to(self.x.device)

    def blocks(self):
        """(rows, member, columns of y, factor or None) of every segment and member."""
        for first, stop, slot in self.segments:
            col = 0
            for m, out in enumerate(self.out_features):
                yield slice(first, stop), m, slice(col, col + out), self.factors[slot][m]
                col += out

    def delta(self) -> torch.Tensor:
        """float64 (T, sum(out))."""
        delta = torch.zeros(self.y.shape, dtype=torch.float64)
        for rows, _, cols, factor in self.blocks():
            if factor is not None:
                a, b, c, scale = factor
                delta[rows, cols] = scale * ((self.x[rows].double().cpu() @ a.T + c) @ b)
        return delta

    def check_rows(self, actual: torch.Tensor, expected: torch.Tensor, tolerance: float) -> None:
        """Relative error below tolerance for every segment and member on its own, so that no block hides another."""
        actual, expected = actual.double().cpu(), expected.double().cpu()
        for rows, m, cols, _ in self.blocks():
            error = (actual[rows, cols] - expected[rows, cols]).norm()
            assert error <= tolerance * expected[rows, cols].norm(), (rows, m, float(error))

    def gap_rows(self) -> torch.Tensor:
        gap = torch.ones(len(self.x), dtype=torch.bool)
        for first, stop, _ in self.segments:
            gap[first:stop] = False
        return gap.to(self.x.device)


def make_case(
    ranks: list[list[int]],
    segments: list[tuple[int, int, int]],
    in_features: int,
    out_features: list[int],
    dtype: torch.dtype = torch.float32,
    num_rows: int | None = None,
    device: str = "cpu",
    with_c: bool = True,
) -> LoraCase:
    """Random values; whatever must not be read (rows of x in gaps, the arena between factors) is NaN or absurd.

    ranks: by slot and member. num_rows: default two rows past the last segment. with_c: slots 0, 2, … have a c.
    """
    num_rows = num_rows or max((stop for _, stop, _ in segments), default=0) + 2
    chunks, size, table, scales, factors = [], 0, [], [], []

    def put(values: torch.Tensor) -> int:
        nonlocal size
        padding = torch.full((-size % ALIGN,), torch.nan)
        chunks.extend([padding, values.flatten()])
        start = size + len(padding)
        size = start + values.numel()
        return start

    put(torch.full((5,), torch.nan))
    for slot, slot_ranks in enumerate(ranks):
        a_all = (torch.randn(sum(slot_ranks), in_features) / in_features**0.5).to(dtype).double()
        has_c = with_c and slot % 2 == 0
        c_all = torch.randn(len(a_all)).to(dtype).double() if has_c else torch.zeros(len(a_all)).double()
        a_start, entry, scale, row = put(a_all), [], [], []
        c_start = put(c_all) if has_c else NO_OFFSET
        for m, (a, c) in enumerate(zip(a_all.split(slot_ranks), c_all.split(slot_ranks), strict=True)):
            b = torch.randn(len(a), out_features[m]).to(dtype).double()
            entry.append([a_start, put(b), len(a), c_start if m == 0 else -(10**9)])
            scale.append(float(torch.rand(1) + 0.5))
            row.append((a, b, c, scale[-1]) if len(a) else None)
            a_start += a.numel()
        table.append(entry)
        scales.append(scale)
        factors.append(row)
    case = LoraCase(
        x=torch.randn(num_rows, in_features).to(dtype),
        y=torch.randn(num_rows, sum(out_features)).to(dtype),
        arena=torch.cat([*chunks, torch.full((9,), torch.nan)]).to(dtype),
        table=torch.tensor([[*entry, [-(10**9)] * 4] for entry in table]),
        scales=torch.tensor([[*row, torch.nan] for row in scales]),
        segments=segments,
        out_features=out_features,
        factors=factors,
        max_rank=max(max(r) for r in ranks),
    )
    case.x[case.gap_rows().cpu()] = torch.nan
    for name in ("x", "y", "arena", "table", "scales"):
        setattr(case, name, getattr(case, name).to(device))
    case.table, case.scales = case.table[:, :-1], case.scales[:, :-1]
    return case


def tiles_of_all_rows(case: LoraCase, block_m: int, spare: int = 0) -> torch.Tensor:
    """Those of the segments, and of the slot BASE for the other rows; then unused ones."""
    row_slot = torch.full((len(case.x),), BASE)
    for first, stop, slot in case.segments:
        row_slot[first:stop] = slot
    cut = torch.from_numpy(cut_tiles(row_slot.numpy(), block_m))
    return torch.cat([cut, torch.tensor([[0, 0, UNUSED]] * spare, dtype=cut.dtype).view(-1, 3)]).to(case.x.device)


@pytest.fixture
def lora_case():
    torch.manual_seed(0)
    return make_case


@pytest.fixture
def device():
    """Where the Triton kernels run."""
    return DEVICE


MIXED_RANKS = [[3, 16, 33], [0, 0, 0], [64, 1, 8], [8, 0, 5], [5, 5, 5]]
"""Slot 1 has an adapter that leaves this site alone; slot 4 is nobody's."""
MIXED_SEGMENTS = [(1, 2, 0), (2, 2, 2), (4, 13, 2), (13, 14, 3), (15, 19, 1), (19, 21, 3), (21, 28, 0)]


@pytest.fixture
def mixed_case(lora_case):
    """Three members, odd widths, mixed ranks, single rows, gaps, an empty segment, slots in two segments."""

    def make(dtype=torch.float32, in_features=600, device=DEVICE):
        return lora_case(MIXED_RANKS, MIXED_SEGMENTS, in_features, [530, 40, 17], dtype, device=device)

    return make


def _multiply_bf16_in_the_interpreter() -> None:
    """Triton's interpreter (3.9) keeps bf16 as uint16 and multiplies those; hand it float32 instead."""
    import triton.language as tl
    from triton.runtime import interpreter

    create_dot = interpreter.InterpreterBuilder.create_dot

    def widened(self, a, b, *args):
        a, b = (self.create_fp_ext(t, tl.float32) if t.dtype.scalar == tl.bfloat16 else t for t in (a, b))
        return create_dot(self, a, b, *args)

    interpreter.InterpreterBuilder.create_dot = widened


if INTERPRETED:
    _multiply_bf16_in_the_interpreter()
