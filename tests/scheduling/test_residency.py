from __future__ import annotations

import pytest

from multigraft.core.errors import CapacityExceeded
from multigraft.core.request import AdapterRef
from multigraft.scheduling.residency import AdapterState, Residency


def ref(uid: int, nbytes: int = 10) -> AdapterRef:
    return AdapterRef(f"adapter-{uid}", uid, nbytes)


def bring(residency: Residency, adapter: AdapterRef):
    """Load an adapter to the end."""
    move = residency.load(adapter)
    residency.loaded(adapter.uid)
    residency.check_integrity()
    return move


def anyone(uid: int) -> bool:
    return True


def test_states():
    r = Residency(2, 100)
    assert r.state(1) is AdapterState.ABSENT
    move = r.load(ref(1))
    assert r.state(1) is AdapterState.LOADING and r.open() == [] and r.num_used == 1
    r.loaded(1)
    assert r.state(1) is AdapterState.READY and r.open() == [1]
    assert r.pin(1) == move.slot
    r.check_pins({1: 1})


def test_a_failed_load_leaves_nothing():
    r = Residency(1, 100)
    r.load(ref(1))
    r.failed(1)
    assert r.state(1) is AdapterState.ABSENT and r.num_used == 0 and r.free_bytes == 100
    r.check_integrity()


def test_least_recently_used_leaves():
    r = Residency(2, 100)
    slots = {uid: bring(r, ref(uid)).slot for uid in (1, 2)}
    r.pin(1)
    r.unpin(1)
    move = r.load(ref(3))
    assert move.empties == (slots[2],) and move.slot == slots[2]
    assert r.state(2) is AdapterState.ABSENT and r.state(1) is AdapterState.READY


@pytest.mark.parametrize("busy", ["loading", "pinned", "wanted"])
def test_who_is_busy_stays(busy):
    r = Residency(1, 100)
    r.load(ref(1))
    if busy != "loading":
        r.loaded(1)
        r.pin(1) if busy == "pinned" else r.want(1)
    assert not r.fits(10)
    if busy == "pinned":
        r.unpin(1)
    elif busy == "wanted":
        r.unwant(1)
    else:
        r.loaded(1)
    assert r.fits(10)
    r.check_integrity()


def test_bytes_count_exactly():
    r = Residency(4, 100)
    slots = {uid: bring(r, ref(uid, 30)).slot for uid in (1, 2, 3)}
    r.pin(2)
    assert not r.fits(71) and r.fits(70)
    move = r.load(ref(4, 70))
    assert set(move.empties) == {slots[1], slots[3]} and r.free_bytes == 0
    r.check_integrity()


def test_no_more_leave_than_must():
    r = Residency(4, 100)
    slots = {uid: bring(r, ref(uid, 30)).slot for uid in (1, 2, 3)}
    assert r.load(ref(4, 40)).empties == (slots[1],)
    r = Residency(4, 100)
    bring(r, ref(1, 30))
    assert r.load(ref(2, 70)).empties == ()


def test_an_adapter_that_could_never_fit_is_refused_with_the_arithmetic():
    with pytest.raises(CapacityExceeded, match=r"120 bytes.*100: 20 too few"):
        Residency(2, 100).check(ref(1, 120))
    with pytest.raises(CapacityExceeded, match="--max-loras 0"):
        Residency(0, 100).check(ref(1))
    Residency(1, 100).check(ref(1, 100))


def test_missing_counts_pins_of_others():
    r = Residency(1, 100)
    bring(r, ref(1))
    r.want(2)
    for _ in range(3):
        assert r.overdue(3) == []
        r.pin(1)
    r.want(3)
    assert r.overdue(3) == [2] and list(r.missing) == [2, 3]
    r.unwant(2)
    assert list(r.missing) == [3]
    r.check_integrity()


def test_an_adapter_evicted_while_wanted_is_missing():
    r = Residency(1, 100)
    bring(r, ref(1))
    r.want(1)
    r.make_way(10, anyone)
    r.load(ref(2))
    assert list(r.missing) == [1]


def test_make_way_closes_the_longest_resident():
    r = Residency(2, 100)
    for uid in (1, 2):
        bring(r, ref(uid))
        r.pin(uid)
    r.make_way(10, anyone)
    r.make_way(10, anyone)  # asked again at each step: no further adapter closes
    assert r.open() == [2] and not r.fits(10)
    r.want(1)
    r.unpin(1)
    assert r.fits(10), "wanted or not, it leaves"
    r.check_integrity()
    r.reopen()
    assert r.open() == [1, 2] and not r.fits(10), "it is wanted, and no longer leaving"
    r.check_integrity()


def test_make_way_closes_as_many_as_the_bytes_take():
    r = Residency(4, 100)
    for uid in (1, 2, 3):
        bring(r, ref(uid, 30))
        r.pin(uid)
    r.make_way(60, anyone)
    assert r.open() == [3]
    r.unpin(1)
    r.make_way(60, anyone)
    assert r.open() == [3], "the idle one still counts"
    r.unpin(2)
    r.load(ref(4, 60))
    r.check_integrity()


def test_an_adapter_is_fresh_until_it_is_used():
    r = Residency(1, 100)
    assert not r.fresh(1) and not r.can_close()
    bring(r, ref(1))
    assert r.fresh(1) and not r.can_close()
    r.pin(1)
    assert not r.fresh(1) and r.can_close()
    r.make_way(10, anyone)
    assert not r.can_close(), "one is about to leave"
    r.unpin(1)
    r.load(ref(2))
    assert not r.fresh(1)


def test_make_way_asks_first():
    r = Residency(2, 100)
    for uid in (1, 2):
        bring(r, ref(uid))
        r.pin(uid)
    r.make_way(10, lambda uid: uid != 1)
    assert r.open() == [1]
