"""Profiles and workloads made by hand."""

from __future__ import annotations

import random

from multigraft.scheduling.steptime import FEATURES, StepTimeModel
from multigraft.twin.profile import LoadTimes, Memory, Profile
from multigraft.twin.workload import Adapter, Arrival, Workload, by_time


def profile(*, overlap: bool = False, loads: LoadTimes | None = None, **weights: float) -> Profile:
    assert not weights.keys() - set(FEATURES)
    return Profile(
        model="made",
        hardware={"device": "none"},
        versions={},
        steps=StepTimeModel(tuple(weights.get(name, 0.0) for name in FEATURES)),
        loads=loads or LoadTimes(),
        memory=Memory(total=2**30, per_adapter_byte=1.0, kv_token=2**10, adapter_rank=2**16),
        max_model_len=8192,
        overlap=overlap,
        num_layers=4,
    )


LOADS = LoadTimes(fetch=0.02, fetch_per_byte=1e-9, copy=0.001)
PROFILES = (
    profile(
        overlap=True,
        loads=LOADS,
        step=0.006,
        has_prefill=0.004,
        rows_from_64=1e-5,
        decode_context=4e-8,
        train_forward=1e-6,
        train_backward=2.5e-6,
        host_train_layers=2e-3,
    ),
    profile(
        loads=LOADS,
        step=0.02,
        rows_from_0=1e-3,
        rows_from_16=5e-4,
        rows_from_64=2e-4,
        decode_context=4e-6,
        train_forward=3e-5,
        train_backward=6e-5,
    ),
)
"""Of a GPU's kind and of a CPU's."""


def poisson(num: int, rate: float, duration: float, seed: int, prompt: float, output: float) -> Workload:
    """rate: of each of num adapters. prompt, output: mean lengths."""
    rng = random.Random(seed)
    requests = []
    for i in range(num):
        time = rng.expovariate(rate)
        while time < duration:
            lengths = (max(1, min(2000, int(rng.expovariate(1 / mean)))) for mean in (prompt, output))
            requests.append(Arrival(time, f"a{i}", *lengths))
            time += rng.expovariate(rate)
    return Workload(name="made", adapters=tuple(Adapter(name=f"a{i}") for i in range(num)), requests=by_time(requests))
