"""The adapter side of one step: which rows belong to which slot, applied at every site."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import numpy as np
import torch

from multigraft.adapters.bank import Bank
from multigraft.adapters.site import Site, SiteKind
from multigraft.kernels.packed import WIDE_ROWS, Factors, Ownership, RankPack, add_equal_segments, add_segment
from multigraft.kernels.tiles import DECODE_ROWS, PREFILL_ROWS, UNUSED, build_tiles, choose_block_m
from multigraft.kernels.train import embedding_forward
from multigraft.kvcache.transfer import upload
from multigraft.models.train_rows import TrainContext

if TYPE_CHECKING:
    from multigraft.kernels.lora_triton import Work

NO_SLOT = -1


class Slots(Protocol):
    """What the grafts need of the adapter bank."""

    def factors(self, site: int, slot: int) -> Factors | None:
        """The slot's factors at a site, None when its adapter does not act there."""
        ...

    def generation(self, slot: int) -> int:
        """Grows whenever another adapter is put into the slot."""
        ...


class _Rows:
    """Rows of one token axis, cut into wide segments and the narrow rest.

    row_slot: (rows,) device slot of each row, NO_SLOT where nothing acts.
    """

    def __init__(self, row_slot: np.ndarray):
        self.segments = cut_segments(row_slot)
        self.wide = _equal_runs([s for s in self.segments if s[1] - s[0] >= WIDE_ROWS])
        narrow = [np.arange(a, b) for a, b, _ in self.segments if b - a < WIDE_ROWS]
        rows = np.concatenate(narrow) if narrow else np.empty(0, dtype=np.int64)
        self.narrow_slot = row_slot[rows]
        contiguous = len(rows) and rows[-1] - rows[0] + 1 == len(rows)
        self.narrow: slice | torch.Tensor = (
            slice(int(rows[0]), int(rows[-1]) + 1) if contiguous else torch.from_numpy(rows)
        )
        self.slots = sorted(set(self.narrow_slot.tolist()))
        self.ownership: dict[int, Ownership] = {}


class CpuGrafts:
    """Applies the bank's adapters on the CPU; implements models.graft.Grafts.

    Decode keeps the same adapters for many steps, so the packs of the last step are kept, and serve while the
    adapters in use are among them and make up at least half of them.
    """

    def __init__(self, sites: Sequence[Site], slots: Slots, head: str | None):
        """head: module path of the output head, which sees the sampled rows only."""
        self.sites = list(sites)
        self.slots = slots
        self.head_sites = {s.index for s in sites if head in s.members}
        self.train = TrainContext(sites)
        self.active = False
        self._rows: _Rows | None = None
        self._head_rows: _Rows | None = None
        self._packed: list[int] = []
        self._generations: dict[int, int] = {}
        self._packs: dict[int, RankPack | None] = {}

    def begin(self, row_slot: np.ndarray, head_rows: np.ndarray) -> None:
        """row_slot: (T,) device slot of each row, NO_SLOT for none; head_rows: rows that reach the output head."""
        self.active = bool((row_slot != NO_SLOT).any())
        if not self.active:
            return
        self._rows = _Rows(row_slot)
        self._head_rows = _Rows(row_slot[head_rows])
        used = set(self._rows.slots)
        for slot in self._head_rows.slots:  # a wide segment of the step is a single row at the head
            if any(self.slots.factors(head, slot) for head in self.head_sites):
                used.add(slot)
        current = {slot: self.slots.generation(slot) for slot in used}
        if any(self._generations.get(s) != g for s, g in current.items()) or len(self._packed) > 2 * len(used):
            self._packed, self._generations, self._packs = sorted(used), current, {}

    def add(self, site: int, y: torch.Tensor, x: torch.Tensor) -> None:
        rows = self._head_rows if site in self.head_sites else self._rows
        assert rows is not None
        where = self.sites[site]
        if where.kind is SiteKind.EMBEDDING:
            add_embedding(self.slots, site, y, x, rows.segments)
            return
        for run in rows.wide:
            self._add_wide(site, y, x, run)
        if not rows.slots:
            return
        pack = self._pack(site)
        if pack is None:
            return
        own = self._ownership(rows, pack, y.dtype)
        if isinstance(rows.narrow, slice):
            pack.add(y[rows.narrow], x[rows.narrow], own, where.out_features)
        else:
            part = y[rows.narrow]
            pack.add(part, x[rows.narrow], own, where.out_features)
            y[rows.narrow] = part

    def _add_wide(self, site: int, y: torch.Tensor, x: torch.Tensor, run: list[tuple[int, int, int]]) -> None:
        """Adjacent segments of equal length: together where their adapters have equal ranks and scales."""
        found = [self.slots.factors(site, slot) for _, _, slot in run]
        alike = {(f.ranks, f.scales, f.c is None) if f else None for f in found}
        if len(run) > 1 and len(alike) == 1 and None not in alike:
            start, stop = run[0][0], run[-1][1]
            add_equal_segments(y[start:stop], x[start:stop], [f for f in found if f])
            return
        for (start, stop, _), factors in zip(run, found, strict=True):
            if factors is not None:
                add_segment(y[start:stop], x[start:stop], factors)

    def _pack(self, site: int) -> RankPack | None:
        if site not in self._packs:
            factors = [self.slots.factors(site, slot) for slot in self._packed]
            self._packs[site] = RankPack.build(factors, len(self.sites[site].members))
        return self._packs[site]

    def _ownership(self, rows: _Rows, pack: RankPack, dtype: torch.dtype) -> Ownership:
        own = rows.ownership.get(pack.pattern_hash)
        if own is None:
            # A slot not packed as it is now has no factors at the head, the only site whose rows may bring such a one.
            current = (self._generations[slot] == self.slots.generation(slot) for slot in self._packed)
            position = {slot: i for i, (slot, ok) in enumerate(zip(self._packed, current, strict=True)) if ok}
            row_adapter = torch.tensor([position.get(s, NO_SLOT) for s in rows.narrow_slot.tolist()])
            own = rows.ownership[pack.pattern_hash] = pack.ownership(row_adapter, dtype)
        return own


