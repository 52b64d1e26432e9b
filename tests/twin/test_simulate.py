"""The twin on cases whose times can be told by hand."""

from __future__ import annotations

from dataclasses import replace

import pytest

from multigraft.core.batch import Batch
from multigraft.core.config import SchedulerConfig
from multigraft.scheduling.steptime import StepShape
from multigraft.scheduling.training import FIRST_FIT, HEADROOM
from multigraft.twin.profile import LoadTimes
from multigraft.twin.report import Quantiles, report
from multigraft.twin.simulate import simulate
from multigraft.twin.training import Training
from multigraft.twin.workload import SLO, Adapter, Arrival, TrainingJob, Workload
from tests.twin.made import PROFILES, poisson, profile


def test_one_request_by_hand() -> None:
    """Three prompt chunks of 0.1 s + 1 ms a row, then decodes of 0.1 s + 1 ms."""
    p = profile(step=0.1, rows_from_0=1e-3)
    d = p.deployment(scheduler=SchedulerConfig(max_num_seqs=4, max_num_batched_tokens=4))
    record = simulate(Workload(name="one", requests=(Arrival(2.0, None, 10, 3),)), p, d)
    (s,) = record.served
    assert s.started == 2.0 and s.num_tokens == 3
    assert s.first == pytest.approx(2.0 + 3 * 0.1 + 0.010)
    assert s.last == pytest.approx(s.first + 2 * 0.101)
    assert list(record.gaps) == pytest.approx([0.101, 0.101]) and record.steps == 5


def test_with_overlap_a_step_waits_for_the_one_in_flight() -> None:
    """A request that comes while a step runs is scheduled at its end, into the step after the one launched by then."""
    p = replace(profile(overlap=True, step=1.0), launch=0.25)
    requests = (Arrival(0.0, None, 4, 3), Arrival(0.5, None, 4, 1))
    first, second = simulate(Workload(name="two", requests=requests), p, p.deployment()).served
    # Step 1 ends at 1.25; step 2, launched at 0.25, ends at 2.25; what came at 0.5 is in step 3, launched at 1.25.
    assert (first.first, first.last) == (1.25, 3.25)
    assert (second.started, second.first) == (1.25, 3.25)


def test_loads_take_time_by_bytes_and_the_second_comes_from_host_memory() -> None:
    p = profile(step=0.01, loads=LoadTimes(fetch=1.0, fetch_per_byte=1e-6, copy=0.1, copy_per_byte=1e-7))
    adapters = (Adapter(name="a", nbytes=10**6), Adapter(name="b", nbytes=10**6))
    requests = (Arrival(0.0, "a", 4, 1), Arrival(10.0, "b", 4, 1), Arrival(20.0, "a", 4, 1))
    d = p.deployment(max_loras=1, adapter_bytes=10**6)
    record = simulate(Workload(name="loads", adapters=adapters, requests=requests), p, d)
    assert [load.adapter for load in record.loads or []] == ["a", "b", "a"]
    assert [load.seconds for load in record.loads or []] == pytest.approx([2.2, 2.2, 0.2])
    assert record.served[2].first == pytest.approx(20.21)


def test_with_overlap_a_copy_waits_for_the_step_in_flight_that_uses_its_slot() -> None:
    p = profile(overlap=True, step=0.5, loads=LoadTimes(copy_per_byte=1e-6))
    adapters = (Adapter(name="a", nbytes=10**6), Adapter(name="b", nbytes=10**6))
    requests = (Arrival(0.0, "a", 4, 1), Arrival(0.0, "b", 4, 1))
    one_slot = p.deployment(max_loras=1, adapter_bytes=10**6)
    record = simulate(Workload(name="loads", adapters=adapters, requests=requests), p, one_slot)
    # Step 1 runs from 1.0 to 1.5; b is asked for as soon as that is launched.
    assert [load.seconds for load in record.loads or []] == pytest.approx([1.0, 1.5])


def test_with_overlap_copies_are_made_one_after_the_other() -> None:
    p = profile(overlap=True, step=0.01, loads=LoadTimes(copy=0.1, copy_per_byte=1e-6))
    adapters = tuple(Adapter(name=name, nbytes=10**6) for name in "abc")
    requests = tuple(Arrival(0.0, name, 4, 1) for name in "abc")
    record = simulate(Workload(name="loads", adapters=adapters, requests=requests), p, p.deployment(max_loras=3))
    assert [load.seconds for load in record.loads or []] == pytest.approx([1.1, 2.1, 3.1])


def test_a_request_that_cannot_be_served_says_why_and_others_go_on() -> None:
    p = profile(step=0.01)
    d = p.deployment(kv_bytes=2**10 * 64, max_model_len=48)
    adapters = (Adapter(name="huge", nbytes=2**40),)
    requests = (Arrival(0, None, 40, 20), Arrival(0, "huge", 4, 4), Arrival(0, None, 4, 4))
    record = simulate(Workload(name="bad", adapters=adapters, requests=requests), p, d)
    assert "60 tokens of context, of 48" in (record.served[0].error or "")
    assert "too few (--adapter-memory-gib)" in (record.served[1].error or "")
    assert record.served[2].complete and report(record).failed == 2


