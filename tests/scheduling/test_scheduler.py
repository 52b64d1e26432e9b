"""Admission, chunks, preemption, layout of batches, adapters in and out: rule by rule."""

from __future__ import annotations

import pytest

from multigraft.core.batch import Phase
from multigraft.core.config import SchedulerConfig
from multigraft.core.errors import CapacityExceeded, InvalidRequest
from multigraft.core.region import FromInvocation
from multigraft.core.request import AdapterRef, FinishReason, Request, SamplingParams, Scope
from multigraft.kvcache.pages import PagePool
from multigraft.scheduling.residency import Residency
from multigraft.scheduling.scheduler import Scheduler
from tests.scheduling.simulated_engine import SimulatedEngine, make_request, reference

A, B, C = (AdapterRef(name, uid, 10) for uid, name in enumerate("abc", 1))
P, Q = (AdapterRef(name, uid, 10, Scope.PREFILL) for uid, name in enumerate("pq", 11))


def spans(batch):
    return [(s.request.id, s.start, s.length, s.phase) for s in batch.spans]


def endless(*args, **kwargs):
    """A request that stops at its length only."""
    return make_request(*args, ignore_eos=True, **kwargs)


def prompt(n: int, first: int = 1) -> list[int]:
    return [first + i % 7 for i in range(n)]


def test_life_of_a_request():
    e = SimulatedEngine(budget=32)
    r = e.add(make_request("r", prompt(6), 3))
    assert spans(e.step()) == [("r", 0, 6, Phase.PREFILL)]
    assert r.num_output == 1 and r.num_computed == 6
    assert spans(e.step()) == [("r", 6, 1, Phase.DECODE)]
    e.run()
    assert r.output == reference(r) and r.finish_reason in (FinishReason.STOP, FinishReason.LENGTH)
    assert not e.scheduler.schedule()


def test_long_prompts_are_chunked_after_the_decodes():
    e = SimulatedEngine(budget=16)
    d = e.add(endless("d", prompt(4), 30))
    e.step()
    e.add(endless("long", prompt(40, 2), 3))
    chunks = []
    while len(e.live) == 2 and len(chunks) < 3:
        batch = e.step()
        assert batch.spans[-1].request is d and batch.num_tokens <= 16
        chunks.append(batch.spans[0].length)
    assert chunks == [15, 15, 10]


def test_a_last_chunk_of_one_token_is_prefill():
    e = SimulatedEngine(budget=8)
    e.add(make_request("r", prompt(9), 3, P))
    e.step()  # loads the adapter
    e.step()
    assert spans(e.step()) == [("r", 8, 1, Phase.PREFILL)]


def test_prefills_go_on_in_order_of_admission():
    e = SimulatedEngine(budget=16)
    for id in "xyz":
        e.add(make_request(id, prompt(20, ord(id)), 2))
    assert [s[:3] for s in spans(e.step())] == [("x", 0, 16)]
    assert [s[:3] for s in spans(e.step())] == [("x", 16, 4), ("y", 0, 12)]


def test_max_num_seqs():
    e = SimulatedEngine(max_num_seqs=3, num_pages=256)
    for i in range(7):
        e.add(endless(str(i), prompt(4), 5))
    e.step()
    assert e.scheduler.num_running == 3 and e.scheduler.num_waiting == 4
    e.run()


def test_lower_priority_value_first_then_arrival():
    e = SimulatedEngine(max_num_seqs=1, budget=64)
    order = []
    for i, priority in enumerate([1, 0, 1, 0, -1]):
        e.add(make_request(str(i), prompt(4), 1, priority=priority))
    while e.live:
        order += [s.request.id for s in e.step().spans]
    assert order == ["4", "1", "3", "0", "2"]


def test_admission_leaves_a_page_for_each_running_request():
    e = SimulatedEngine(num_pages=8, page_size=4, budget=64)
    for i in range(4):
        e.add(endless(str(i), prompt(8, i), 2))
    e.step()
    assert e.scheduler.num_running == 3 and e.scheduler.pages.num_free == 2
    e.run()


