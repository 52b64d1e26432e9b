"""Every example once an epoch, whatever the numbers; passes within their room and reasonably full."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from multigraft.training.batches import Order, pack


@given(st.integers(1, 60), st.integers(1, 70), st.integers(0, 2**63 - 1), st.integers(0, 3))
def test_an_epoch_sees_every_example_once(num: int, batch_size: int, seed: int, epoch: int) -> None:
    order = Order(num, batch_size, seed)
    steps = [order.examples(epoch * order.steps_per_epoch + i) for i in range(order.steps_per_epoch)]
    assert sorted(e for step in steps for e in step) == list(range(num))
    assert all(len(step) == batch_size for step in steps[:-1]) and 0 < len(steps[-1]) <= batch_size
    later = epoch * order.steps_per_epoch + order.steps_per_epoch - 1
    assert Order(num, batch_size, seed).examples(later) == steps[-1], "a step depends on nothing before it"


def test_orders_differ_by_epoch_and_seed_and_never_change() -> None:
    orders = [tuple(Order(50, 50, seed).examples(epoch)) for seed in range(3) for epoch in range(3)]
    assert len(set(orders)) == 9
    assert Order(8, 8, 5).examples(2) == [4, 7, 6, 0, 1, 5, 2, 3], "a resumed job would see other data"


@given(st.lists(st.integers(1, 50), min_size=1, max_size=40), st.integers(50, 120), st.data())
def test_packing_keeps_examples_whole_and_passes_full(lengths: list[int], room: int, data: st.DataObject) -> None:
    examples = data.draw(st.permutations(range(len(lengths))))
    bins = pack(examples, np.array(lengths), room)
    assert sorted(e for bin in bins for e in bin) == sorted(examples)
    loads = [sum(lengths[e] for e in bin) for bin in bins]
    assert max(loads) <= room
    assert sum(load <= room / 2 for load in loads) <= 1, "two half-empty passes could have been one"
    assert pack(sorted(examples), np.array(lengths), room) == bins, "the order given does not matter"
