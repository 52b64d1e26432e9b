"""The memory plan of fine-tuning, by hand: what is refused with which numbers, and what may run together."""

from __future__ import annotations

import pytest

from multigraft.core.errors import CapacityExceeded
from multigraft.engine.train_memory import GIB, TrainMemory

MIB = 2**20
HEAD, ROW, KEPT_ROW = 100, 240, 440
"""MiB of a pass: its output head, and a row without and with its activations kept."""


def memory(mib: int) -> TrainMemory:
    return TrainMemory(
        budget=mib * MIB,
        num_layers=4,
        input_bytes=10 * MIB,
        fused_bytes=50 * MIB,
        plain_bytes=100 * MIB,
        head_bytes=HEAD * MIB,
        most_rows=64,
        keeping_rows=16,
    )


def test_what_can_never_fit_is_refused_with_the_arithmetic() -> None:
    plan = memory(500 + HEAD + 100 * ROW)
    plan.check(500 * MIB, 100)
    needed = HEAD + 101 * ROW
    message = (
        f"needs {500 * MIB / GIB:.2f} GiB for its adapter, gradients and optimizer state, and {needed * MIB / GIB:.2f} "
        f"GiB for the activations of 101 tokens, together {(500 + needed) * MIB / GIB:.2f} GiB; fine-tuning may take "
        f"{plan.budget / GIB:.2f} GiB"
    )
    with pytest.raises(CapacityExceeded, match=message):
        plan.check(500 * MIB, 101)
    with pytest.raises(CapacityExceeded, match="off on this server"):
        memory(0).check(1, 1)


def test_a_sample_may_be_longer_than_a_pass_of_many_should_be() -> None:
    plan = memory(500 + HEAD + 100 * ROW)
    assert plan.longest(500 * MIB) == 100
    assert plan.microbatch(500 * MIB, 100) == 100 and plan.max_rows <= 64
    assert plan.longest(2**50) == 0


def test_activations_are_kept_where_enough_rows_fit() -> None:
    plan = memory(HEAD + 20 * KEPT_ROW)
    assert plan.max_rows == 20 and plan.keeps(20) and not plan.keeps(21)
    plan.shrink()
    assert plan.max_rows == 20 * KEPT_ROW // ROW and not plan.keeps(1)
    small = memory(HEAD + 15 * KEPT_ROW)
    assert small.max_rows == 15 * KEPT_ROW // ROW, "too few to be worth it"


def test_jobs_run_together_while_the_largest_microbatch_of_any_still_fits() -> None:
    plan = memory(1000 + HEAD + 50 * ROW)
    assert plan.fits(1000 * MIB, 50) and not plan.fits(1000 * MIB, 51)
    plan.add("a", 600 * MIB, 50)
    assert plan.fits(400 * MIB, 50) and not plan.fits(401 * MIB, 1)
    plan.add("b", 400 * MIB, 10)
    assert plan.free == (HEAD + 50 * ROW) * MIB
    plan.remove("a")
    assert plan.fits(600 * MIB, 10) and not plan.fits(600 * MIB, 53)