def test_a_request_that_blocks_on_pages_is_not_overtaken():
    e = SimulatedEngine(num_pages=8, page_size=4, budget=64)
    e.add(endless("first", prompt(16), 9))
    e.add(endless("big", prompt(24, 2), 2))
    e.add(endless("small", prompt(2, 3), 2))
    assert [s.request.id for s in e.step().spans] == ["first"]
    e.run()
    assert list(e.done)[:2] == ["first", "big"]


def test_preemption_takes_the_latest_and_it_comes_back_first():
    e = SimulatedEngine(num_pages=8, page_size=4, budget=64, prefix_caching=False)
    a, b = [e.add(endless(id, prompt(11, first), 20)) for id, first in (("a", 1), ("b", 3))]
    preempted = []
    while not preempted:
        preempted = e.step().preempted
    assert preempted == [b] and b.num_preemptions == 1 and b.pages == [] and b.num_output > 1
    e.add(endless("late", prompt(2), 2))
    known = len(b.tokens)
    while not b.pages:
        batch = e.step()
    assert a.finish_reason is not None
    (span, late) = batch.spans
    assert span.request is b and (span.start, span.length, span.phase) == (0, known, Phase.PREFILL)
    assert late.request.id == "late"
    e.run()
    assert e.scheduler.num_preemptions == 1


def test_a_preempted_request_comes_before_tenants_with_less_service():
    e = SimulatedEngine(num_pages=10, page_size=4, budget=64, prefix_caching=False)
    e.add(endless("a", prompt(11), 26))
    b = e.add(endless("b", prompt(11, 3), 26))
    while not e.scheduler.num_preemptions:
        e.step()
    other = e.add(endless("other tenant", prompt(2), 2, A))
    while not b.pages:
        assert not other.pages
        e.step()
    assert e.scheduler.residency.num_used == 1
    e.run()


def test_a_prefill_under_way_may_be_preempted_for_decodes():
    e = SimulatedEngine(num_pages=12, page_size=4, budget=2, max_num_seqs=2)
    e.add(endless("decoding", prompt(4), 40))
    for _ in range(3):
        e.step()
    late = e.add(endless("prefilling", prompt(28, 2), 3))
    preempted = []
    while not preempted:
        computed = late.num_computed
        preempted = e.step().preempted
    assert preempted == [late] and 0 < computed < 28
    e.run()


def test_preemption_spares_better_priorities():
    e = SimulatedEngine(num_pages=8, page_size=4, budget=64)
    worse = e.add(endless("worse", prompt(11), 20, priority=1))
    e.step()
    e.add(endless("better", prompt(11, 2), 20, priority=0))
    preempted = []
    while not preempted:
        preempted = e.step().preempted
    assert preempted == [worse]
    e.run()


def test_a_preempted_request_reuses_its_cached_pages():
    e = SimulatedEngine(num_pages=10, page_size=4, budget=64)
    e.add(endless("a", prompt(11), 28))
    b = e.add(endless("b", prompt(11, 3), 28))
    while not e.scheduler.num_preemptions:
        e.step()
    e.abort("a")
    span = e.step().spans[0]
    assert span.request is b and span.start > 0 and b.num_cached == 0, "only the first admission counts as cached"
    e.run()


def test_prefix_hit_skips_work():
    e = SimulatedEngine(budget=64)
    e.add(make_request("first", prompt(14), 1))
    e.run()
    r = e.add(make_request("second", prompt(14), 1))
    assert spans(e.step()) == [("second", 12, 2, Phase.PREFILL)]
    assert r.num_cached == 12 and e.scheduler.pages.num_hits == 12


def test_spans_are_grouped_by_slot_with_the_bare_ones_last():
    e = SimulatedEngine(max_slots=3, num_pages=256, max_num_seqs=16, budget=128)
    for i, adapter in enumerate([None, A, B, None, A, P, B, P, None]):
        e.add(endless(str(i), prompt(5, i), 9, adapter))
    for _ in range(3):
        e.step()
    batch = e.scheduler.schedule()
    keys = [s.slot for s in batch.spans]
    assert {s.phase for s in batch.spans} == {Phase.DECODE}
    assert len(set(keys)) == 3 and keys.index(None) == len(keys) - keys.count(None)
    assert all(s.slot is None for s in batch.spans if s.request.adapter in (P, None))


