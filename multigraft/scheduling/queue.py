"""Requests that wait, and the share of service each tenant has had."""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Iterator
from dataclasses import dataclass, field

from multigraft.core.request import AdapterRef, Request

BASE = 0
"""Key of the lane of requests without adapter; AdapterRef.uid is never 0."""


@dataclass(slots=True, eq=False)
class Tenant:
    """An adapter name, in whatever version, or the base model (None)."""

    name: str | None
    service: int = 0
    """Tokens computed for it so far, weighted; lifted to the least active tenant's when it comes back."""
    running: int = 0
    waiting: int = 0
    since: int = 0
    """Step since which it has had nothing running."""


@dataclass(slots=True, eq=False)
class Lane:
    """The waiting requests of one adapter version that need it on the device, or those that do not: by priority, then
    in order of arrival."""

    ref: AdapterRef | None
    tenant: Tenant
    entries: list[tuple[int, int, Request]] = field(default_factory=list)

    @property
    def nbytes(self) -> int:
        return 0 if self.ref is None else self.ref.nbytes

    @property
    def head(self) -> Request:
        return self.entries[0][2]


class WaitingQueue:
    """Waiting requests in one lane per adapter version, so that lanes whose adapter is absent cost no look.

    Tenants are compared by virtual token counters (Sheng et al., Fairness in Serving Large Language Models, OSDI
    2024): whoever has received least comes first. A tenant that comes back is lifted to the least counter among the
    active ones, so idle time earns no credit.
    """

    def __init__(self) -> None:
        self.lanes: dict[int, Lane] = {}
        """Of requests that need their adapter on the device, by AdapterRef.uid. Never empty ones."""
        self.free: dict[int, Lane] = {}
        """Of requests that need none, by AdapterRef.uid or BASE: activated LoRAs not invoked, and the base model."""
        self.tenants: dict[str | None, Tenant] = {}
        self.num_waiting = 0

    def __len__(self) -> int:
        return self.num_waiting

    def tenant(self, request: Request) -> Tenant:
        """Of a request that has been pushed."""
        return self.tenants[_tenant_name(request)]

    def arrive(self, request: Request, step: int) -> None:
        """Push a new request."""
        name = _tenant_name(request)
        tenant = self.tenants.get(name)
        if tenant is None:
            tenant = self.tenants[name] = Tenant(name)
        if not tenant.running and not tenant.waiting:
            active = [t.service for t in self.tenants.values() if t.running or t.waiting]
            tenant.service = max(tenant.service, min(active, default=0))
            tenant.since = step
        self.push(request)

    def push(self, request: Request) -> None:
        """Put a request into its lane; one that comes back finds its old place."""
        tenant = self.tenant(request)
        lanes, key = self._place(request)
        lane = lanes.get(key)
        if lane is None:
            lane = lanes[key] = Lane(request.adapter, tenant)
        insort(lane.entries, (request.priority, request.arrival, request))
        tenant.waiting += 1
        self.num_waiting += 1

    def remove(self, request: Request) -> None:
        lanes, key = self._place(request)
        lane = lanes[key]
        place = bisect_left(lane.entries, (request.priority, request.arrival), key=lambda entry: entry[:2])
        assert lane.entries[place][2] is request
        del lane.entries[place]
        lane.tenant.waiting -= 1
        self.num_waiting -= 1
        if not lane.entries:
            del lanes[key]

    def _place(self, request: Request) -> tuple[dict[int, Lane], int]:
        lanes = self.lanes if request.adapted else self.free
        return lanes, BASE if request.adapter is None else request.adapter.uid

    def __iter__(self) -> Iterator[Request]:
        for lane in (*self.lanes.values(), *self.free.values()):
            for *_, request in lane.entries:
                yield request

    def forget(self) -> None:
        """Start all counters anew: to call when nothing waits or runs."""
        assert not self.num_waiting and not any(t.running for t in self.tenants.values())
        self.tenants.clear()

    def check_integrity(self) -> None:
        waiting = dict.fromkeys(self.tenants, 0)
        for lanes in (self.lanes, self.free):
            for key, lane in lanes.items():
                assert lane.entries and lane.entries == sorted(lane.entries)
                assert self.tenants[lane.tenant.name] is lane.tenant
                assert all(self._place(r) == (lanes, key) for *_, r in lane.entries)
                waiting[lane.tenant.name] += len(lane.entries)
        assert self.num_waiting == sum(waiting.values())
        assert all(t.waiting == waiting[name] and t.running >= 0 for name, t in self.tenants.items())


def _tenant_name(request: Request) -> str | None:
    return None if request.adapter is None else request.adapter.name
