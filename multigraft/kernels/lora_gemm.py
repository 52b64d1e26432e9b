"""The segmented adapter operation for many rows an adapter: torch's GEMMs, segment by segment (on the CPU, and of
training rows on every device) or several equal ones as a batch (on the CPU).

y += s · Bᵀ(A x + c), where LoRA has c = 0, and ReFT s = 1, y = x and the A of adapters.reft. y and x may be the same
tensor.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F


def is_wide(rows: int, rank: int) -> bool:
    """Whether a segment's own GEMMs beat lora_numba. At rank 8 they do so from about 64 rows on, at rank 32 from 16;
    ranks below 8 cost as much as 8."""
    return rows * max(rank, 8) >= 512


@dataclass(frozen=True, slots=True)
class Factors:
    """One adapter's factors at one site, scale not applied. Source of the layout: adapters.site.SiteBlock."""

    a: torch.Tensor
    """(sum(ranks), in), the members' A factors stacked."""
    b: tuple[torch.Tensor, ...]
    """Per member (rank, out), B transposed."""
    ranks: tuple[int, ...]
    scales: tuple[float, ...]
    c: torch.Tensor | None = None
    """(sum(ranks),) added to A x; None is zero."""

    def by_rank(self, h: torch.Tensor) -> Sequence[torch.Tensor]:
        """Each member's columns of A x. (One call: a slice takes the host nearly as long as a launch.)"""
        return (h,) if len(self.ranks) == 1 else h.split(self.ranks, 1)

    def by_output(self, y: torch.Tensor) -> Sequence[torch.Tensor]:
        """Each member's columns of y, which may have more: a rank's part of a vocabulary is padded."""
        widths = [b.shape[1] for b in self.b]
        if y.shape[1] != sum(widths):
            y = y[:, : sum(widths)]
        return (y,) if len(widths) == 1 else y.split(widths, 1)


def add_segment(y: torch.Tensor, x: torch.Tensor, f: Factors, mask: torch.Tensor | None = None) -> torch.Tensor:
    """y (rows, sum(out)) += the adapter's output for x (rows, in), in place; y may be x.

    mask: (rows, 1) of 0 and 1; None: the adapter acts on every row. Returns h (rows, sum(ranks)), which
    kernels.train.backward wants.
    """
    h = F.linear(x, f.a, f.c)
    if mask is not None:
        h *= mask
    for h_m, y_m, b, scale in zip(f.by_rank(h), f.by_output(y), f.b, f.scales, strict=True):
        if len(b):
            y_m.addmm_(h_m, b, alpha=scale)
    return h


def add_equal_segments(y: torch.Tensor, x: torch.Tensor, factors: Sequence[Factors]) -> None:
    """`add_segment` for adjacent segments of equal length, as one.

    The adapters have equal ranks and scales, and all of them have a c or none has.
    y, x: (len(factors) * length, …). Sixteen segments of 128 rows at 576 → 576: 181 us in place of 1,040.
    """
    num, first = len(factors), factors[0]
    y, x = y.view(num, -1, y.shape[1]), x.view(num, -1, x.shape[1])
    h = torch.bmm(x, torch.stack([f.a for f in factors]).transpose(1, 2))
    if first.c is not None:
        h += torch.stack([f.c for f in factors if f.c is not None])[:, None]
    row = col = 0
    for m, (rank, scale, b) in enumerate(zip(first.ranks, first.scales, first.b, strict=True)):
        if rank:
            part = y[:, :, col : col + b.shape[1]]
            part.baddbmm_(h[:, :, row : row + rank], torch.stack([f.b[m] for f in factors]), alpha=scale)
        row += rank
        col += b.shape[1]
