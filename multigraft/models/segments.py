"""The adapter side of one step: which rows belong to which slot, applied at every site."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch

from multigraft.adapters.bank import Bank
from multigraft.adapters.site import Site, SiteKind
from multigraft.core.batch import LOW_RANK
from multigraft.kernels.tiles import BASE, PREFILL_ROWS, UNUSED, build_tiles, choose_block_m, decode_rows, max_tiles
from multigraft.kernels.train import embedding_forward
from multigraft.kvcache.transfer import upload
from multigraft.models.rows import NO_SLOT
from multigraft.models.train_rows import TrainContext

if TYPE_CHECKING:
    from multigraft.kernels.lora_triton import Work


class StepKind(NamedTuple):
    """What the kernels of a step are chosen by, of the adapters in it."""

    sites: frozenset[SiteKind]
    """Kinds of those, inside the decoder layers, where adapters act."""
    max_rank: int
    """One of CudaGrafts.rank_bounds."""

    def holds(self, other: StepKind) -> bool:
        """Whether kernels chosen for this kind also serve steps of the other."""
        return other.sites <= self.sites and other.max_rank <= self.max_rank


class CudaGrafts:
    """Applies the bank's adapters with the segmented kernels; implements models.graft.Grafts.

    The tile tables of a step are built on the host and copied once; the kernels read them on the device.
    """

    def __init__(self, sites: Sequence[Site], bank: Bank, head: str | None, max_rank: int):
        """head: module path of the output head, which sees the sampled rows only. max_rank: of any adapter."""
        from multigraft.kernels import linear_triton, lora_triton  # here: machines without a GPU may have no Triton

        self.sites = list(sites)
        self.bank = bank
        self.head_sites = {s.index for s in sites if head in s.members}
        self.rank_bounds = (LOW_RANK, max_rank) if max_rank > LOW_RANK else (max_rank,)
        self.train = TrainContext(sites)
        self.active = False
        self.few = False
        self._body: _Tiles | None = None
        self._head: _Tiles | None = None
        self._fixed: frozenset[SiteKind] | None = None
        self._sites: dict[int, tuple[int, frozenset[SiteKind] | None]] = {}
        self._kernels, self._linear = lora_triton, linear_triton
        self._counters = linear_triton.new_counters(max(sum(s.out_features) for s in sites), bank.device)
        self._beside = torch.cuda.Stream(bank.device) if bank.device.type == "cuda" else None

    def kind(self, slots: Collection[int]) -> StepKind | None:
        """Of a step with the slots' adapters; None when one of them acts outside of the decoder layers, on the
        embedding or the output head."""
        found: frozenset[SiteKind] = frozenset()
        for slot in slots:
            generation, sites = self._sites.get(slot, (-1, None))
            if generation != self.bank.generation(slot):
                where = self.bank.sites_of(slot)
                outside = any(i in self.head_sites or self.sites[i].kind is SiteKind.EMBEDDING for i in where)
                sites = None if outside else frozenset(self.sites[i].kind for i in where)
                self._sites[slot] = self.bank.generation(slot), sites
            if sites is None:
                return None
            found |= sites
        return StepKind(found, self._bound(slots))

    def _bound(self, slots: Iterable[int]) -> int:
        """The least of rank_bounds for the slots' adapters. (Under tensor parallelism ranks may differ in it: a
        block-diagonal adapter whose blocks they cannot share evenly has more ranks on some.)"""
        most, bounds = max(map(self.bank.max_rank, slots), default=0), self.rank_bounds
        return bounds[0] if most <= bounds[0] else bounds[-1]

    def warm_up(self, rank: int = 0, num_ranks: int = 1) -> None:
        """Compile every kernel of the decoder layers, so that no request waits for it: steps that no graph covers take
        other ones than the graphs of some sizes. Side by side, as each keeps a core busy for seconds; and each of
        num_ranks begins with others, since it finds those that another one has compiled on the disk."""
        body = [s for s in self.sites if s.kind is not SiteKind.EMBEDDING and s.index not in self.head_sites]
        body.sort(key=lambda s: s.kind is SiteKind.LINEAR)  # those have more kernels than others of their shape
        groups: list[list[Callable[[], object]]] = []
        for site in {(s.in_features, s.out_features): s for s in body}.values():
            of_site: dict[object, list[Callable[[], object]]] = {}
            for key, call in self._calls(site):
                of_site.setdefault(key, []).append(call)
            groups += of_site.values()
        own = len(groups) * rank // num_ranks
        groups = groups[own:] + groups[:own]
        with ThreadPoolExecutor() as threads:
            tasks = [threads.submit(self._on_device, calls) for calls in groups]
        for task, calls in zip(tasks, groups, strict=True):
            if task.exception() is not None:  # Triton promises nothing of threads: by itself it may be right
                self._on_device(calls)

    def _on_device(self, calls: Iterable[Callable[[], object]]) -> None:
        device = self.bank.arena.device  # with its index, which each thread has to be told
        with torch.cuda.device(device) if device.type == "cuda" else nullcontext():
            for call in calls:
                call()

    def _calls(self, site: Site) -> Iterator[tuple[object, Callable[[], object]]]:
        """One of each kernel of the site, for no adapter. Those with the same key may take the same kernel: Triton 3.6
        lets a second thread have one that the first has not loaded yet."""
        bank, kernels, most = self.bank, self._kernels, self._linear.MAX_ROWS
        x = bank.arena.new_zeros(most, site.in_features)
        y = bank.arena.new_zeros(most, sum(site.out_features))
        unused = torch.tensor([[0, 0, UNUSED]], dtype=torch.int32, device=bank.device)

        def work(max_rank: int, block_m: int, num_tiles: int) -> Work:
            return self._work(site, _Tiles(unused.repeat(num_tiles, 1), block_m, max_rank, [], num_tiles))

        for max_rank in self.rank_bounds:
            few = decode_rows(max_rank)
            for block_m, num_tiles in ((few, 1), (few, kernels.MANY_TILES), (PREFILL_ROWS, 1)):
                w = work(max_rank, block_m, num_tiles)
                yield block_m, partial(kernels.forward, y, x, bank.arena, w, site.out_features)
                if site.is_gate:
                    h = kernels.unwritten(x, w)
                    yield ("gated", block_m), partial(kernels.gated, y, h, bank.arena, w, w.tiles)
            for rows in (4, most // 2, most) if site.kind is SiteKind.LINEAR else ():
                if self._linear.fits(rows, max_rank):
                    w = work(max_rank, few, max_tiles(rows, bank.max_slots, few))
                    key = "linear", rows > 4, rows > most // 2
                    yield key, partial(self._base_and_adapters, site, w, x[:rows])

    def begin_fixed(self, tiles: torch.Tensor, num_rows: int, block_m: int, kind: StepKind) -> None:
        """Prepare the capture of a step of `num_rows` rows whose kernels read `tiles` (n, 3) on the device.

        Every site of the kind's in the decoder layers gets its kernels, whatever acts there now, and no other site.
        The tiles are to be those of all rows (kernels.tiles.BASE).
        """
        self.active = bool(kind.sites)
        decodes = block_m != PREFILL_ROWS
        self.few = decodes and SiteKind.LINEAR in kind.sites and self._linear.fits(num_rows, kind.max_rank)
        self._body, self._head = _Tiles(tiles, block_m, kind.max_rank, [], len(tiles)), None
        self._fixed = kind.sites

    def begin(self, row_slot: np.ndarray, head_rows: np.ndarray) -> None:
        """row_slot: (T,) device slot of each row, NO_SLOT for none; head_rows: rows that reach the output head."""
        self.active = bool((row_slot != NO_SLOT).any())
        self.few = False
        self._fixed = None
        if self.active:
            self._body = _Tiles.of(row_slot, self._bound, self.bank.device)
            self._head = _Tiles.of(row_slot[head_rows], self._bound, self.bank.device)

    def linear(self, site: int, x: torch.Tensor) -> torch.Tensor:
        tiles, outs, base = self._tiles(site), self.sites[site].out_features, self.train.linears[site]
        if tiles is None:
            return base.base(x)
        work = self._work(self.sites[site], tiles)
        if self.few:
            return self._base_and_adapters(self.sites[site], work, x)
        y, h = self._base_and_shrink(site, work, x)
        self._kernels.expand(y, h, self.bank.arena, work, "b", outs)
        return y

    def _base_and_adapters(self, site: Site, work: Work, x: torch.Tensor) -> torch.Tensor:
        base = self.train.linears[site.index]
        return self._linear.linear(x, base.weight, base.bias, self.bank.arena, work, site.out_features, self._counters)

    def gated(self, site: int, x: torch.Tensor) -> torch.Tensor:
        assert self._body is not None
        work = self._work(self.sites[site], self._body)
        if self._tiles(site) is None:
            y, h = self.train.linears[site].base(x), self._kernels.unwritten(x, work)
        else:
            y, h = self._base_and_shrink(site, work, x)
        return self._kernels.gated(y, h, self.bank.arena, work, self._body.table)

    def _base_and_shrink(self, site: int, work: Work, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Side by side where rows are few; many keep the GPU's arithmetic busy in either."""
        beside = None if work.block_m == PREFILL_ROWS else self._beside
        return side_by_side(partial(self.train.linears[site].base, x), partial(self._shrink, work, x), beside)

    def _shrink(self, work: Work, x: torch.Tensor) -> torch.Tensor:
        return self._kernels.shrink(x, self.bank.arena, work, "a", [x.shape[1]])

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
        return self._kernels.Work(table, scales, tiles.table[: tiles.num_adapted], tiles.block_m, tiles.max_rank)


