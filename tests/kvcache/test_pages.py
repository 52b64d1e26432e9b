"""The page pool's rules, one by one. Whether pages hold the right KV in use is tested in tests/scheduling."""

from __future__ import annotations

import pytest

from multigraft.core.region import FromInvocation, PromptEnds
from multigraft.core.request import AdapterRef, Request, SamplingParams, Scope
from multigraft.kvcache.pages import PagePool

SIZE = 4
ALL = AdapterRef("a", 1, 10)
ALORA = AdapterRef("i", 3, 10, region=FromInvocation((7,)))
PREFILL = AdapterRef("p", 2, 10, Scope.PREFILL)


def request(tokens, adapter=None, prompt_len=None, **sampling) -> Request:
    """A request whose tokens past prompt_len are generated ones."""
    prompt_len = len(tokens) if prompt_len is None else prompt_len
    r = Request("r", tokens[:prompt_len], SamplingParams(**sampling), max_len=100, adapter=adapter)
    r.tokens += tokens[prompt_len:]
    return r


def compute(pool: PagePool, r: Request, num_tokens: int | None = None) -> Request:
    """Allocate if need be, run up to num_tokens and publish."""
    if not r.pages:
        assert pool.allocate(r)
    r.num_computed = len(r.tokens) if num_tokens is None else num_tokens
    pool.publish(r)
    return r


@pytest.fixture
def pool():
    return PagePool(8, SIZE)


def test_pages_cover_the_tokens_and_come_back(pool):
    r = request(range(9))
    assert pool.allocate(r)
    assert len(set(r.pages)) == 3 and pool.num_free == 5 and pool.usage == pytest.approx(3 / 8)
    assert pool.extend(r, 12) and len(r.pages) == 3
    assert pool.extend(r, 13) and len(r.pages) == 4
    pool.check_integrity([r])
    pool.free(r)
    assert pool.num_free == 8 and r.pages == [] and r.num_computed == 0
    pool.check_integrity([])


def test_shortage_changes_nothing(pool):
    a, b = request(range(24)), request(range(100, 112))
    assert pool.allocate(a)
    assert not pool.allocate(b)
    assert not pool.extend(a, 36)
    assert b.pages == [] and len(a.pages) == 6 and pool.num_free == 2
    assert not pool.allocate(request([1]), reserve=2) and pool.allocate(request([1]), reserve=1)


def test_a_prefix_is_found_once_computed(pool):
    a = request(range(12))
    pool.allocate(a)
    assert pool.match(request(range(12))) == []
    compute(pool, a, 7)
    assert pool.match(request(range(12))) == a.pages[:1]
    compute(pool, a, 12)
    b = request([*range(12), 50])
    assert pool.match(b) == a.pages
    assert pool.allocate(b) and b.pages[:3] == a.pages and b.num_computed == 12
    pool.check_integrity([a, b])


def test_one_token_is_always_left_to_compute(pool):
    a = compute(pool, request(range(8)))
    assert pool.match(request(range(8))) == a.pages[:1]
    assert pool.match(request(range(4))) == []
    assert pool.match(request(range(5))) == a.pages[:1]


def test_an_equal_page_after_another_prefix_is_another_page(pool):
    compute(pool, request([1, 1, 1, 1, 7, 7, 7, 7]))
    assert pool.match(request([2, 2, 2, 2, 7, 7, 7, 7, 0])) == []
    assert pool.match(request([7, 7, 7, 7, 0])) == []


def test_equal_hashes_do_not_make_equal_tokens(pool):
    assert hash((-1,)) == hash((-2,))  # CPython hashes -1 as -2
    compute(pool, request([-1] * 4))
    assert pool.match(request([-2] * 4 + [0])) == []


@pytest.mark.parametrize("other", [None, AdapterRef("a", 3, 10), AdapterRef("a", 1, 10, Scope.PREFILL)])
def test_namespaces_are_apart(pool, other):
    compute(pool, request(range(8), ALL))
    assert pool.match(request(range(9), other)) == []
    assert len(pool.match(request(range(9), ALL))) == 2


def test_generated_tokens_are_prompt_for_base_and_full_scope(pool):
    for adapter in (None, ALL):
        r = compute(pool, request(range(12), adapter, prompt_len=5))
        assert pool.match(request(range(13), adapter)) == r.pages


def test_generated_tokens_are_not_prompt_under_prefill_scope(pool):
    turn1 = compute(pool, request(range(12), PREFILL, prompt_len=6))
    assert pool.match(request(range(13), PREFILL)) == turn1.pages[:1]


def test_generated_tokens_do_not_read_prompt_pages_under_prefill_scope(pool):
    """A preempted request replays its output unadapted, though a longer prompt has the same tokens adapted."""
    prompt = compute(pool, request(range(12), PREFILL))
    replay = request(range(12), PREFILL, prompt_len=4)
    assert pool.match(replay) == prompt.pages[:1]


