"""Random lives of the scheduler: at each step, every position read holds the KV of the reading request."""

from __future__ import annotations

import hashlib
import os
import random
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from multigraft.core.errors import CapacityExceeded
from multigraft.core.region import FromInvocation, PromptEnds
from multigraft.core.request import AdapterRef, FinishReason, Request, Scope
from tests.scheduling.simulated_engine import SimulatedEngine, make_request

ADAPTERS = [
    None,
    AdapterRef("a", 1, 10),
    AdapterRef("b", 2, 40),
    AdapterRef("c", 3, 70),
    AdapterRef("p", 4, 10, Scope.PREFILL),
    AdapterRef("q", 5, 40, Scope.PREFILL),
    AdapterRef("a", 6, 10),
    AdapterRef("p", 7, 10, Scope.PREFILL),
    AdapterRef("b", 2, 40, Scope.PREFILL),  # the same weights as "b" under another scope
    AdapterRef("ends", 10, 10, Scope.PREFILL, PromptEnds(2, 3)),
    AdapterRef("last", 11, 10, Scope.ALL, PromptEnds(0, 2)),
    AdapterRef("activated", 12, 10, Scope.ALL, FromInvocation((1,))),
    AdapterRef("invoked", 13, 10, Scope.ALL, FromInvocation((1, 2))),
    AdapterRef("broken", 8, 20),
    AdapterRef("too big", 9, 101),
]


def is_broken(ref: AdapterRef) -> bool:
    return ref.name == "broken"


def slowly(ref: AdapterRef) -> int:
    return ref.uid * 3 % 5


class Lives(RuleBasedStateMachine):
    """Hypothesis looks for the shortest sequence of events that breaks an assertion of SimulatedEngine."""

    @initialize(
        num_pages=st.integers(4, 40),
        page_size=st.sampled_from([1, 2, 4]),
        max_slots=st.integers(1, 3),
        max_num_seqs=st.integers(1, 6),
        spare=st.integers(0, 20),
        fairness=st.booleans(),
        prefix_caching=st.booleans(),
    )
    def start(self, num_pages, page_size, max_slots, max_num_seqs, spare, fairness, prefix_caching):
        self.engine = SimulatedEngine(
            num_pages=num_pages,
            page_size=page_size,
            max_slots=max_slots,
            max_num_seqs=max_num_seqs,
            budget=max_num_seqs + spare,
            fairness=fairness,
            prefix_caching=prefix_caching,
            latency=slowly,
            corrupt=is_broken,
        )
        self.num = 0

    def add(self, prompt: list[int], new: int, adapter: AdapterRef | None, priority: int = 0, **sampling: int) -> None:
        self.num += 1
        request = make_request(str(self.num), prompt, new, adapter, priority, **sampling)
        pool = self.engine.scheduler.pages
        hopeless = request.max_len > pool.num_pages * pool.page_size or (adapter and adapter.nbytes > 100)
        try:
            self.engine.add(request)
            assert not hopeless
        except CapacityExceeded:
            assert hopeless

    @rule(
        prompt=st.lists(st.integers(1, 2), min_size=1, max_size=12),
        new=st.integers(1, 12),
        adapter=st.sampled_from(ADAPTERS),
        priority=st.sampled_from([0, 0, 0, 1, -1]),
        logprobs=st.booleans(),
    )
    def arrive(self, prompt, new, adapter, priority, logprobs):
        self.add(prompt, new, adapter, priority, **({"prompt_logprobs": 0} if logprobs else {}))

    @rule(adapter=st.sampled_from(ADAPTERS[:13]), length=st.integers(1, 30), copies=st.integers(1, 4))
    def arrive_with_a_common_prefix(self, adapter, length, copies):
        for _ in range(copies):
            self.add([1] * length, 8, adapter)

    @rule(pick=st.integers(0, 100), more=st.lists(st.integers(1, 2), max_size=3), other=st.sampled_from(ADAPTERS[:13]))
    def next_turn(self, pick, more, other):
        """A prompt that continues an earlier conversation, mostly with the same adapter."""
        known = [*self.engine.done.values(), *self.engine.live.values()]
        if known:
            earlier = known[pick % len(known)]
            self.add([*earlier.tokens, *more], 4, other if pick % 4 == 0 else earlier.adapter)

    @precondition(lambda self: self.engine.live)
    @rule(pick=st.integers(0, 100))
    def abort(self, pick):
        self.engine.abort(list(self.engine.live)[pick % len(self.engine.live)])

    @rule(times=st.integers(1, 6))
    def steps(self, times):
        for _ in range(times):
            self.engine.step()

    @rule(pick=st.integers(0, 100))
    def step_with_an_abort_inside(self, pick):
        def between(batch):
            if batch.spans:
                self.engine.abort(batch.spans[pick % len(batch.spans)].request.id)

        self.engine.step(between)

    @rule()
    def failing_step(self):
        self.engine.step(fail=True)

    @invariant()
    def is_consistent(self):
        if hasattr(self, "engine"):
            self.engine.scheduler.check_integrity()

    def teardown(self):
        if hasattr(self, "engine"):
            self.engine.run(max_steps=3_000)