class CudaGrafts:
    """Applies the bank's adapters with the segmented kernels; implements models.graft.Grafts.

    The tile tables of a step are built on the host and copied once; the kernels read them on the device.
    """

    def __init__(self, sites: Sequence[Site], bank: Bank, head: str | None, max_rank: int):
        """head: module path of the output head, which sees the sampled rows only. max_rank: of any adapter."""
        from multigraft.kernels import lora_triton  # here, as machines without a GPU may have no Triton

        self.sites = list(sites)
        self.bank = bank
        self.head_sites = {s.index for s in sites if head in s.members}
        self.max_rank = max_rank
        self.train = TrainContext(sites)
        self.active = False
        self._body: _Tiles | None = None
        self._head: _Tiles | None = None
        self._fixed: frozenset[SiteKind] | None = None
        self._kinds: dict[int, tuple[int, frozenset[SiteKind] | None]] = {}
        self._kernels = lora_triton

    def kinds(self, slots: Iterable[int]) -> frozenset[SiteKind] | None:
        """The kinds of sites, inside the decoder layers, where the slots' adapters act; None when one of them acts
        outside, on the embedding or the output head."""
        found: frozenset[SiteKind] = frozenset()
        for slot in slots:
            generation, kinds = self._kinds.get(slot, (-1, None))
            if generation != self.bank.generation(slot):
                where = self.bank.sites_of(slot)
                outside = any(i in self.head_sites or self.sites[i].kind is SiteKind.EMBEDDING for i in where)
                kinds = None if outside else frozenset(self.sites[i].kind for i in where)
                self._kinds[slot] = self.bank.generation(slot), kinds
            if kinds is None:
                return None
            found |= kinds
        return found

    def warm_up(self) -> None:
        """Compile the kernels of the decoder layers for either tile size, so that no request waits for it."""
        bank = self.bank
        tiles = torch.tensor([[0, 0, UNUSED]], dtype=torch.int32, device=bank.device)
        body = [s for s in self.sites if s.kind is not SiteKind.EMBEDDING and s.index not in self.head_sites]
        for site in {(s.in_features, s.out_features): s for s in body}.values():
            x = bank.arena.new_zeros(2, site.in_features)
            y = bank.arena.new_zeros(2, sum(site.out_features))
            for block_m in (DECODE_ROWS, PREFILL_ROWS):
                work = self._work(site, _Tiles(tiles, block_m, []))
                self._kernels.forward(y, x, bank.arena, work, site.out_features)

    def begin_fixed(self, tiles: torch.Tensor, block_m: int, kinds: frozenset[SiteKind]) -> None:
        """Prepare the capture of a step whose kernels read `tiles` (n, 3) on the device.

        Every site of these kinds in the decoder layers gets its kernels, whatever acts there now, and no other site.
        """
        self.active = bool(kinds)
        self._body, self._head = _Tiles(tiles, block_m, []), None
        self._fixed = kinds

    def begin(self, row_slot: np.ndarray, head_rows: np.ndarray) -> None:
        """row_slot: (T,) device slot of each row, NO_SLOT for none; head_rows: rows that reach the output head."""
        self.active = bool((row_slot != NO_SLOT).any())
        self._fixed = None
        if self.active:
            self._body = _Tiles.of(row_slot, self.bank.device)
            self._head = _Tiles.of(row_slot[head_rows], self.bank.device)

    def add(self, site: int, y: torch.Tensor, x: torch.Tensor) -> None:
        tiles, where = self._tiles(site), self.sites[site]
        if tiles is None:
            return
        if where.kind is SiteKind.EMBEDDING:
            add_embedding(self.bank, site, y, x, tiles.segments)
        else:
            self._kernels.forward(y, x, self.bank.arena, self._work(where, tiles), where.out_features)

    def _tiles(self, site: int) -> _Tiles | None:
        """Those of the rows that reach the site; None when no adapter acts on them there."""
        acts = self.bank.entries(site) if self._fixed is None else self.sites[site].kind in self._fixed
        return (self._head if site in self.head_sites else self._body) if acts else None

    def _work(self, site: Site, tiles: _Tiles) -> Work:
        bank, members = self.bank, len(site.members)
        table, scales = bank.table[site.index, :, :members], bank.scales[site.index, :, :members]
        return self._kernels.Work(table, scales, tiles.table, tiles.block_m, self.max_rank)