def test_pages_before_an_invocation_are_the_base_models(pool):
    base = compute(pool, request([1, 2, 3, 4, 5, 6]))
    turn = request([1, 2, 3, 4, 5, 7, 8, 9, 10], ALORA)
    assert pool.match(turn) == base.pages[:1]
    compute(pool, turn)
    assert pool.match(request([1, 2, 3, 4, 5, 7, 8, 9, 0], ALORA)) == turn.pages[:2]
    assert pool.match(request([1, 2, 3, 4, 5, 7, 8, 9, 0])) == base.pages[:1]
    assert pool.match(request([1, 2, 3, 4, 5, 7, 8, 9, 7], ALORA)) == base.pages[:1], "invoked later: base until there"


def test_a_generated_invocation_is_one_only_in_the_next_prompt(pool):
    """The same tokens in the same page, adapted from 1 on while they were generated and from 3 on in the next turn."""
    compute(pool, request([1, 7, 2, 7, 3], ALORA, prompt_len=3))
    assert pool.match(request([1, 7, 2, 7, 3], ALORA)) == []


def test_prompt_ends_share_what_comes_before_the_last_tokens(pool):
    both = AdapterRef("e", 4, 10, region=PromptEnds(1, 2))
    turn = compute(pool, request(range(14), both, prompt_len=10))
    assert pool.match(request(range(15), both)) == turn.pages[:2]
    assert pool.match(request(range(9), both)) == turn.pages[:1], "7 and 8 are the last here"
    last = AdapterRef("l", 5, 10, region=PromptEnds(0, 2))
    base = compute(pool, request(range(12)))
    assert pool.match(request(range(15), last)) == base.pages[:3]
    assert pool.match(request(range(9), last)) == base.pages[:1]


def test_requests_for_prompt_logprobs_skip_nothing(pool):
    compute(pool, request(range(8)))
    r = request(range(9), prompt_logprobs=1)
    assert pool.match(r) == [] and pool.allocate(r)
    assert pool.num_queries == 8


def test_counters_are_tokens(pool):
    pool.free(compute(pool, request(range(8))))
    pool.free(compute(pool, request(range(9))))
    assert (pool.num_queries, pool.num_hits) == (17, 8)


def test_caching_can_be_off():
    pool = PagePool(8, SIZE, enable_prefix_caching=False)
    compute(pool, request(range(8)))
    assert pool.match(request(range(9))) == [] and pool.num_queries == 0


def test_freed_prefixes_stay_until_needed_and_the_oldest_goes_first(pool):
    old, new = [compute(pool, request([x] * 8)) for x in (1, 2)]
    pool.free(old)
    pool.free(new)
    assert pool.num_free == 8 and pool.usage == 0
    assert pool.allocate(request([3] * 4 * 5))  # 4 blank pages and one cached
    assert len(pool.match(request([1] * 9))) == 1, "the tail goes before the head"
    assert len(pool.match(request([2] * 9))) == 2
    assert pool.allocate(request([4] * 8))
    assert pool.match(request([1] * 9)) == [] and len(pool.match(request([2] * 9))) == 1
    pool.check_integrity()


def test_use_makes_a_prefix_young(pool):
    a, b = [compute(pool, request([x] * 8)) for x in (1, 2)]
    pool.free(a)
    pool.free(b)
    again = request([1] * 9)
    pool.allocate(again)
    pool.free(again)
    pool.allocate(request([3] * 4 * 5))
    assert len(pool.match(request([1] * 9))) == 2 and len(pool.match(request([2] * 9))) == 1


def test_matched_pages_are_not_counted_as_room(pool):
    pool.free(compute(pool, request(range(32))))
    hit = request([*range(28), 50, 51, 52, 53, 54])  # 7 cached pages and 2 fresh, of 8
    assert not pool.allocate(hit)
    assert hit.pages == []
    pool.check_integrity([])


def test_a_prefix_computed_twice_at_a_time_is_indexed_once(pool):
    a, b = request([5] * 12), request([5] * 12)
    pool.allocate(a)
    pool.allocate(b)
    compute(pool, a, 8)
    compute(pool, b, 12)
    assert pool.match(request([5] * 13)) == [*a.pages[:2], b.pages[2]]
    pool.check_integrity([a, b])
    pool.free(a)
    pool.free(b)
    pool.check_integrity([])
    assert len(pool.match(request([5] * 13))) == 3


def test_an_evicted_parent_hides_its_children(pool):
    """The index entry of a page names its parent's entry, which never comes back under the same id."""
    a, b = request([5] * 12), request([5] * 12)
    pool.allocate(a)
    pool.allocate(b)
    compute(pool, a, 4)
    compute(pool, b, 12)
    pool.free(a)
    filler = request([6] * 20)
    assert pool.allocate(filler)
    assert pool.match(request([5] * 13)) == []
    pool.check_integrity([b, filler])


def test_integrity_notices_a_leak(pool):
    r = request(range(8))
    pool.allocate(r)
    with pytest.raises(AssertionError):
        pool.check_integrity([])
    r.pages.pop()
    with pytest.raises(AssertionError):
        pool.check_integrity([r])
