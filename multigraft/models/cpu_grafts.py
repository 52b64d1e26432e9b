"""The adapter side of one step on the CPU: GEMMs for segments of many rows, the Numba kernels for the rest."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from multigraft.adapters.bank import Bank
from multigraft.adapters.site import Site, SiteKind
from multigraft.kernels.lora_gemm import add_equal_segments, add_segment, is_wide
from multigraft.kernels.lora_numba import SiteAdapters, Tiles
from multigraft.kernels.lora_reference import swiglu
from multigraft.models.parallel import Group
from multigraft.models.s_lora import exchange, exchanges
from multigraft.models.segments import NO_SLOT, add_embedding, cut_segments
from multigraft.models.train_rows import TrainContext


class _Rows:
    """Rows of one token axis, cut into wide segments, for GEMMs, and tiles of the narrow ones, for the kernels.

    row_slot: (rows,) device slot of each row, NO_SLOT where nothing acts.
    """

    def __init__(self, row_slot: np.ndarray, bank: Bank):
        self.segments = cut_segments(row_slot)
        wide = [s for s in self.segments if is_wide(s[1] - s[0], bank.max_rank(s[2]))]
        self.wide = _equal_runs(wide)
        narrow_slot = row_slot.copy()
        for start, stop, _ in wide:
            narrow_slot[start:stop] = NO_SLOT
        slots = set(narrow_slot.tolist()) - {NO_SLOT}
        self.tiles = Tiles(narrow_slot, max(map(bank.max_rank, slots))) if slots else None


class CpuGrafts:
    """Applies the bank's adapters on the CPU; implements models.graft.Grafts."""

    def __init__(self, sites: Sequence[Site], bank: Bank, head: str | None):
        """head: module path of the output head, which sees the sampled rows only."""
        self.sites = list(sites)
        self.bank = bank
        self.head_sites = {s.index for s in sites if head in s.members}
        self.train = TrainContext(sites)
        self.active = False
        self.few = False
        self._site_adapters = [
            SiteAdapters(
                bank.arena,
                bank.table[s.index, :, : len(s.members)],
                bank.scales[s.index, :, : len(s.members)],
                s.in_features,
                s.out_features,
            )
            for s in sites
        ]
        self._body: _Rows | None = None
        self._head: _Rows | None = None

    def begin(self, row_slot: np.ndarray, head_rows: np.ndarray) -> None:
        """row_slot: (T,) device slot of each row, NO_SLOT for none; head_rows: rows that reach the output head."""
        self.active = bool((row_slot != NO_SLOT).any())
        if self.active:
            self._body = _Rows(row_slot, self.bank)
            self._head = _Rows(row_slot[head_rows], self.bank)

    def add(self, site: int, y: torch.Tensor, x: torch.Tensor) -> None:
        rows = self._head if site in self.head_sites else self._body
        assert rows is not None
        if not self.bank.entries(site):
            return
        where = self.sites[site]
        if where.kind is SiteKind.EMBEDDING:
            add_embedding(self.bank, site, y, x, rows.segments)
            return
        for run in rows.wide:
            self._add_wide(site, y, x, run)
        if rows.tiles is not None:
            self._site_adapters[site].add(y, x, rows.tiles)

    def linear(self, site: int, x: torch.Tensor) -> torch.Tensor:
        y = self.train.linears[site].base(x)
        self.add(site, y, x)
        return y

    def gated(self, site: int, x: torch.Tensor) -> torch.Tensor:
        return swiglu(self.linear(site, x))

    def _add_wide(self, site: int, y: torch.Tensor, x: torch.Tensor, run: list[tuple[int, int, int]]) -> None:
        """Adjacent segments of equal length: together where their adapters have equal ranks and scales."""
        found = [self.bank.factors(site, slot) for _, _, slot in run]
        alike = {(f.ranks, f.scales, f.c is None) if f else None for f in found}
        if len(run) > 1 and len(alike) == 1 and None not in alike:
            start, stop = run[0][0], run[-1][1]
            add_equal_segments(y[start:stop], x[start:stop], [f for f in found if f])
            return
        for (start, stop, _), factors in zip(run, found, strict=True):
            if factors is not None:
                add_segment(y[start:stop], x[start:stop], factors)


class SLoraCpuGrafts(CpuGrafts):
    """Segment by segment: for tests, and no fast path."""

    def __init__(self, group: Group, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.group = group

    def add(self, site: int, y: torch.Tensor, x: torch.Tensor) -> None:
        where = self.sites[site]
        if not exchanges(where):
            super().add(site, y, x)
            return
        assert self._body is not None
        found = [(slice(a, b), self.bank.factors(site, slot)) for a, b, slot in self._body.segments]
        adapted = [(rows, f) for rows, f in found if f is not None]
        h = x.new_zeros(len(x), len(where.members) * where.shard.exchange.width // where.gathered)
        for rows, f in adapted:
            h[rows, : len(f.a)] = x[rows] @ f.a.T
        h = exchange(self.group, where, h)
        for rows, f in adapted:
            row = col = 0
            for out, b, scale, (first, stop) in zip(where.out_features, f.b, f.scales, where.b_features, strict=True):
                if len(b):
                    y[rows, col + first : col + stop].addmm_(h[rows, row : row + len(b)], b, alpha=scale)
                row += len(b)
                col += out


def _equal_runs(segments: list[tuple[int, int, int]]) -> list[list[tuple[int, int, int]]]:
    """Adjacent segments of one length together."""
    runs: list[list[tuple[int, int, int]]] = []
    for segment in segments:
        last = runs[-1][-1] if runs else None
        if last and last[1] == segment[0] and last[1] - last[0] == segment[1] - segment[0]:
            runs[-1].append(segment)
        else:
            runs.append([segment])
    return runs