def test_decoding_prefill_scoped_requests_hold_no_slot():
    """More adapters decode at once than there are slots."""
    e = SimulatedEngine(max_slots=1, num_pages=256, max_num_seqs=16, budget=128)
    refs = [AdapterRef(f"p{i}", 20 + i, 10, Scope.PREFILL) for i in range(6)]
    for i, ref in enumerate(refs):
        e.add(endless(str(i), prompt(5, i), 200, ref))
    for _ in range(14):
        batch = e.step()
    running = [s.request for s in batch.spans if s.phase is Phase.DECODE]
    assert len({r.adapter.name for r in running}) > 1
    e.run()


def test_a_preempted_prefill_scoped_request_needs_its_adapter_again():
    e = SimulatedEngine(max_slots=1, num_pages=8, page_size=4, budget=64, prefix_caching=False)
    e.add(endless("a", prompt(11), 20, P))
    b = e.add(endless("b", prompt(11, 3), 20, P))
    while not e.scheduler.num_preemptions:
        e.step()
    assert b.slot is None and e.scheduler.waiting_adapters == ("p",)
    e.abort("a")
    e.step()
    assert b.slot is None and b.num_computed >= b.prompt_len
    e.run()


def test_no_head_of_line_blocking_by_a_missing_adapter():
    e = SimulatedEngine(max_slots=1, latency=lambda ref: 5)
    e.add(make_request("a", prompt(5), 3, A))
    base = e.add(make_request("base", prompt(5, 3), 3))
    batch = e.step()
    assert [m.ref for m in batch.loads] == [A] and [s.request for s in batch.spans] == [base]
    e.run()


def test_adapters_of_waiting_requests_are_fetched_while_no_seat_is_free():
    e = SimulatedEngine(max_num_seqs=1, max_slots=2, budget=64)
    e.add(endless("base", prompt(5), 8))
    e.step()
    e.add(endless("a", prompt(5), 3, A))
    assert [m.ref for m in e.step().loads] == [A]
    e.add(endless("b", prompt(5), 3, B))
    assert [m.ref for m in e.step().loads] == [B]
    e.add(endless("c", prompt(5), 3, C))
    assert e.step().loads == [], "fetched adapters stay until their requests have run"
    e.run()


def test_a_smaller_adapter_passes_one_that_does_not_fit_yet():
    big, small = AdapterRef("big", 31, 60), AdapterRef("small", 32, 30)
    e = SimulatedEngine(max_slots=4, max_bytes=100)
    e.add(endless("a", prompt(4), 20, AdapterRef("running", 30, 50)))
    e.step()
    e.step()
    e.add(endless("b", prompt(4), 2, big))
    e.add(endless("c", prompt(4), 2, small))
    assert [m.ref for m in e.step().loads] == [small]
    e.run()


def test_failed_adapters_take_their_waiting_requests_along():
    e = SimulatedEngine(corrupt=lambda ref: ref is A)
    a, b = e.add(make_request("a", prompt(5), 3, A)), e.add(make_request("b", prompt(5), 3, B))
    e.run()
    assert a.finish_reason is FinishReason.ERROR and b.finish_reason is not FinishReason.ERROR


def test_versions_of_a_name_live_side_by_side():
    e = SimulatedEngine(num_pages=256, budget=128)
    v1, v2 = AdapterRef("a", 41, 10), AdapterRef("a", 42, 10)
    for i in range(8):
        e.add(make_request(str(i), prompt(5), 6, v1 if i < 4 else v2))
    e.step()
    e.step()
    assert e.scheduler.running_adapters == ("a",) and e.scheduler.num_running == 8
    e.run()


