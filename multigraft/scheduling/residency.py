"""Which adapters are on the device, and which may have to leave for others. No tensors, no clocks."""

from __future__ import annotations

import enum
from collections import OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import takewhile

from multigraft.core.batch import AdapterMove
from multigraft.core.errors import CapacityExceeded
from multigraft.core.request import AdapterRef


class AdapterState(enum.Enum):
    ABSENT = "absent"
    LOADING = "loading"
    READY = "ready"


@dataclass(slots=True, eq=False)
class _Tenant:
    """An adapter in a slot."""

    ref: AdapterRef
    slot: int
    state: AdapterState = AdapterState.LOADING
    pins: int = 0
    """Running requests that need it."""
    fresh: bool = True
    """No request has used it since its load."""


class Residency:
    """Adapters in `max_slots` device slots of `max_bytes` together.

    An adapter is absent, loading or ready. A ready one can leave when nothing pins it and nobody waits for it
    (`want`), least recently used first: an adapter prefetched for a waiting request stays until that has run.
    Missing adapters, wanted but absent, count how often others are pinned while they wait (`overdue`); make_way closes
    adapters to new pins so that a slot comes free for one that waited long enough.

    schedule() decides both the spans and the loads of a step, so no eviction can happen while a step is in flight.
    With asynchronous scheduling it could: then every batch must hold one more pin on each slot that its spans name,
    from schedule() to commit(); no other rule changes.
    """

    def __init__(self, max_slots: int, max_bytes: int):
        self.max_slots = max_slots
        self.max_bytes = max_bytes
        self.free_bytes = max_bytes
        self._free_slots = list(range(max_slots - 1, -1, -1))
        self._tenants: dict[int, _Tenant] = {}  # by uid, longest resident first
        self._idle: OrderedDict[int, _Tenant] = OrderedDict()  # ready to leave, least recently used first
        self._idle_bytes = 0
        self._leaving: dict[int, None] = {}  # closed to new pins
        self._wanted: dict[int, None] = {}
        self.missing: dict[int, int] = {}
        """Wanted and absent, longest first: uid to the number of pins made when it became so."""
        self._num_pins = 0

    @property
    def num_used(self) -> int:
        """Slots that hold an adapter or wait for its load."""
        return len(self._tenants)

    def check(self, ref: AdapterRef) -> None:
        """CapacityExceeded when the adapter could not even be alone on the device."""
        if self.max_slots == 0:
            raise CapacityExceeded(f"Adapter {ref.name!r} needs a device slot and there are none (--max-loras 0).")
        if ref.nbytes > self.max_bytes:
            raise CapacityExceeded(
                f"Adapter {ref.name!r} needs {ref.nbytes} bytes on the device, and all adapters together have "
                f"{self.max_bytes}: {ref.nbytes - self.max_bytes} too few (--adapter-memory-gib)."
            )

    def state(self, uid: int) -> AdapterState:
        tenant = self._tenants.get(uid)
        return AdapterState.ABSENT if tenant is None else tenant.state

    def fresh(self, uid: int) -> bool:
        """Whether the adapter is here and no request has used it since its load."""
        tenant = self._tenants.get(uid)
        return tenant is not None and tenant.fresh

    def open(self) -> list[int]:
        """Adapters that can be pinned, longest resident first."""
        return [uid for uid, t in self._tenants.items() if t.state is AdapterState.READY and uid not in self._leaving]

    def want(self, uid: int) -> None:
        """Requests wait for the adapter: it should come, and does not leave while idle."""
        self._wanted[uid] = None
        self._settle(uid)

    def unwant(self, uid: int) -> None:
        """No request waits for the adapter any more."""
        del self._wanted[uid]
        self._settle(uid)

    def overdue(self, max_bypass: int) -> list[int]:
        """Missing adapters that were passed over by at least max_bypass pins of others, longest missing first."""
        return list(takewhile(lambda uid: self._num_pins - self.missing[uid] >= max_bypass, self.missing))

    def any_overdue(self, max_bypass: int) -> bool:
        """Whether overdue has any: if so, the one that is missing longest."""
        since = next(iter(self.missing.values()), None)
        return since is not None and self._num_pins - since >= max_bypass

    def pin(self, uid: int) -> int:
        """Hold a ready adapter for a running request; returns its slot."""
        tenant = self._tenants[uid]
        assert tenant.state is AdapterState.READY and uid not in self._leaving
        self._num_pins += 1
        tenant.fresh = False
        tenant.pins += 1
        if tenant.pins == 1:
            self._settle(uid)
        return tenant.slot

    def unpin(self, uid: int) -> None:
        tenant = self._tenants[uid]
        assert tenant.pins > 0
        tenant.pins -= 1
        if tenant.pins == 0:
            self._settle(uid)

    def fits(self, nbytes: int) -> bool:
        """Whether a slot and the bytes are there, counting those of idle adapters."""
        return bool(self._free_slots or self._idle) and nbytes <= self.free_bytes + self._idle_bytes

    def load(self, ref: AdapterRef) -> AdapterMove:
        """Start loading an absent adapter that fits, evicting idle ones as its slot and bytes require."""
        assert ref.uid not in self._tenants and self.fits(ref.nbytes)
        empties = []
        while not self._free_slots or ref.nbytes > self.free_bytes:
            uid = next(iter(self._idle))
            empties.append(self._idle[uid].slot)
            self._remove(uid)
        slot = self._free_slots.pop()
        self.free_bytes -= ref.nbytes
        self._tenants[ref.uid] = _Tenant(ref, slot)
        self._settle(ref.uid)
        return AdapterMove(ref, slot, tuple(empties))

    def loaded(self, uid: int) -> None:
        tenant = self._tenants[uid]
        assert tenant.state is AdapterState.LOADING
        tenant.state = AdapterState.READY
        self._settle(uid)

    def failed(self, uid: int) -> None:
        """The load did not succeed: the adapter is absent again."""
        assert self._tenants[uid].state is AdapterState.LOADING
        self._remove(uid)

    def can_close(self) -> bool:
        """Whether make_way could be of use: adapters are in use, and none is about to leave."""
        return not self._leaving and any(t.pins for t in self._tenants.values())

    def make_way(self, nbytes: int, may_leave: Callable[[int], bool]) -> None:
        """Close ready adapters to new pins, longest resident first, until their leaving will make room for nbytes.

        Those that close leave when their last pin goes, wanted or not.
        """
        leaving = [self._tenants[uid] for uid in self._leaving if uid not in self._idle]
        room = self.free_bytes + self._idle_bytes + sum(t.ref.nbytes for t in leaving)
        slots = len(self._free_slots) + len(self._idle) + len(leaving)
        for uid in self.open():
            if slots and nbytes <= room:
                return
            if uid not in self._idle and may_leave(uid):
                self._leaving[uid] = None
                self._settle(uid)
                room += self._tenants[uid].ref.nbytes
                slots += 1

    def reopen(self) -> None:
        """Undo make_way for the adapters that are still here."""
        leaving, self._leaving = self._leaving, {}
        for uid in leaving:
            self._settle(uid)

    def check_integrity(self) -> None:
        tenants = self._tenants.values()
        assert sorted([*self._free_slots, *(t.slot for t in tenants)]) == list(range(self.max_slots))
        assert self.free_bytes == self.max_bytes - sum(t.ref.nbytes for t in tenants) >= 0
        assert self._idle_bytes == sum(t.ref.nbytes for t in self._idle.values())
        for uid, tenant in self._tenants.items():
            assert tenant.ref.uid == uid and tenant.pins >= 0
            assert (uid in self._idle) == self._can_leave(tenant)
            assert tenant.pins == 0 or tenant.state is AdapterState.READY
        assert all(self._tenants[uid] is tenant for uid, tenant in self._idle.items())
        assert all(uid in self._tenants for uid in self._leaving)
        assert self.missing.keys() == self._wanted.keys() - self._tenants.keys()
        assert list(self.missing.values()) == sorted(self.missing.values())

    def check_pins(self, pins: Mapping[int, int]) -> None:
        """Assert that each adapter is pinned as often as given by uid; others, not at all."""
        assert {uid: t.pins for uid, t in self._tenants.items() if t.pins} == pins

    def _can_leave(self, tenant: _Tenant) -> bool:
        ready = tenant.state is AdapterState.READY and tenant.pins == 0
        return ready and (tenant.ref.uid in self._leaving or tenant.ref.uid not in self._wanted)

    def _settle(self, uid: int) -> None:
        """Keep `missing` and the idle order true after a change of this adapter."""
        tenant = self._tenants.get(uid)
        if tenant is None:
            if uid in self._wanted:
                self.missing.setdefault(uid, self._num_pins)
            else:
                self.missing.pop(uid, None)
            return
        self.missing.pop(uid, None)
        if not self._can_leave(tenant):
            if self._idle.pop(uid, None) is not None:
                self._idle_bytes -= tenant.ref.nbytes
        elif uid not in self._idle:
            self._idle[uid] = tenant
            self._idle_bytes += tenant.ref.nbytes

    def _remove(self, uid: int) -> None:
        tenant = self._tenants.pop(uid)
        if self._idle.pop(uid, None) is not None:
            self._idle_bytes -= tenant.ref.nbytes
        self._leaving.pop(uid, None)
        self._free_slots.append(tenant.slot)
        self.free_bytes += tenant.ref.nbytes
        self._settle(uid)