def side_by_side(
    base: Callable[[], torch.Tensor], adapters: Callable[[], torch.Tensor], beside: torch.cuda.Stream | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """What both return. In a captured step the GPU runs them at once, `adapters` on the stream `beside`: with few rows
    either one waits for memory.

    Elsewhere a second stream would cost more of the host's time than it spares of the GPU's.
    """
    if beside is None or not torch.cuda.is_current_stream_capturing():
        return base(), adapters()
    stream = torch.cuda.current_stream()
    beside.wait_stream(stream)
    y = base()
    with torch.cuda.stream(beside):
        h = adapters()  # allocated for that stream, which waits for all of its readers before it has the next one
    stream.wait_stream(beside)
    return y, h


@dataclass(frozen=True, slots=True)
class _Tiles:
    table: torch.Tensor
    """Of all rows; those without a slot come last."""
    block_m: int
    max_rank: int
    """Bound on the ranks of the slots' adapters."""
    segments: list[tuple[int, int, int]]
    """What the adapted rows' tiles were cut from, as of cut_segments."""
    num_adapted: int
    """The first so many tiles may have slots."""

    @classmethod
    def of(cls, row_slot: np.ndarray, bound: Callable[[Iterable[int]], int], device: torch.device) -> _Tiles | None:
        """None when no row has a slot. bound: of the ranks of slots' adapters."""
        segments = cut_segments(row_slot)
        if not segments:
            return None
        max_rank = bound({slot for _, _, slot in segments})
        block_m = choose_block_m(int((row_slot != NO_SLOT).sum()), len(segments), max_rank)
        every = cut_segments(np.where(row_slot == NO_SLOT, BASE, row_slot))
        bounds = torch.tensor([s[:2] for s in every], dtype=torch.int32)
        table = build_tiles(bounds, torch.tensor([s[2] for s in every]), block_m)
        return cls(upload(table, device), block_m, max_rank, segments, int((table[:, 2] != BASE).sum()))


def cut_segments(row_slot: np.ndarray) -> list[tuple[int, int, int]]:
    """(first row, last row + 1, slot) of each run of rows with the same slot, runs of NO_SLOT left out."""
    cuts = np.flatnonzero(np.diff(row_slot)) + 1
    starts, stops = np.r_[0, cuts], np.r_[cuts, len(row_slot)]
    runs = [(int(a), int(b), int(row_slot[a])) for a, b in zip(starts, stops, strict=True) if a < b]
    return [run for run in runs if run[2] != NO_SLOT]


def add_embedding(
    bank: Bank, site: int, y: torch.Tensor, ids: torch.Tensor, segments: list[tuple[int, int, int]]
) -> None:
    """Embedding LoRA: y += s * A[:, id]ᵀ B; a row costs one column of A, so segments go one by one."""
    for start, stop, slot in segments:
        f = bank.factors(site, slot)
        if f is not None:
            embedding_forward(y[start:stop], ids[start:stop], f)
