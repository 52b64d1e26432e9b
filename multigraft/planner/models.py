"""The best set-up by readable models: fitted to what the twin says of a few hundred set-ups, asked in microseconds."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from multigraft.core.errors import CapacityExceeded
from multigraft.core.region import Scope
from multigraft.twin.profile import Profile
from multigraft.twin.workload import SLO, Workload

from .choice import Choice, Space, demands_of, part, size
from .loads import ServerLoads
from .placement import Demand
from .rules import Model, fit_best
from .search import ATTAINED, Outcome, Progress, try_out

FEATURES = (
    "load",
    "estimated_itl",
    "adapters",
    "rate_sum",
    "rate_std",
    "rank_max",
    "rank_mean",
    "rank_std",
    "prefill_share",
    "prompt_rate",
    "output_rate",
    "max_loras",
    "kv_tokens",
    "max_num_seqs",
    "max_num_batched_tokens",
    "train_priority",
    "training",
)
TARGETS = ("served", "throughput", "ttft", "itl", "attained")
"""served: share of the arriving tokens, which is under 0.9 where requests starve. throughput: trained tokens count."""
EXAMPLES = 240
MAX_LOAD = 4.0
"""Loads beyond are cut off: they would outweigh all others in a linear model."""


def features(choice: Choice, demands: Sequence[Demand], share: Workload, profile: Profile) -> list[float]:
    """In the order of FEATURES. share: what the server gets of the workload, and demands_of it.

    CapacityExceeded when the choice breaks a limit outright.
    """
    deployment = choice.deployment(share, profile)
    rates = np.array([d.rate for d in demands])
    ranks = np.array([d.rank for d in demands if d.rank] or [0])
    prefill = sum(d.rate for d in demands if d.scope is Scope.PREFILL)
    load, itl = estimate(demands, share, profile, choice)
    return [
        min(load, MAX_LOAD),
        itl,
        choice.num_adapters,
        float(rates.sum()),
        float(rates.std()),
        float(ranks.max()),
        float(ranks.mean()),
        float(ranks.std()),
        float(prefill / rates.sum()),
        sum(d.rate * d.prompt_len for d in demands),
        sum(d.rate * d.output_len for d in demands),
        choice.max_loras,
        deployment.kv_tokens,
        choice.max_num_seqs,
        choice.max_num_batched_tokens,
        choice.train_priority,
        float(bool(share.jobs)),
    ]