@dataclass(frozen=True, slots=True)
class _Tiles:
    table: torch.Tensor
    block_m: int
    segments: list[tuple[int, int, int]]
    """What the table was cut from, as of cut_segments."""

    @classmethod
    def of(cls, row_slot: np.ndarray, device: torch.device) -> _Tiles | None:
        """None when no row has a slot."""
        segments = cut_segments(row_slot)
        if not segments:
            return None
        bounds = torch.tensor([s[:2] for s in segments], dtype=torch.int32).view(-1, 2)
        slots = torch.tensor([s[2] for s in segments], dtype=torch.int32)
        block_m = choose_block_m(int((row_slot != NO_SLOT).sum()), len(segments))
        table = upload(build_tiles(bounds, slots, block_m), device)
        return cls(table, block_m, segments)


def cut_segments(row_slot: np.ndarray) -> list[tuple[int, int, int]]:
    """(first row, last row + 1, slot) of each run of rows with the same slot, runs of NO_SLOT left out."""
    cuts = np.flatnonzero(np.diff(row_slot)) + 1
    starts, stops = np.r_[0, cuts], np.r_[cuts, len(row_slot)]
    runs = [(int(a), int(b), int(row_slot[a])) for a, b in zip(starts, stops, strict=True) if a < b]
    return [run for run in runs if run[2] != NO_SLOT]


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


def add_embedding(
    slots: Slots, site: int, y: torch.Tensor, ids: torch.Tensor, segments: list[tuple[int, int, int]]
) -> None:
    """Embedding LoRA: y += s * A[:, id]ᵀ B; a row costs one column of A, so segments go one by one."""
    for start, stop, slot in segments:
        f = slots.factors(site, slot)
        if f is not None:
            embedding_forward(y[start:stop], ids[start:stop], f)
