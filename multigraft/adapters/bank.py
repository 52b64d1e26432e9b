"""Adapters on the device: slots over one arena, each adapter one contiguous extent of exactly its own size."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch

from multigraft.core.errors import CapacityExceeded
from multigraft.kernels.lora import NO_OFFSET
from multigraft.kernels.packed import Factors

from .plan import ALIGN
from .site import PackedAdapter, Site, SiteBlock

LAYOUTS = 64
"""Layouts of adapters that are remembered: working one out takes longer than all else on the host's side of a load."""
COMPACTION_CHUNK = 2**24
"""Elements moved at a time when extents are pushed together: bounds the temporary copy to 32 MiB in bf16."""


def factors_at(arena: torch.Tensor, block: SiteBlock, site: Site, start: int = 0) -> Factors:
    """Views of the factors that lie in `arena` where `block` says, for an adapter that begins at `start`."""

    def matrix(offset: int, rows: int, cols: int) -> torch.Tensor:
        offset += start
        return arena[offset : offset + rows * cols].view(rows, cols)

    parts = zip(block.b, block.ranks, site.out_features, strict=True)
    return Factors(
        a=matrix(block.a, sum(block.ranks), site.in_features),
        b=tuple(matrix(offset, rank, out) for offset, rank, out in parts),
        ranks=block.ranks,
        scales=block.scales,
        c=None if block.c is None else matrix(block.c, 1, sum(block.ranks))[0],
    )


@dataclass(frozen=True, slots=True)
class Load:
    """A copy to the device under way."""

    event: torch.cuda.Event | None = None
    """None on the CPU, where a load ends before it returns."""

    def ready(self) -> bool:
        """Whether kernels launched from now on see the adapter."""
        return self.event is None or self.event.query()

    def wait(self) -> None:
        """Block the calling thread until ready."""
        if self.event is not None:
            self.event.synchronize()


@dataclass(slots=True)
class _Tenant:
    start: int
    numel: int
    sites: dict[int, SiteBlock]
    """Offsets relative to `start`."""
    load: Load


@dataclass(frozen=True, slots=True)
class _Layout:
    """A slot's rows of `Bank.table` and `Bank.scales`, in host memory, for an extent at the arena's start."""

    rows: torch.Tensor
    is_offset: torch.Tensor
    """As rows: 1 where an entry moves with the extent."""
    scales: torch.Tensor


