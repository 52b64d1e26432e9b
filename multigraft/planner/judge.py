"""The exact test of a placement: the twin runs every GPU with the requests that it would get."""

from __future__ import annotations

from dataclasses import replace
from random import Random

from multigraft.core.errors import CapacityExceeded
from multigraft.twin.profile import Deployment, Profile
from multigraft.twin.report import Report, report
from multigraft.twin.simulate import simulate
from multigraft.twin.workload import SLO, Workload

from .choice import BASE_MODEL, demands_of
from .loads import ServerLoads
from .packing import place, spread
from .placement import Placement
from .search import shortfall

TIGHTER = 0.93
MAX_TRIES = 8


def routed(workload: Workload, placement: Placement, seed: int = 0) -> list[Workload]:
    """The workload of each GPU, when each request goes to one of its adapter's GPUs by their shares. Without jobs."""
    rng = Random(seed)
    targets = {name: (list(shares), list(shares.values())) for name, shares in placement.shares.items()}
    requests: list[list] = [[] for _ in range(placement.num_gpus)]
    for request in workload.requests:
        gpus, shares = targets[request.adapter or BASE_MODEL]
        requests[rng.choices(gpus, shares)[0]].append(request)
    return [
        replace(
            workload,
            name=f"{workload.name}, GPU {gpu}",
            adapters=tuple(a for a in workload.adapters if gpu in placement.shares.get(a.name, ())),
            requests=tuple(requests[gpu]),
            jobs=(),
        )
        for gpu in range(placement.num_gpus)
    ]


def judge(placement: Placement, workload: Workload, profile: Profile, deployment: Deployment) -> list[Report]:
    """A report for each GPU."""
    return [report(simulate(part, profile, deployment)) for part in routed(workload, placement)]


def accepted(r: Report, slo: SLO) -> bool:
    return shortfall(r, slo) == 0


def place_judged(
    workload: Workload, profile: Profile, deployment: Deployment, *, num_gpus: int | None = None, whole: bool = False
) -> tuple[Placement, list[Report]]:
    """Our placement on the fewest GPUs, or the given number, such that the twin accepts each: GPUs are filled less and
    less until it does, with the profile's margin. The reports are at the profile's speed."""
    headroom = 0.9
    for _ in range(MAX_TRIES):
        loads = ServerLoads(demands_of(workload), profile, deployment, workload.slo, headroom=headroom)
        placement = place(loads, whole=whole) if num_gpus is None else spread(loads, num_gpus)
        if placement is None:
            break
        if all(accepted(r, workload.slo) for r in judge(placement, workload, profile.slower(), deployment)):
            return placement, judge(placement, workload, profile, deployment)
        headroom *= TIGHTER
    where = "any number of" if num_gpus is None else num_gpus
    raise CapacityExceeded(
        f"The twin finds no placement of workload {workload.name!r} on {where} GPUs that serves everyone within the "
        f"SLO, not even with GPUs filled to {headroom:.0%}."
    )
