"""What can be chosen: one server's share of a workload, and how the server is set up."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields, replace
from itertools import product
from random import Random
from typing import Any

from multigraft.core.config import SchedulerConfig, TrainingConfig
from multigraft.core.errors import CapacityExceeded, InvalidRequest
from multigraft.twin.profile import Deployment, Profile
from multigraft.twin.workload import Adapter, Workload

from .placement import Demand

GIB = 2**30
MAX_CLIMB = 8
BASE_MODEL = "base"
"""Name of the demand of requests without adapter, as in reports."""


@dataclass(frozen=True, slots=True, kw_only=True, order=True)
class Choice:
    num_adapters: int
    """Of the workload's adapters on one server; the other servers take the rest."""
    max_loras: int
    adapter_memory: float
    """Device memory for adapters, as a share of what the largest max_loras of them need. The rest is KV cache."""
    max_num_seqs: int
    max_num_batched_tokens: int
    train_priority: float = 1.0

    def deployment(self, workload: Workload, profile: Profile) -> Deployment:
        """CapacityExceeded when it leaves no memory for KV pages, or not even for the largest adapter."""
        sizes = sorted((size(adapter, profile) for adapter in workload.adapters), reverse=True)
        wanted = sum(sizes[: self.max_loras])
        adapter_bytes = max([int(self.adapter_memory * wanted), *sizes[:1]])
        return profile.deployment(
            scheduler=SchedulerConfig(
                max_num_seqs=self.max_num_seqs, max_num_batched_tokens=self.max_num_batched_tokens
            ),
            max_loras=self.max_loras,
            adapter_bytes=adapter_bytes,
            max_cpu_loras=max(len(workload.adapters), 256),
            training=TrainingConfig(train_priority=self.train_priority),
        )

    def flags(self, workload: Workload, profile: Profile) -> dict[str, Any]:
        """Of `multigraft serve`, by field name."""
        deployment = self.deployment(workload, profile)
        kv_bytes = deployment.kv_tokens * profile.memory.kv_token
        return {
            "max_loras": self.max_loras,
            "max_lora_rank": max([adapter.rank for adapter in workload.adapters], default=64),
            "max_cpu_loras": deployment.max_cpu_loras,
            "adapter_memory_gib": round(deployment.adapter_bytes / GIB + 5e-5, 4),
            "kv_cache_gib": round(kv_bytes / GIB, 4),
            "max_num_seqs": self.max_num_seqs,
            "max_num_batched_tokens": self.max_num_batched_tokens,
            "train_priority": self.train_priority,
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class Space:
    """Values to choose from, one tuple for each field of Choice."""

    num_adapters: tuple[int, ...]
    max_loras: tuple[int, ...] = (4, 8, 16, 32, 64, 128, 256)
    adapter_memory: tuple[float, ...] = (1.0, 0.5)
    max_num_seqs: tuple[int, ...] = (8, 16, 32, 64, 128, 256)
    max_num_batched_tokens: tuple[int, ...] = (256, 512, 1024, 2048, 4096, 8192)
    train_priority: tuple[float, ...] = (1.0,)

    @classmethod
    def of(cls, workload: Workload, profile: Profile) -> Space:
        """All that makes sense for a workload: from a sixteenth of its adapters to all of them."""
        total = len(workload.adapters)
        return cls(
            num_adapters=tuple(sorted({-(-total * k // 16) for k in range(1, 17)})),
            adapter_memory=(1.0, 0.5) if profile.memory.per_adapter_byte else (1.0,),
            train_priority=(0.25, 0.5, 1.0) if workload.jobs else (1.0,),
        )

    def draw(self, rng: Random) -> Choice:
        """Any, whether it fits or not."""
        return Choice(**{field.name: rng.choice(getattr(self, field.name)) for field in fields(Choice)})

    def choices(self, workload: Workload, profile: Profile) -> list[Choice]:
        """All that are possible. Slots beyond the number of adapters change nothing and are left out."""
        names = [field.name for field in fields(Choice)]
        found = []
        for num in self.num_adapters:
            share = part(workload, num)
            slots = sorted({min(n, num) for n in self.max_loras})
            others = (self.adapter_memory, self.max_num_seqs, self.max_num_batched_tokens, self.train_priority)
            for values in product([num], slots, *others):
                choice = Choice(**dict(zip(names, values, strict=True)))
                if possible(choice, share, profile):
                    found.append(choice)
        return found

    def neighbours(self, choice: Choice, workload: Workload, profile: Profile) -> Iterator[Choice]:
        """Possible choices one step away in one field: to the next value, or by a few adapters. Where all adapters
        have slots, they keep them."""
        total = len(workload.adapters)
        for field in fields(Choice):
            value = getattr(choice, field.name)
            if field.name == "num_adapters":
                few = max(1, total // 32)
                steps = [num for k in (-2, -1, 1, 2) if 0 < (num := value + k * few) <= total]
            else:
                values = sorted({*getattr(self, field.name), value})
                at = values.index(value)
                steps = [*values[max(0, at - 1) : at], *values[at + 1 : at + 2]]
            for step in steps:
                other = replace(choice, **{field.name: step})
                if other.max_loras > other.num_adapters or choice.max_loras == choice.num_adapters < other.num_adapters:
                    other = replace(other, max_loras=other.num_adapters)
                if possible(other, part(workload, other.num_adapters), profile):
                    yield other


def possible(choice: Choice, share: Workload, profile: Profile) -> bool:
    """Whether it fits into memory, with the server's largest adapters and longest requests."""
    if choice.max_num_batched_tokens < choice.max_num_seqs:
        return False
    try:
        deployment = choice.deployment(share, profile)
    except CapacityExceeded:
        return False
    longest = max((r.prompt_len + r.output_len for r in share.requests), default=0)
    return longest <= min(deployment.kv_tokens, deployment.max_model_len)


def climbed(
    start: Choice, rank: Callable[[Choice], tuple[float, ...]], space: Space, workload: Workload, profile: Profile
) -> Choice:
    """The choice that is reached from `start` by one step in one field at a time, as long as the rank gets less.

    At most MAX_CLIMB steps.
    """
    best, best_rank = start, rank(start)
    seen = {start}
    for _ in range(MAX_CLIMB):
        at = best
        for choice in space.neighbours(at, workload, profile):
            if choice not in seen:
                seen.add(choice)
                if (now := rank(choice)) < best_rank:
                    best, best_rank = choice, now
        if best == at:
            break
    return best


def size(adapter: Adapter, profile: Profile) -> int:
    """Bytes on the device."""
    return adapter.nbytes or profile.adapter_bytes(adapter.rank)


def part(workload: Workload, num_adapters: int) -> Workload:
    """What one server gets that takes so many of the adapters: an even choice from the busiest to the idlest, and as
    large a part of the requests without adapter."""
    total = len(workload.adapters)
    if num_adapters >= total:
        return workload
    counts = dict.fromkeys((adapter.name for adapter in workload.adapters), 0)
    for request in workload.requests:
        if request.adapter is not None:
            counts[request.adapter] += 1
    ranked = sorted(workload.adapters, key=lambda adapter: -counts[adapter.name])
    chosen = {ranked[(2 * k + 1) * total // (2 * num_adapters)].name for k in range(num_adapters)}
    requests, seen = [], 0
    for request in workload.requests:
        if request.adapter is None:
            seen += 1
            kept = seen * num_adapters // total > (seen - 1) * num_adapters // total
        else:
            kept = request.adapter in chosen
        if kept:
            requests.append(request)
    adapters = tuple(adapter for adapter in workload.adapters if adapter.name in chosen)
    return replace(workload, adapters=adapters, requests=tuple(requests))


def beginning(workload: Workload, seconds: float) -> Workload:
    """Its first seconds."""
    requests = tuple(request for request in workload.requests if request.time <= seconds)
    return replace(workload, requests=requests, jobs=tuple(j for j in workload.jobs if j.start <= seconds))


def demands_of(workload: Workload) -> list[Demand]:
    """Mean rates and lengths of every adapter that is asked for, and of the base model."""
    if not workload.requests:
        raise InvalidRequest(f"Workload {workload.name!r} has no requests to plan for.", param="workload")
    totals: dict[str | None, tuple[int, int, int]] = {}
    for request in workload.requests:
        count, prompts, outputs = totals.get(request.adapter, (0, 0, 0))
        totals[request.adapter] = (count + 1, prompts + request.prompt_len, outputs + request.output_len)
    adapters: Sequence[Adapter | None] = (None, *workload.adapters)
    found = []
    for adapter in adapters:
        count, prompts, outputs = totals.get(adapter.name if adapter else None, (0, 0, 0))
        if count:
            demand = Demand(
                name=adapter.name if adapter else BASE_MODEL,
                rate=count / max(workload.duration, 1e-9),
                prompt_len=prompts / count,
                output_len=outputs / count,
                rank=adapter.rank if adapter else 0,
            )
            found.append(demand if adapter is None else replace(demand, scope=adapter.scope, nbytes=adapter.nbytes))
    return found
