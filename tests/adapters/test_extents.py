"""Free room: against a plain list of units."""

import random

from multigraft.adapters.extents import Extents


def test_first_fit_and_merging():
    rng, size = random.Random(0), 60
    extents, used, taken = Extents(size), [False] * size, []
    refusals = 0
    for _ in range(3000):
        if taken and rng.random() < 0.5:
            start, count = taken.pop(rng.randrange(len(taken)))
            extents.give(start, count)
            used[start : start + count] = [False] * count
        else:
            count = rng.randint(1, 20)
            want = next((i for i in range(size - count + 1) if not any(used[i : i + count])), None)
            assert extents.take(count) == want
            if want is None:
                refusals += 1
            else:
                taken.append((want, count))
                used[want : want + count] = [True] * count
        holes = [i for start, stop in extents.holes for i in range(start, stop)]
        assert holes == [i for i, is_used in enumerate(used) if not is_used] and extents.free == len(holes)
        assert all(a[1] < b[0] for a, b in zip(extents.holes, extents.holes[1:], strict=False)), "not merged"
    assert refusals > 100