def test_abort_wherever_it_is():
    e = SimulatedEngine(max_num_seqs=1)
    e.add(endless("running", prompt(5), 9))
    e.add(endless("waiting", prompt(5), 9, A))
    e.step()
    e.abort("waiting")
    e.step(between=lambda batch: e.abort("running"))
    assert e.scheduler.abort("nobody") is None
    e.check_empty()
    assert e.done["running"].num_output == 1


def test_a_failed_step_is_planned_again():
    e = SimulatedEngine()
    for id in "xyz":
        e.add(make_request(id, prompt(5, ord(id)), 4))
    e.step(fail=True)
    assert {id for id, r in e.done.items() if r.finish_reason is FinishReason.ERROR} == {"x", "z"}
    assert spans(e.step()) == [("y", 0, 5, Phase.PREFILL)]
    e.run()


def test_a_request_whose_sampling_failed_is_just_finished():
    e = SimulatedEngine()
    r = make_request("r", prompt(5), 4)
    e.scheduler.add(r)
    e.scheduler.commit(e.scheduler.schedule(), {})
    e.scheduler.finish(r, FinishReason.ERROR)
    e.check_empty()


def test_spans_without_adapted_positions_have_no_slot():
    e = SimulatedEngine(budget=6, max_num_seqs=1, prefix_caching=False)
    tokens = prompt(14)
    late = AdapterRef("late", 60, 10, region=FromInvocation(tuple(tokens[8:10])))
    r = Request("r", tokens, SamplingParams(ignore_eos=True), max_len=16, adapter=late)
    assert r.adapted == ((8, 16),)
    e.scheduler.add(r)
    e.scheduler.residency.loaded(e.scheduler.schedule().loads[0].ref.uid)
    seen = []
    for token in (None, None, 5, 5):
        batch = e.scheduler.schedule()
        seen += [(s.start, s.length, s.slot) for s in batch.spans]
        e.scheduler.commit(batch, {"r": token} if token else {})
        if len(r.tokens) < r.max_len:
            e.scheduler.check_integrity()
    slot = r.slot
    assert slot is not None
    assert seen == [(0, 6, None), (6, 6, slot), (12, 2, slot), (14, 1, slot)]


def test_an_activated_lora_that_is_not_invoked_needs_no_load():
    """Not even one that never comes, nor a device without slots; its requests still count as its tenant's."""
    activated = AdapterRef("activated", 61, 101, region=FromInvocation((7, 7)))
    e = SimulatedEngine(max_slots=0, max_bytes=100, num_pages=8, page_size=4, budget=64, prefix_caching=False)
    for id, first in (("a", 1), ("b", 3)):
        r = e.add(endless(id, prompt(11, first), 20, activated))
        assert not r.adapted and e.scheduler.waiting_adapters == ("activated",)
    batch = e.step()
    assert not batch.loads and [s.slot for s in batch.spans] == [None, None]
    assert e.scheduler.running_adapters == ("activated",) and not e.scheduler.residency.missing
    e.run()
    assert e.scheduler.num_preemptions > 0
    with pytest.raises(CapacityExceeded, match="max-loras 0"):
        e.add(make_request("c", [1, 7, 7], 4, activated))


def test_refusals():
    e = SimulatedEngine(num_pages=8, page_size=4, max_bytes=100)
    with pytest.raises(CapacityExceeded, match=r"33 tokens.*8 pages of 4 = 32 tokens"):
        e.add(make_request("r", prompt(30), 3))
    with pytest.raises(CapacityExceeded, match="needs 101 bytes"):
        e.add(make_request("r", prompt(3), 3, AdapterRef("fat", 50, 101)))
    e.add(make_request("r", prompt(29), 3))
    with pytest.raises(InvalidRequest, match="'r' is in use"):
        e.add(make_request("r", prompt(3), 3))
    e.run()
    for config in (SchedulerConfig(max_num_seqs=0), SchedulerConfig(max_num_seqs=9, max_num_batched_tokens=8)):
        with pytest.raises(InvalidRequest, match="at least"):
            Scheduler(config, PagePool(4, 4), Residency(1, 1))
