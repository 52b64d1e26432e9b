"""The CPU path of the segmented adapter operation: few large GEMMs in place of many small ones.

Many adapters with a row or two each (decode) would cost one tiny GEMM an adapter: 27 ms a step for 16 adapters on
120 sites, all of it call overhead. Instead the active adapters' factors lie side by side in a `RankPack`, one GEMM
multiplies every row with every adapter's A, and a mask keeps what belongs to the row's own adapter:
2 to 4 ms a site kind. Ranks are exact; nothing is padded. Segments with many rows (prefill) take one GEMM each.

One operation serves all methods: y += s · Bᵀ(A x + c), where LoRA has c = 0, and ReFT s = 1, y = x and the A of
adapters.reft. y and x may be the same tensor.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F

WIDE_ROWS = 16
"""From this many rows on, a segment's own two GEMMs beat a share of the masked one."""


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

    def members(self) -> Iterator[tuple[slice, slice, float, torch.Tensor]]:
        """(its ranks' columns of A x, its columns of y, scale, Bᵀ) of each member that the adapter touches."""
        row = col = 0
        for rank, scale, b in zip(self.ranks, self.scales, self.b, strict=True):
            if rank:
                yield slice(row, row + rank), slice(col, col + b.shape[1]), scale, b
            row += rank
            col += b.shape[1]


def add_segment(y: torch.Tensor, x: torch.Tensor, f: Factors) -> None:
    """y (rows, sum(out)) += the adapter's output for x (rows, in), in place."""
    h = F.linear(x, f.a, f.c)
    for ranks, cols, scale, b in f.members():
        y[:, cols].addmm_(h[:, ranks], b, alpha=scale)


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


@dataclass(frozen=True, slots=True)
class Ownership:
    """Which of a pack's R columns belong to each row's adapter."""

    foreign: torch.Tensor
    """(rows, R) bool."""
    alpha: float
    """The scale when all columns share one, else 1."""
    scales: torch.Tensor | None
    """(R,) when they do not."""


@dataclass(slots=True)
class RankPack:
    """Several adapters' factors at one site, side by side; columns are ordered by member, then by adapter."""

    a: torch.Tensor
    """(R, in) with R the sum of every packed rank."""
    b: list[torch.Tensor | None]
    """Per member (R_m, out_m); None when no packed adapter touches the member."""
    c: torch.Tensor | None
    """(R,); None when no packed adapter has one."""
    pattern: tuple[tuple[tuple[int, ...], tuple[float, ...]], ...]
    """Ranks and scales of each packed adapter: sites with equal patterns share their mask."""
    pattern_hash: int = field(init=False)
    """Hashing the pattern at each of a step's 120 sites would cost more than the mask saves."""

    def __post_init__(self) -> None:
        self.pattern_hash = hash(self.pattern)

    @classmethod
    def build(cls, factors: Sequence[Factors | None], num_members: int) -> RankPack | None:
        """factors: one entry an adapter, None where it does not act at this site. None when none acts."""
        present = [f for f in factors if f is not None]
        if not present:
            return None
        a_parts: list[torch.Tensor] = []
        c_parts: list[torch.Tensor] = []
        b: list[torch.Tensor | None] = []
        for m in range(num_members):
            b_parts = []
            for f in present:
                if f.ranks[m]:
                    first = sum(f.ranks[:m])
                    a_parts.append(f.a[first : first + f.ranks[m]])
                    c_parts.append(f.a.new_zeros(f.ranks[m]) if f.c is None else f.c[first : first + f.ranks[m]])
                    b_parts.append(f.b[m])
            b.append(torch.cat(b_parts) if b_parts else None)
        none = ((0,) * num_members, (0.0,) * num_members)
        pattern = tuple(none if f is None else (f.ranks, f.scales) for f in factors)
        c = torch.cat(c_parts) if any(f.c is not None for f in present) else None
        return cls(a=torch.cat(a_parts), b=b, c=c, pattern=pattern)

    def ownership(self, row_adapter: torch.Tensor, dtype: torch.dtype) -> Ownership:
        """row_adapter: (rows,), each row's position in the list the pack was built from."""
        owner, scale = [], []
        for m in range(len(self.b)):
            for i, (ranks, scales) in enumerate(self.pattern):
                owner += [i] * ranks[m]
                scale += [scales[m]] * ranks[m]
        uniform = len(set(scale)) == 1
        return Ownership(
            foreign=row_adapter[:, None] != torch.tensor(owner)[None],
            alpha=scale[0] if uniform else 1.0,
            scales=None if uniform else torch.tensor(scale, dtype=dtype),
        )

    def add(self, y: torch.Tensor, x: torch.Tensor, own: Ownership, out_features: Sequence[int]) -> None:
        """y (rows, sum(out_features)) += each row's own adapter's output for x (rows, in), in place."""
        # Filled, not multiplied: a foreign adapter's overflow on this row must not become inf * 0 = NaN.
        h = F.linear(x, self.a, self.c).masked_fill_(own.foreign, 0)
        if own.scales is not None:
            h.mul_(own.scales)
        row = col = 0
        for out, b in zip(out_features, self.b, strict=True):
            if b is not None:
                y[:, col : col + out].addmm_(h[:, row : row + b.shape[0]], b, alpha=own.alpha)
                row += b.shape[0]
            col += out
