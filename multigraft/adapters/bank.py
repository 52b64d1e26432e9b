"""Adapters on the device: slots over one arena, each adapter one contiguous extent of exactly its own size."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch

from multigraft.core.errors import CapacityExceeded
from multigraft.kernels.lora import NO_OFFSET
from multigraft.kernels.lora_gemm import Factors

from .extents import Extents
from .plan import ALIGN
from .site import PackedAdapter, Site, SiteBlock
from .transfer import Load, SideStream

LAYOUTS = 64
"""Layouts of adapters that are remembered: working one out takes longer than all else on the host's side of a load."""
ROW_ALIGN = 16
"""Triton compiles a kernel anew for strides, and for addresses in bytes, that 16 does not divide."""
COMPACTION_CHUNK = 2**24
"""Elements moved at a time when extents are pushed together: bounds the temporary copy to 32 MiB in bf16."""


def factors_at(arena: torch.Tensor, block: SiteBlock, site: Site, start: int = 0) -> Factors:
    """Views of the factors that lie in `arena` where `block` says, for an adapter that begins at `start`."""
    begin = arena.storage_offset() + start

    def matrix(offset: int, rows: int, cols: int) -> torch.Tensor:
        return arena.as_strided((rows, cols), (cols, 1), begin + offset)

    widths = (stop - first for first, stop in site.b_features)
    parts = zip(block.b, (rank * site.gathered for rank in block.ranks), widths, strict=True)
    return Factors(
        a=matrix(block.a, sum(block.ranks), site.in_features),
        b=tuple(matrix(offset, rank, out) for offset, rank, out in parts),
        ranks=block.ranks,
        scales=block.scales,
        c=None if block.c is None else matrix(block.c, 1, sum(block.ranks))[0],
    )


class _Use(NamedTuple):
    """Kernels that read adapters or moved them, by their end."""

    number: int
    """Grows with time."""
    end: torch.cuda.Event


@dataclass(slots=True)
class _Tenant:
    start: int
    numel: int
    sites: dict[int, SiteBlock]
    """Offsets relative to `start`."""
    used: _Use | None = None
    """What read it last; None: nobody has told."""


@dataclass(frozen=True, slots=True)
class _Layout:
    """What a slot's row of the bank is made from, in host memory."""

    sites: dict[int, SiteBlock]
    row: torch.Tensor
    """For an extent at the arena's start."""
    moves: torch.Tensor
    """As row: 1 where an entry moves with the extent."""
    max_rank: int


