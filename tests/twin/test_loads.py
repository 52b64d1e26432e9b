"""Adapters read beside steps, by hand; and which of several measurements count."""

from __future__ import annotations

import threading

import pytest
import torch

from multigraft.calibration.speed import calm, slower
from multigraft.core.batch import AdapterMove
from multigraft.core.request import AdapterRef
from multigraft.kernels.openmp import compute_alone
from multigraft.twin.loads import HostMemory
from multigraft.twin.profile import LoadTimes


def move(uid: int) -> AdapterMove:
    return AdapterMove(AdapterRef(f"a{uid}", uid, 100), slot=uid)


def test_a_read_and_a_step_slow_each_other_down() -> None:
    host = HostMemory(10, LoadTimes(fetch=1.0, step_slowdown=1.0, read_slowdown=1.0), num_threads=1)
    host.fetch(move(1), 0.0)
    assert host.step(0.0, 0.5) == 1.0 and not host.done, "half speed, for both"
    assert host.next_done(1.0) == 1.5, "the second half takes half a second undisturbed"
    assert host.step(1.0, 2.0) == 3.5, "a second at half speed, until the read is done, then one and a half"
    assert [m.ref.uid for m, _ in host.done] == [1]


def test_reads_wait_for_a_thread_and_what_is_in_memory_comes_at_once() -> None:
    host = HostMemory(10, LoadTimes(fetch=1.0, step_slowdown=0.5), num_threads=2)
    for uid in (1, 2, 3):
        host.fetch(move(uid), 0.0)
    assert host.step(0.0, 0.25) == 0.5, "two of them are under way"
    assert host.idle(0.5, 1.25) == 1.25 and [m.ref.uid for m, _ in host.done] == [1, 2]
    host.done.clear()
    assert host.next_done(1.25) == pytest.approx(2.0)
    host.fetch(move(1), 1.25)
    assert [m.ref.uid for m, _ in host.done] == [1]


def test_reads_share_the_memory() -> None:
    host = HostMemory(10, LoadTimes(fetch=1.0, read_sharing=0.5), num_threads=3)
    for uid in (1, 2):
        host.fetch(move(uid), 0.0)
    assert host.next_done(0.0) == 1.5
    assert host.idle(0.0, 0.75) == 0.75, "half of both"
    host.fetch(move(3), 0.75)
    assert host.next_done(0.75) == 1.75, "half a second at half speed"
    assert host.step(0.75, 2.5) == 3.25
    assert [m.ref.uid for m, _ in host.done] == [1, 2, 3]


def test_slow_spells_are_left_out_but_never_most() -> None:
    disturbed = [1.0, 1.05, 1.0, 1.3, 1.0, 1.5, 1.02]
    counted = [True, True, True, False, True, False, True]
    assert calm([(decode, 9.0) for decode in disturbed]) == counted
    assert calm([(0.1, prompt) for prompt in disturbed]) == counted
    assert sum(calm([(float(i), 1.0) for i in range(1, 7)])) == 4
    assert all(calm([(2.0, 3.0)]))
    assert slower((1.0, 5.0), (2.0, 4.0)) == (2.0, 5.0)


def test_a_thread_that_computes_alone_leaves_the_others_their_threads() -> None:
    before, found = torch.get_num_threads(), []

    def run(*steps) -> None:
        thread = threading.Thread(target=lambda: [step() for step in steps])
        thread.start()
        thread.join()

    def note() -> None:
        found.append(torch.get_num_threads())

    run(compute_alone, note)
    run(note)
    assert found[0] in (1, before) and found[1] == before
    if "gnu" in torch.__config__.parallel_info().lower():
        assert found[0] == 1