@pytest.mark.parametrize("overlap", [False, True])
def test_training_takes_what_the_latency_target_leaves(overlap: bool) -> None:
    p = profile(overlap=overlap, step=0.01, train_forward=1e-5, train_backward=2e-5)
    alone = simulate(Workload(name="t", jobs=(TrainingJob(name="j", tokens=10_000),)), p, p.deployment())
    assert alone.train_tokens == 10_000
    # Backward counts the output head as a layer: 4 forward, 5 backward.
    assert alone.seconds == pytest.approx(10_000 * (4 * 1e-5 + 5 * 2e-5), rel=0.01)
    served = poisson(4, 0.5, 30, 0, 50, 50)
    both = simulate(replace(served, jobs=(TrainingJob(name="j", tokens=10**9),)), p, p.deployment())
    without = simulate(served, p, p.deployment())
    assert both.train_tokens > 10_000
    assert report(both).itl.p50 > report(without).itl.p50
    assert report(both).itl.p99 < 0.2, "the target is 0.1 s"
    assert both.seconds < 2 * without.seconds, "it ends with the requests"


@pytest.mark.parametrize("overlap", [False, True])
def test_the_training_share_learns_from_simulated_steps(overlap: bool) -> None:
    """A layer beside a decode of 10 ms takes 20: one is granted until that is known, then three or four, 85 ms."""
    p = replace(profile(overlap=overlap, step=0.01, train_layers=0.02), num_layers=100)
    load = Workload(name="t", requests=(Arrival(0.0, None, 4, 300),), jobs=(TrainingJob(name="j", tokens=10**9),))
    batches: list[Batch] = []
    simulate(load, p, p.deployment(), on_batch=batches.append)
    layers = [b.train.forward + b.train.backward if b.train else 0 for b in batches if b]
    assert set(layers[:FIRST_FIT]) == {1}
    assert 0.01 + 0.02 * sum(layers[-40:]) / 40 == pytest.approx(HEADROOM * 0.1, rel=0.02)


def test_small_passes_take_the_hosts_time_and_what_is_served_is_computed_meanwhile() -> None:
    """Layers of 3 ms each, 4 forward and 5 backward: 27 ms a pass, and more only from 3,000 rows on."""
    p = profile(overlap=True, step=0.01, train_forward=1e-6, train_backward=1e-6, host_train_layers=3e-3)
    for rows, seconds in ((100, 27e-3), (2900, 27e-3), (6000, 54e-3)):
        job = TrainingJob(name="j", tokens=10 * rows, microbatch=rows)
        alone = simulate(Workload(name="t", jobs=(job,)), replace(p, train_rows=8192), p.deployment())
        assert alone.seconds == pytest.approx(10 * seconds)
    shape = StepShape(decode_rows=1, samples=1, train_rows=100, train_forward=400, train_layers=4)
    assert p.steps.predict(shape) == pytest.approx(12e-3)
    assert p.steps.predict(replace(shape, train_forward=0, train_layers=0)) == pytest.approx(10e-3)


def test_a_pass_takes_one_microbatch_of_each_job() -> None:
    jobs = (TrainingJob(name="a", tokens=300, microbatch=100), TrainingJob(name="b", tokens=50, microbatch=200))
    training = Training(jobs, num_layers=2, max_rows=1024)
    rows = []
    while (work := training.work(0.0)) is not None:
        rows.append(work.rows)
        training.run(work.part(work.forward + work.backward))
    assert rows == [150, 100, 100] and training.tokens == 350


def test_report_counts_by_hand() -> None:
    p = profile(step=1.0)
    requests = (Arrival(0.0, "a", 8, 2), Arrival(0.0, "b", 8, 9), Arrival(8.0, None, 1, 1))
    adapters = (Adapter(name="a"), Adapter(name="b"))
    slo = SLO(ttft=1.5, itl=1.0)
    r = report(simulate(Workload(name="r", adapters=adapters, requests=requests, slo=slo), p, p.deployment()))
    # a and b load at once; first tokens at 1, a ends at 2, b at 9, the base's request at 9 too.
    assert r.ttft == Quantiles(1.0, 1.0, 1.0, 1.0, 1.0) and r.e2e.max == 9.0
    assert r.itl.mean == 1.0 and r.completed == 3 and r.attained == 1.0
    # By 8 s: all of a (10 tokens), b's prompt and 8 of its 9 tokens.
    assert r.throughput == pytest.approx((10 + 8 + 8) / 8) and r.arriving == pytest.approx(29 / 8)
    shares = {a.name: a.served for a in r.adapters}
    assert shares == {"base": 1.0, "a": 1.0, "b": pytest.approx(16 / 17)}
    assert r.starved is False and r.drained == 9.0


def test_overload_starves() -> None:
    p = PROFILES[1]
    deployment = p.deployment(max_loras=2, scheduler=SchedulerConfig(max_num_seqs=8, max_num_batched_tokens=256))
    idle, busy = (report(simulate(poisson(8, rate, 30, 0, 200, 100), p, deployment)) for rate in (0.005, 2.0))
    assert not idle.starved and not idle.starved_adapters
    assert busy.starved and busy.starved_adapters == 8 and busy.throughput < 0.5 * busy.arriving
    assert busy.resources is not None and busy.resources.slots_used > 1.5


def test_quantiles_weigh_by_counts() -> None:
    assert Quantiles.of([3.0, 1.0, 2.0], [1, 98, 1]) == Quantiles(1.03, 1.0, 1.0, 2.0, 3.0)
    assert Quantiles.of([]) == Quantiles()
