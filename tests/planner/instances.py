"""Made-up machines and demands."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from multigraft.core.config import SchedulerConfig
from multigraft.core.region import Scope
from multigraft.planner.loads import ServerLoads
from multigraft.planner.placement import Demand
from multigraft.scheduling.steptime import FEATURES, StepTimeModel
from multigraft.twin.profile import LoadTimes, Memory, Profile
from multigraft.twin.workload import SLO

FAST = {
    "step": 5e-3, "has_prefill": 1e-3, "has_adapters": 1e-3, "rows_from_0": 1e-6, "rows_from_16": 1e-6,
    "rows_from_64": 4e-6, "rows_from_256": 2.2e-5, "rows_from_1024": 2.2e-5, "prefill_attention": 2e-9,
    "decode_context": 4e-8, "decode_adapters": 1e-5, "decode_adapter_bytes": 4e-13, "prefill_adapter_work": 3e-14,
    "prefill_adapters": 1e-5, "samples": 1e-6, "decode_rows": 2e-6,
}  # fmt: skip
"""About one H100 with an 8B model."""
SLOW = {
    "step": 1e-2, "has_prefill": 2e-3, "has_adapters": 2e-3, "rows_from_0": 8e-4, "rows_from_16": 7e-4,
    "rows_from_64": 3e-4, "rows_from_256": 2e-4, "rows_from_1024": 2e-4, "decode_context": 6e-7,
    "decode_adapters": 5e-4, "decode_adapter_bytes": 1e-9, "decode_adapter_work": 2e-12,
    "prefill_adapter_work": 2e-12, "samples": 1e-4,
}  # fmt: skip
"""About two CPU cores with a 135M model: a row costs less when there are more, and the foreign rows cost, too."""


def machine(weights: dict[str, float] = FAST, **memory: float) -> Profile:
    defaults = {"total": 60e9, "per_adapter_byte": 1, "kv_token": 131_072, "adapter_rank": 2_600_000}
    return Profile(
        model="made up",
        hardware={"device": "made up", "cpu": "made up"},
        versions={},
        steps=StepTimeModel(tuple(weights.get(name, 0.0) for name in FEATURES)),
        loads=LoadTimes(fetch=0.02, copy=0.004),
        memory=Memory(**(defaults | memory)),
        max_model_len=16_384,
        overlap=True,
    )


def cpu() -> Profile:
    return machine(SLOW, total=1e9, per_adapter_byte=0, kv_token=23_040, adapter_rank=300_000)


def demands(num: int, seed: int, rate: float, *, skewed: bool = True) -> list[Demand]:
    """`rate` requests a second in all."""
    rng = np.random.default_rng(seed)
    rates = rng.pareto(1.2, num) + 0.05 if skewed else rng.uniform(0.2, 1, num)
    rates *= rate / rates.sum()
    return [
        Demand(
            name=f"a{i}",
            rate=float(rates[i]),
            prompt_len=float(rng.lognormal(6, 0.8)),
            output_len=float(rng.lognormal(4.8, 0.7)),
            rank=int(rng.choice([8, 16, 32, 64])),
            scope=Scope.PREFILL if rng.random() < 0.2 else Scope.ALL,
        )
        for i in range(num)
    ]


def loads(wanted: Sequence[Demand], *, itl: float | None = 0.05, slots: int = 64, profile: Profile | None = None):
    profile = profile or machine()
    deployment = profile.deployment(scheduler=SchedulerConfig(), max_loras=slots, max_cpu_loras=1024)
    return ServerLoads(wanted, profile, deployment, SLO(itl=itl))


def random_loads(seed: int, largest: int = 70) -> ServerLoads:
    rng = np.random.default_rng(seed)
    num = int(rng.integers(8, largest))
    wanted = demands(num, seed, rate=num * float(rng.uniform(0.3, 4)))
    return loads(wanted, itl=float(rng.uniform(0.03, 0.15)), slots=int(rng.choice([16, 64, 128])))
