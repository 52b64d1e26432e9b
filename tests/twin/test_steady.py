"""Steps that the twin skips over: everything comes out as when each of them is scheduled."""

from __future__ import annotations

import math
import random
from dataclasses import replace

import pytest

from multigraft.core.batch import Batch
from multigraft.core.config import SchedulerConfig
from multigraft.twin.profile import Deployment
from multigraft.twin.record import Record
from multigraft.twin.simulate import simulate
from multigraft.twin.workload import TrainingJob
from tests.twin.made import PROFILES, poisson


def times(record: Record) -> list[float]:
    return [t for s in record.served for t in (s.started, s.first, s.last) if t is not None]


@pytest.mark.parametrize("trains", [False, True])
@pytest.mark.parametrize("seed", range(40))
def test_skipping_changes_nothing(seed: int, trains: bool) -> None:
    rng = random.Random(seed)
    num = rng.choice([1, 4, 30])
    workload = poisson(num, rng.choice([3, 20, 100]) / 40 / num, 40, seed, rng.choice([20, 300]), rng.choice([10, 200]))
    if trains:
        jobs = (("a", 10**5, 64, 1.0), ("b", 3000, 16, 3.0), ("c", 10**5, 30, 20.0))
        jobs = tuple(TrainingJob(name=n, tokens=t, microbatch=m, start=start) for n, t, m, start in jobs)
        workload = replace(workload, jobs=jobs)
    deployment = Deployment(
        scheduler=SchedulerConfig(
            max_num_seqs=rng.choice([4, 16, 64]),
            max_num_batched_tokens=rng.choice([64, 512]),
            fairness=rng.random() < 0.7,
        ),
        max_loras=rng.choice([2, 8]),
        adapter_bytes=2**40,
        kv_pages=rng.choice([300, 2000]),
        max_model_len=4096,
        enable_prefix_caching=False,
        max_cpu_loras=10,
    )
    profile = rng.choice(PROFILES)
    quick, steps = simulate(workload, profile, deployment), 0

    def count(batch: Batch) -> None:
        nonlocal steps
        steps += bool(batch or batch.train)

    slow = simulate(workload, profile, deployment, on_batch=count)
    assert quick.steps == slow.steps == steps and quick.train_tokens == slow.train_tokens
    assert all(math.isclose(a, b, rel_tol=1e-9, abs_tol=1e-9) for a, b in zip(times(quick), times(slow), strict=True))
    assert [load.adapter for load in quick.loads or []] == [load.adapter for load in slow.loads or []]
    assert quick.preemptions == slow.preemptions
    assert sum(quick.gap_counts) == sum(slow.gap_counts)
    assert sum(g * n for g, n in zip(quick.gaps, quick.gap_counts, strict=True)) == pytest.approx(
        sum(g * n for g, n in zip(slow.gaps, slow.gap_counts, strict=True))
    )


def test_the_prefix_index_comes_back_when_requests_are_preempted() -> None:
    """Without common prefixes the twin begins without the index; a preempted request needs it."""
    workload = poisson(2, 1.0, 20, 0, 100, 100)
    common = {"scheduler": SchedulerConfig(max_num_seqs=16, max_num_batched_tokens=64), "max_loras": 2}
    deployment = Deployment(**common, adapter_bytes=2**40, kv_pages=60, max_model_len=4096)
    batches: list[object] = []
    quick, slow = (simulate(workload, PROFILES[1], deployment, on_batch=f) for f in (None, batches.append))
    assert quick.preemptions and quick.preemptions == slow.preemptions and quick.steps == slow.steps
    assert times(quick) == pytest.approx(times(slow))