TestLives = Lives.TestCase
TestLives.settings = settings(
    max_examples=120, stateful_step_count=40, deadline=None, suppress_health_check=list(HealthCheck)
)


def soak(seed: int, num_requests: int = 300) -> SimulatedEngine:
    """Conversations of several turns under tiny pools, with everything that can go wrong going wrong."""
    rng = random.Random(seed)
    page_size = rng.choice([1, 2, 4, 8])
    e = SimulatedEngine(
        num_pages=rng.randint(40, 160) // page_size + 4,
        page_size=page_size,
        max_slots=rng.randint(1, 3),
        max_num_seqs=rng.choice([2, 5, 12]),
        budget=rng.choice([12, 20, 48]),
        fairness=rng.random() < 0.7,
        prefix_caching=rng.random() < 0.8,
        latency=lambda ref: rng.randint(0, 6),
        corrupt=lambda ref: is_broken(ref) or rng.random() < 0.05,
    )
    systems = [[rng.randint(1, 3) for _ in range(rng.randint(0, 12))] for _ in range(4)]
    capacity = e.scheduler.pages.num_pages * page_size
    for i in range(num_requests):
        prompt = [*rng.choice(systems), *(rng.randint(1, 3) for _ in range(rng.randint(1, 10)))]
        adapter = rng.choice(ADAPTERS[:14])
        if e.done and rng.random() < 0.4:
            earlier = rng.choice(list(e.done.values()))
            prompt = [*earlier.tokens, *prompt[-2:]]
            adapter = earlier.adapter if rng.random() < 0.8 else adapter
        new, priority = rng.randint(1, 30), rng.choice([0, 0, 0, 0, 1])
        if len(prompt) + new <= capacity:
            e.add(make_request(str(i), prompt, new, adapter, priority, ignore_eos=rng.random() < 0.5))
        if e.live and rng.random() < 0.08:
            e.abort(rng.choice(list(e.live)))
        for _ in range(rng.choice([0, 0, 1, 2, 8])):
            e.step(fail=rng.random() < 0.02)
    e.run()
    return e


def check_ends(e: SimulatedEngine) -> None:
    assert sum(r.finish_reason in (FinishReason.STOP, FinishReason.LENGTH) for r in e.done.values()) > 100


@pytest.mark.parametrize("seed", range(8, 24))
def test_soak(seed):
    check_ends(soak(seed))


def test_soaks_cover_what_they_should():
    """Preemptions, hits, hits after preemption, chunks and multiple evictions do happen in the soaks."""
    engines = [soak(seed) for seed in range(8)]
    for e in engines:
        check_ends(e)
    assert sum(e.scheduler.num_preemptions for e in engines) > 100
    assert sum(e.scheduler.pages.num_hits for e in engines) > 1000
    assert any(len(empties) > 1 for e in engines for _, loads, _ in e.trace for *_, empties in loads)
    assert any(
        r.num_preemptions and r.adapter is not None and r.adapter.scope is Scope.PREFILL
        for e in engines
        for r in e.done.values()
    )


def digest(seed: int) -> str:
    return hashlib.sha256(repr(soak(seed, 120).trace).encode()).hexdigest()


def test_same_inputs_same_decisions():
    """In this process and in another, whatever their hash seeds: this one's is random."""
    root = Path(__file__).parents[2]
    code = "from tests.scheduling.test_random import digest; print(digest(5))"
    env = os.environ | {"PYTHONHASHSEED": "1", "PYTHONPATH": str(root)}
    run = subprocess.run([sys.executable, "-c", code], cwd=root, env=env, capture_output=True, text=True, check=True)
    assert run.stdout.strip() == digest(5)


@pytest.mark.parametrize("scope", list(Scope))
def test_a_pool_of_one_request_at_a_time(scope):
    """Every request may take the whole pool: constant preemption and eviction, and still all finish."""
    e = SimulatedEngine(num_pages=4, page_size=4, max_slots=1, max_num_seqs=4, budget=8)
    refs = [AdapterRef(str(uid), uid, 60, scope) for uid in (1, 2, 3)]
    requests: list[Request] = []
    for i in range(30):
        requests.append(e.add(make_request(str(i), [1 + i % 3] * (1 + i % 8), 8, refs[i % 3])))
    e.run()
    assert all(r.finish_reason in (FinishReason.STOP, FinishReason.LENGTH) for r in requests)