class Bank:
    """Device slots for adapters. Not thread-safe: the engine's thread alone uses it.

    On CUDA, unloading and compaction are queued on the current stream. Loads run on a stream of the bank's own, after
    the work that was queued when an extent was last freed or moved, and beside what was queued later: so kernels
    already launched see what they were launched with.

    arena: (capacity,) every extent.
    table: (sites, max_slots, max_members, 4) int64 on the device: (a offset, b offset, rank, c offset) of each member,
    in elements of the arena; zeros where the adapter does not act at the site. Offsets of a and c are the member's own,
    within what the site's members have stacked, so that member 0's is where the stack starts even if its rank is 0;
    c is NO_OFFSET where the adapter has none.
    scales: (sites, max_slots, max_members) float32 on the device.
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
        members = max(len(site.members) for site in sites)
        self.table = torch.zeros(len(sites), max_slots, members, 4, dtype=torch.int64, device=self.device)
        self.scales = torch.zeros(len(sites), max_slots, members, dtype=torch.float32, device=self.device)
        self.version = 0
        """Grows with every change of a slot or an offset."""
        self._tenants: dict[int, _Tenant] = {}
        self._generation = [0] * max_slots
        self._entries: list[dict[int, SiteBlock]] = [{} for _ in sites]
        self._factors: dict[int, dict[int, Factors | None]] = {}  # by slot, then site; views made at first use
        self._layout = lru_cache(LAYOUTS)(self._lay_out)  # adapters of one config share one
        self._stream = torch.cuda.Stream(self.device) if self.device.type == "cuda" else None
        self._freed = torch.cuda.Event() if self._stream is not None else None
        self._mark_freed()

    @property
    def capacity_bytes(self) -> int:
        return self.capacity * self.arena.element_size()

    @property
    def used_bytes(self) -> int:
        return sum(t.numel for t in self._tenants.values()) * self.arena.element_size()

    @property
    def slots(self) -> list[int]:
        """Slots that hold an adapter."""
        return sorted(self._tenants)

    def generation(self, slot: int) -> int:
        """Grows whenever another adapter is put into the slot."""
        return self._generation[slot]

    def load(self, slot: int, packed: PackedAdapter) -> Load:
        """Put an adapter into a slot, in place of its former tenant, which no later batch may use.

        CapacityExceeded when it does not fit beside the other tenants; then nothing changed. Bytes alone decide:
        fragmentation is compacted away.
        """
        assert 0 <= slot < self.max_slots, slot
        numel = packed.block.numel()
        assert packed.block.dtype == self.arena.dtype and numel % ALIGN == 0
        others = sum(t.numel for s, t in self._tenants.items() if s != slot)
        if others + numel > self.capacity:
            size = self.arena.element_size()
            raise CapacityExceeded(
                f"The adapter needs {packed.nbytes} bytes; {(self.capacity - others) * size} of the device's "
                f"{self.capacity_bytes} bytes for adapters are free (--adapter-memory-gib)."
            )
        if slot in self._tenants:
            self.unload(slot)
        start = self._first_fit(numel)
        if start is None:
            self._compact()
            start = others
        with self._own_stream():
            self.arena[start : start + numel].copy_(packed.block, non_blocking=True)
            tenant = _Tenant(start, numel, packed.sites, Load())
            self._place(slot, tenant)
            if self._stream is not None:
                event = torch.cuda.Event()
                event.record()
                tenant.load = Load(event)
        self._generation[slot] = self.version
        return tenant.load

    def unload(self, slot: int) -> None:
        """Empty a slot. Does nothing when it is empty."""
        tenant = self._tenants.pop(slot, None)
        if tenant is None:
            return
        if not tenant.load.ready():
            self._join_loads()
        self.table[:, slot].zero_()
        self.scales[:, slot].zero_()
        for index in tenant.sites:
            del self._entries[index][slot]
        del self._factors[slot]
        self._mark_freed()
        self.version += 1
        self._generation[slot] = self.version

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

    def _place(self, slot: int, tenant: _Tenant) -> None:
        """Record where a tenant lies, in the python tables and, on the current stream, in the device's."""
        for index, block in tenant.sites.items():
            self._entries[index][slot] = block
        rows, scales = self._rows(tenant)
        if self._stream is not None:
            rows, scales = rows.pin_memory(), scales.pin_memory()
        self.table[:, slot].copy_(rows, non_blocking=True)
        self.scales[:, slot].copy_(scales, non_blocking=True)
        self._tenants[slot] = tenant
        self._factors[slot] = {}
        self.version += 1

    def _rows(self, tenant: _Tenant | None) -> tuple[torch.Tensor, torch.Tensor]:
        """A slot's rows of `table` and `scales`, in host memory."""
        layout = self._layout(tuple(tenant.sites.items()) if tenant else ())
        return layout.rows + layout.is_offset * (tenant.start if tenant else 0), layout.scales.clone()

    def _lay_out(self, blocks: tuple[tuple[int, SiteBlock], ...]) -> _Layout:
        num_sites, _, members, width = self.table.shape
        rows = torch.zeros(num_sites, members, width, dtype=torch.int64)
        layout = _Layout(rows, torch.zeros_like(rows), torch.zeros(num_sites, members))
        for index, block in blocks:
            a, c = block.a, block.c
            for m, (rank, scale, b) in enumerate(zip(block.ranks, block.scales, block.b, strict=True)):
                rows[index, m] = torch.tensor((a, b, rank, NO_OFFSET if c is None else c))
                layout.is_offset[index, m] = torch.tensor((1, 1, 0, c is not None))
                layout.scales[index, m] = scale
                a += rank * self.sites[index].in_features
                c = None if c is None else c + rank
        return layout

    def _first_fit(self, numel: int) -> int | None:
        end = 0
        for tenant in sorted(self._tenants.values(), key=lambda t: t.start):
            if tenant.start - end >= numel:
                return end
            end = tenant.start + tenant.numel
        return end if self.capacity - end >= numel else None

    def _compact(self) -> None:
        """Push all extents to the arena's start, in order."""
        self._join_loads()
        end = 0
        for slot, tenant in sorted(self._tenants.items(), key=lambda item: item[1].start):
            if tenant.start != end:
                # Chunk by chunk, front to back, through a copy: source and target overlap.
                for done in range(0, tenant.numel, COMPACTION_CHUNK):
                    count = min(COMPACTION_CHUNK, tenant.numel - done)
                    source = self.arena[tenant.start + done : tenant.start + done + count]
                    self.arena[end + done : end + done + count].copy_(source.clone())
                tenant.start = end
                self._place(slot, tenant)
            end += tenant.numel
        self._mark_freed()

    def _own_stream(self) -> torch.cuda.StreamContext:
        """Work inside runs on the bank's stream, where free extents may be written. A no-op on the CPU."""
        if self._stream is not None and self._freed is not None:
            self._stream.wait_event(self._freed)
        return torch.cuda.stream(self._stream)

    def _mark_freed(self) -> None:
        """Extents were freed or moved by what is queued on the current stream."""
        if self._freed is not None:
            self._freed.record(torch.cuda.current_stream(self.device))

    def _join_loads(self) -> None:
        """Let the current stream wait for every load that has begun."""
        if self._stream is not None:
            torch.cuda.current_stream(self.device).wait_stream(self._stream)

    def check_integrity(self) -> None:
        """Assert that extents are disjoint and inside the arena, and that all tables agree."""
        for tenant in self._tenants.values():
            tenant.load.wait()
        end = 0
        for tenant in sorted(self._tenants.values(), key=lambda t: t.start):
            assert tenant.start >= end and tenant.start % ALIGN == 0, "extents overlap"
            end = tenant.start + tenant.numel
        assert end <= self.capacity, "an extent leaves the arena"
        assert set(self._factors) == set(self._tenants)
        table, scales = self.table.cpu(), self.scales.cpu()
        for slot in range(self.max_slots):
            tenant = self._tenants.get(slot)
            entries = {index: entries[slot] for index, entries in enumerate(self._entries) if slot in entries}
            assert entries == (tenant.sites if tenant else {}), f"slot {slot}: entries disagree"
            rows, row_scales = self._rows(tenant)
            assert torch.equal(table[:, slot], rows), f"slot {slot}: the device's table disagrees"
            assert torch.equal(scales[:, slot], row_scales), f"slot {slot}: the device's scales disagree"
