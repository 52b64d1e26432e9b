"""Threads follow what other processes leave of the cores."""

from __future__ import annotations

import multiprocessing
import os
import time
from pathlib import Path
from typing import Any

import pytest

from multigraft.engine.neighbours import ENOUGH, PERIOD_S, Neighbours, busy_seconds, others_seconds


class Machine:
    """A clock, and other processes that take so many cores."""

    def __init__(self, threads: int, cores: int | None = None):
        self.now = self.taken = 0.0
        self.set: list[int] = []
        self.cores = set(range(cores or threads))
        self.neighbours = Neighbours(lambda: self.taken, lambda: self.now, self.set.append, threads, lambda: self.cores)

    def run(self, seconds: float, cores: float) -> None:
        self.now += seconds
        self.taken += seconds * cores
        self.neighbours.look()


def test_threads_follow_the_cores_that_are_left():
    machine = Machine(threads=4)
    for cores in (0.0, 0.3, 1.0, 1.1, 2.5, 9.0, 0.5, 0.0):
        machine.run(PERIOD_S, cores)
    assert machine.set == [3, 1, 3, 4]  # 2.5 and 9 cores leave one each; told only when the number changes


def test_cores_without_a_thread_are_left_to_others():
    machine = Machine(threads=4, cores=8)
    for cores in (4.3, 5.0, 4.0):
        machine.run(PERIOD_S, cores)
    assert machine.set == [3, 4]


def test_other_cores_than_before_tell_nothing_yet():
    machine = Machine(threads=4, cores=4)
    machine.cores = {4, 5, 6, 7}
    machine.run(PERIOD_S, 99.0)  # what those had been taken before
    assert machine.set == []
    machine.run(PERIOD_S, 1.0)
    assert machine.set == [3]


def test_it_looks_once_a_period():
    machine = Machine(threads=2)
    machine.run(PERIOD_S / 2, 1.0)
    assert machine.set == []
    machine.run(PERIOD_S / 2, 1.0)
    assert machine.set == [1]


def test_one_thread_stays_one():
    machine = Machine(threads=1)
    machine.run(PERIOD_S, 3.0)
    assert machine.set == []


def spin(running: Any, seconds: float) -> None:
    running.set()
    stop = time.monotonic() + seconds
    while time.monotonic() < stop:
        pass


@pytest.mark.skipif(not Path("/proc/stat").exists(), reason="the system does not tell")
def test_a_busy_process_is_seen():
    context = multiprocessing.get_context("spawn")
    running = context.Event()
    other = context.Process(target=spin, args=(running, 1.5))
    other.start()
    assert running.wait(30)
    taken = others_seconds()
    time.sleep(1.0)
    assert others_seconds() - taken > ENOUGH
    other.join()


def test_other_cores_do_not_count():
    lines = ("cpu 900 0 0 0", "cpu0 100 2 30 9000 9000 4 5 6 7 7", "cpu1 800 0 0 0 0 0 0 0", "cpu10 1 0 0 0 0 0 0 0")
    stat = "\n".join(lines)
    assert busy_seconds(stat, {0}) == 147 / os.sysconf("SC_CLK_TCK")
    assert busy_seconds(stat, {0, 10}) == 148 / os.sysconf("SC_CLK_TCK")