class Bank:
    """Device slots for adapters. Not thread-safe: the engine's thread alone uses it.

    On CUDA, compaction is queued on the current stream. A load is copied, with its row of the tables, on a stream of
    its own, after the last use of what was there before, and beside what was queued later: so kernels already launched
    see what they were launched with.

    arena: (capacity,) every extent.
    table: (sites, max_slots, max_members, 4) int64 on the device: (a offset, b offset, rank, c offset) of each member,
    in elements of the arena; zeros where the adapter does not act at the site. Offsets of a and c are the member's own,
    within what the site's members have stacked, so that member 0's is where the stack starts even if its rank is 0;
    c is NO_OFFSET where the adapter has none.
    b_table: `table` as B is multiplied: where ranks gather rows of A (Site.gathered), with the gathered rank.
    scales: (sites, max_slots, max_members) float32 on the device.
    The three are views of one matrix with a row for each slot, so that a load writes them with one copy. The row of an
    empty slot is its last tenant's.
    """

    def __init__(
        self,
        sites: Sequence[Site],
        *,
        max_slots: int,
        capacity_bytes: int,
        dtype: torch.dtype,
        device: torch.device | str = "cpu",
    ):
        assert all(site.index == i for i, site in enumerate(sites)), "sites must be ordered by index"
        self.sites = list(sites)
        self.max_slots = max_slots
        self.device = torch.device(device)
        self.capacity = capacity_bytes // dtype.itemsize // ALIGN * ALIGN
        self.arena = torch.zeros(self.capacity, dtype=dtype, device=self.device)
        self._is_gathered = any(site.gathered > 1 for site in sites)
        members = max(len(site.members) for site in sites)
        self._shape = (len(sites), members, 4)
        self._scales_width = -(-members // 4) * 4  # of a site: 16 bytes, as of ROW_ALIGN
        width = len(sites) * (4 * members * (1 + self._is_gathered) + self._scales_width // 2)
        self._rows = torch.zeros(max_slots, -(-width // ROW_ALIGN) * ROW_ALIGN, dtype=torch.int64, device=self.device)
        self.table, self.b_table, self.scales = (part.transpose(0, 1) for part in self._parts(self._rows))
        self.version = 0
        """Grows with every change of a slot or an offset."""
        self._tenants: dict[int, _Tenant] = {}
        self._generation = [0] * max_slots
        self._max_rank = [0] * max_slots
        self._extents = Extents(self.capacity)
        self._entries: list[dict[int, SiteBlock]] = [{} for _ in sites]
        self._factors: dict[int, dict[int, Factors | None]] = {}  # by slot, then site; views made at first use
        self._layouts: dict[int, _Layout] = {}  # by the identity of what adapters of one config share
        self._beside = SideStream(self.device) if self.device.type == "cuda" else None
        self._num_uses = 0
        self._freed = self._use()
        """The latest use of all extents that were freed or moved."""

    @property
    def capacity_bytes(self) -> int:
        return self.capacity * self.arena.element_size()

    @property
    def used_bytes(self) -> int:
        return (self.capacity - self._extents.free) * self.arena.element_size()

    @property
    def slots(self) -> list[int]:
        """Slots that hold an adapter."""
        return sorted(self._tenants)

    def generation(self, slot: int) -> int:
        """Grows whenever another adapter is put into the slot."""
        return self._generation[slot]

    def max_rank(self, slot: int) -> int:
        """The largest rank, at any module, of the adapter last put into the slot."""
        return self._max_rank[slot]

    def load(self, slot: int, packed: PackedAdapter) -> Load:
        """Put an adapter into a slot, in place of its former tenant, which no later batch may use.

        CapacityExceeded when it does not fit beside the other tenants; then nothing changed. Bytes alone decide:
        fragmentation is compacted away.
        """
        assert 0 <= slot < self.max_slots, slot
        numel = packed.block.numel()
        assert packed.block.dtype == self.arena.dtype and numel % ALIGN == 0
        room = self._extents.free + (self._tenants[slot].numel if slot in self._tenants else 0)
        if numel > room:
            size = self.arena.element_size()
            raise CapacityExceeded(
                f"The adapter needs {packed.nbytes} bytes; {room * size} of the device's "
                f"{self.capacity_bytes} bytes for adapters are free (--adapter-memory-gib)."
            )
        if slot in self._tenants:
            self.unload(slot)
        start = self._extents.take(numel)
        if start is None:
            self._compact()
            start = self._extents.take(numel)
            assert start is not None
        row = self._place(slot, _Tenant(start, numel, packed.sites))
        self._generation[slot] = self.version
        self._max_rank[slot] = self._layout(packed.sites).max_rank
        target = self.arena[start : start + numel]
        if self._beside is None:
            target.copy_(packed.block)
            self._rows[slot].copy_(row)
            return Load()
        pairs = [(target, packed.block), (self._rows[slot], row)]
        return Load(self._beside.copy(pairs, after=self._freed and self._freed.end), packed.block)

    def unload(self, slot: int) -> None:
        """Empty a slot. Does nothing when it is empty."""
        tenant = self._tenants.pop(slot, None)
        if tenant is None:
            return
        self._extents.give(tenant.start, tenant.numel)
        for index in tenant.sites:
            del self._entries[index][slot]
        del self._factors[slot]
        self._free(tenant.used or self._use())
        self.version += 1
        self._generation[slot] = self.version

    def used(self, slots: Iterable[int]) -> None:
        """What was just queued on the current stream reads these slots; what is queued later does not, unless they are
        named here again. Of a slot that was never named, everything is taken to read it."""
        if self._beside is not None:
            use = self._use()
            for slot in slots:
                self._tenants[slot].used = use

    def sites_of(self, slot: int) -> Collection[int]:
        """Where the slot's adapter acts; nowhere when the slot is empty."""
        tenant = self._tenants.get(slot)
        return tenant.sites if tenant else ()

    def entries(self, site: int) -> dict[int, SiteBlock]:
        """Slot -> where in its extent its factors for the site lie; without the slots that do not act there."""
        return self._entries[site]

    def factors(self, site: int, slot: int) -> Factors | None:
        """Views of the slot's factors at a site, valid until `version` changes; None when it does not act there."""
        cache = self._factors.get(slot)
        if cache is None:
            return None
        if site not in cache:
            cache[site] = self._view(site, slot)
        return cache[site]

    def _view(self, site: int, slot: int) -> Factors | None:
        block = self._entries[site].get(slot)
        if block is None:
            return None
        return factors_at(self.arena, block, self.sites[site], start=self._tenants[slot].start)

    def _place(self, slot: int, tenant: _Tenant) -> torch.Tensor:
        """Record where a tenant lies in the python tables; returns what the device's are to say."""
        for index, block in tenant.sites.items():
            self._entries[index][slot] = block
        self._tenants[slot] = tenant
        self._factors[slot] = {}
        self.version += 1
        row = torch.empty(self._rows.shape[1], dtype=torch.int64, pin_memory=self.device.type == "cuda")
        return self._row(tenant, out=row)

    def _row(self, tenant: _Tenant, out: torch.Tensor) -> torch.Tensor:
        """A tenant's row, in host memory."""
        layout = self._layout(tenant.sites)
        return torch.add(layout.row, layout.moves, alpha=tenant.start, out=out)

    def _parts(self, rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Views of (n, width) rows: table and b_table, which may be the same, and scales, slots first."""
        num_sites, members, _ = self._shape
        size, width = math.prod(self._shape), num_sites * self._scales_width
        tables = [rows[:, i * size : (i + 1) * size].unflatten(1, self._shape) for i in range(1 + self._is_gathered)]
        scales = rows.view(torch.float32)[:, 2 * size * len(tables) :][:, :width]
        return tables[0], tables[-1], scales.unflatten(1, (num_sites, -1))[..., :members]

    def _layout(self, sites: dict[int, SiteBlock]) -> _Layout:
        known = self._layouts.get(id(sites))
        if known is None:
            if len(self._layouts) == LAYOUTS:
                del self._layouts[next(iter(self._layouts))]
            # It keeps `sites` alive, so that no other has this id.
            known = self._layouts[id(sites)] = self._lay_out(sites)
        return known

    def _lay_out(self, sites: dict[int, SiteBlock]) -> _Layout:
        row, moves = torch.zeros(2, 1, self._rows.shape[1], dtype=torch.int64)
        table, b_table, scales = (part[0].numpy() for part in self._parts(row))
        moved, b_moved, _ = (part[0].numpy() for part in self._parts(moves))
        for index, block in sites.items():
            a, c = block.a, block.c
            entries = []
            for rank, b in zip(block.ranks, block.b, strict=True):
                entries.append((a, b, rank, NO_OFFSET if c is None else c))
                a += rank * self.sites[index].in_features
                c = None if c is None else c + rank
            members = len(entries)
            table[index, :members] = b_table[index, :members] = entries
            moved[index, :members] = b_moved[index, :members] = (1, 1, 0, c is not None)
            scales[index, :members] = block.scales
        if self._is_gathered:
            b_table[..., 2] *= np.array([site.gathered for site in self.sites])[:, None]
        max_rank = max((rank for block in sites.values() for rank in block.ranks), default=0)
        return _Layout(sites, row[0], moves[0], max_rank)

    def _compact(self) -> None:
        """Push all extents to the arena's start, in order."""
        if self._beside is not None:
            self._beside.join()
        end = 0
        for slot, tenant in sorted(self._tenants.items(), key=lambda item: item[1].start):
            if tenant.start != end:
                self._move(slot, tenant, end)
            end += tenant.numel
        self._extents = Extents(self.capacity)
        self._extents.take(end)
        self._free(self._use())

    def _move(self, slot: int, tenant: _Tenant, start: int) -> None:
        # Chunk by chunk, front to back, through a copy: source and target overlap.
        for done in range(0, tenant.numel, COMPACTION_CHUNK):
            count = min(COMPACTION_CHUNK, tenant.numel - done)
            source = self.arena[tenant.start + done : tenant.start + done + count]
            self.arena[start + done : start + done + count].copy_(source.clone())
        tenant.start = start
        self._rows[slot].copy_(self._place(slot, tenant), non_blocking=True)

    def _use(self) -> _Use | None:
        """All that is queued on the current stream; None on the CPU, which has done it."""
        if self._beside is None:
            return None
        self._num_uses += 1
        return _Use(self._num_uses, self._beside.now())

    def _free(self, use: _Use | None) -> None:
        """Extents are free as of the end of `use`."""
        if use is not None and (self._freed is None or use.number > self._freed.number):
            self._freed = use

    def check_integrity(self) -> None:
        """Assert that extents are disjoint and inside the arena, and that all tables agree."""
        taken = [(t.start, t.start + t.numel) for t in self._tenants.values() if t.numel]
        end = 0
        for start, stop in sorted(taken + self._extents.holes):
            assert start == end and start % ALIGN == 0, "extents and holes overlap, or leave a gap"
            end = stop
        assert end == self.capacity, "an extent leaves the arena"
        assert self._extents.free == self.capacity - sum(t.numel for t in self._tenants.values())
        assert set(self._factors) == set(self._tenants)
        if self._beside is not None:
            self._beside.join()
        rows = self._rows.cpu()
        for slot in range(self.max_slots):
            tenant = self._tenants.get(slot)
            entries = {index: entries[slot] for index, entries in enumerate(self._entries) if slot in entries}
            assert entries == (tenant.sites if tenant else {}), f"slot {slot}: entries disagree"
            if tenant is not None:
                row = self._row(tenant, out=torch.zeros_like(rows[slot]))
                assert torch.equal(rows[slot], row), f"slot {slot}: the device's table or scales disagree"
