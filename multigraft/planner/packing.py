"""Our placement: the fewest GPUs, the most even load on a given number, few moves when demand drifts."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np

from .placement import ROUNDING, Array, Loads, Placement, check_possible, fits, fullness

MIN_SHARE = 1 / 32
"""No adapter is cut into smaller parts, unless its demand alone fills as many GPUs."""
TRIES = 5_000
"""Looks for room in one search of exchanges, about 40 us each."""

Piece = tuple[int, float]
"""A demand by index, and a share of it."""


class Bins:
    """GPUs being filled."""

    def __init__(self, loads: Loads, num_gpus: int):
        modes, resources, _ = loads.uses([0], [1.0]).shape
        self.loads = loads
        self.sums: Array = np.zeros((modes, resources, num_gpus))
        self.held: list[dict[int, float]] = [{} for _ in range(num_gpus)]
        self._known: dict[Piece, Array] = {}

    def use(self, piece: Piece) -> Array:
        use = self._known.get(piece)
        if use is None:
            use = self._known[piece] = self.loads.uses([piece[0]], [piece[1]])[..., 0]
        return use

    def size(self, piece: Piece) -> float:
        return float(fullness(self.use(piece)))

    def but(self, gpu: int) -> Bins:
        """A copy without one GPU and what it holds."""
        fewer = Bins(self.loads, len(self.held) - 1)
        fewer.sums = np.delete(self.sums, gpu, axis=2)
        fewer.held = [dict(held) for g, held in enumerate(self.held) if g != gpu]
        fewer._known = self._known
        return fewer

    def grow(self, num_gpus: int) -> None:
        """Add empty GPUs."""
        self.sums = np.concatenate([self.sums, np.zeros((*self.sums.shape[:2], num_gpus))], axis=2)
        self.held += [{} for _ in range(num_gpus)]

    def put(self, gpu: int, piece: Piece, use: Array) -> None:
        """Add a piece of a demand that the GPU does not hold yet."""
        i, share = piece
        assert i not in self.held[gpu]
        self.held[gpu][i] = share
        self.sums[..., gpu] += use

    def take(self, gpu: int, i: int) -> Piece:
        piece = (i, self.held[gpu].pop(i))
        self.sums[..., gpu] -= self.use(piece)
        return piece

    def best_fit(self, piece: Piece, use: Array, among: slice = slice(None), avoid: int = -1) -> bool:
        """Put a piece where it leaves least room; False when it fits nowhere."""
        full = fullness(self.sums[..., among] + use[..., None])
        full[full > 1 + ROUNDING] = -1
        for gpu in np.argsort(-full, kind="stable")[:8] if len(full) > 1 else [0]:
            if full[gpu] < 0:
                return False
            if piece[0] not in self.held[gpu] and gpu != avoid:
                self.put(int(gpu), piece, use)
                return True
        return False

    def largest_shares(self, i: int, share: float) -> Array:
        """For every GPU the largest share of demand i, at most `share`, that it has room for; 0 where it is held."""
        low, high = np.zeros(len(self.held)), np.full(len(self.held), share)
        which = [i] * len(self.held)
        for step in range(20):
            tried = high if step == 0 else (low + high) / 2
            ok = fullness(self.sums + self.loads.uses(which, tried)) <= 1
            low, high = np.where(ok, tried, low), np.where(ok, high, tried)
        low[[i in held for held in self.held]] = 0
        return low

    def pour(self, piece: Piece) -> bool:
        """Put a piece in as few parts as the gaps allow; False, and nothing changed, when they are too small."""
        i, left = piece
        parts: list[int] = []
        while left > ROUNDING:
            room = self.largest_shares(i, left)
            gpu = int(room.argmax())
            share = left if room[gpu] >= left - ROUNDING else min(room[gpu], left - MIN_SHARE)
            if share < min(left, MIN_SHARE):
                for gpu in parts:
                    self.take(gpu, i)
                return False
            self.put(gpu, (i, share), self.use((i, share)))
            parts.append(gpu)
            left -= share
        return True

    def placement(self) -> Placement:
        shares: dict[str, dict[int, float]] = {}
        for gpu, held in enumerate(self.held):
            for i, share in held.items():
                shares.setdefault(self.loads.demands[i].name, {})[gpu] = share
        return Placement(len(self.held), {name: _exactly_one(on) for name, on in shares.items()})


def _exactly_one(shares: dict[int, float]) -> dict[int, float]:
    total = sum(shares.values())
    return {gpu: share / total for gpu, share in shares.items()}


def lower_bound(loads: Loads) -> int:
    """No placement can do with fewer GPUs, however adapters are cut.

    Whatever the modes, a GPU holds at most 1 of any mean of its resources, and a share of an adapter never takes less
    than that share of what the whole takes (uses are concave in the share, from 0).
    """
    uses = loads.uses(range(len(loads.demands)), np.ones(len(loads.demands)))
    finite = np.where(np.isfinite(uses), uses, np.inf)
    single = finite.min(axis=0).sum(axis=1)
    evenly = finite.mean(axis=1).min(axis=0).sum()
    return max(1, int(np.ceil(max(single.max(), evenly) - 1e-6)))


def cut(loads: Loads, limit: float = 1.0) -> list[Piece]:
    """Whole demands, and those that fill a GPU beyond `limit` in as few equal parts as fit."""
    check_possible(loads)
    everything = range(len(loads.demands))
    full = fullness(loads.uses(everything, np.ones(len(everything))))
    pieces: list[Piece] = []
    for i, size in enumerate(full.tolist()):
        parts = 1
        while size > limit + ROUNDING:
            parts += 1
            size = float(fullness(loads.uses([i], [1 / parts]))[0])
        pieces += [(i, 1 / parts)] * parts
    return pieces


def place(loads: Loads, *, whole: bool = False) -> Placement:
    """On the fewest GPUs we find. whole: cut only those adapters that no GPU can serve alone.

    Best fit decreasing in several orders, then GPU after GPU taken away as long as the others can take its pieces:
    by exchanges, and unless `whole` by cutting adapters to fill the gaps.
    """
    pieces = cut(loads)
    uses = loads.uses(*zip(*pieces, strict=True))
    filled = (_filled(loads, pieces, uses, order) for order in _orders(uses))
    best = min(filled, key=lambda bins: len(bins.held))
    least = lower_bound(loads)
    while len(best.held) > least:
        fewer = _drained(best, whole)
        if fewer is None:
            break
        best = fewer
    return best.placement()


def _orders(uses: Array) -> list[Sequence[int]]:
    """Of pieces, largest first by several measures: their fullest resource in each mode, their sum; as they came."""
    in_modes = np.where(np.isfinite(uses), uses, 0).max(axis=1)
    keys = [in_modes.min(axis=0), *in_modes[::-2], np.median(uses.sum(axis=1), axis=0)]
    return [*(np.argsort(-key, kind="stable").tolist() for key in keys), range(uses.shape[2])]


def _filled(loads: Loads, pieces: Sequence[Piece], uses: Array, order: Sequence[int]) -> Bins:
    """Best fit in the given order, opening GPUs as needed."""
    bins = Bins(loads, len(pieces))
    opened = 0
    for p in order:
        if not (opened and bins.best_fit(pieces[p], uses[..., p], slice(opened))):
            bins.put(opened, pieces[p], uses[..., p])
            opened += 1
    bins.sums, bins.held = bins.sums[..., :opened], bins.held[:opened]
    return bins


def _drained(bins: Bins, whole: bool) -> Bins | None:
    """The same pieces on one GPU fewer, or None."""
    for gpu in np.argsort(fullness(bins.sums))[: 3 if len(bins.held) < 100 else 1].tolist():
        fewer = bins.but(gpu)
        homeless = _exchange(fewer, list(bins.held[gpu].items()))
        if not homeless or (not whole and all([fewer.pour(p) for p in _largest_first(fewer, homeless)])):
            return fewer
    return None


def _largest_first(bins: Bins, pieces: Iterable[Piece]) -> list[Piece]:
    return sorted(pieces, key=lambda p: (-bins.size(p), p))


def _exchange(bins: Bins, homeless: list[Piece]) -> list[Piece]:
    """Find room for pieces, putting out others in turn; what is homeless in the best state, in which `bins` is left.

    A piece that fits nowhere takes the place of smaller ones on a GPU drawn at random, as long as that lessens what
    is homeless or luck allows it.
    """
    rng = np.random.default_rng(0)
    waiting = list(homeless)
    best_size, best = np.inf, (bins.sums.copy(), [dict(h) for h in bins.held], list(waiting))
    tries = 0
    while tries < TRIES:
        tries += len(waiting)
        waiting = [p for p in _largest_first(bins, waiting) if not bins.best_fit(p, bins.use(p))]
        size = sum(map(bins.size, waiting))
        if size < best_size:
            best_size, best = size, (bins.sums.copy(), [dict(h) for h in bins.held], list(waiting))
        if not waiting or not bins.held:
            break
        piece = waiting.pop(int(rng.integers(len(waiting))))
        gpus = [g for g in range(len(bins.held)) if piece[0] not in bins.held[g]]
        if not gpus:
            break
        gpu = gpus[int(rng.integers(len(gpus)))]
        use = bins.use(piece)
        while bins.held[gpu] and not fits(bins.sums[..., gpu] + use):
            names = list(bins.held[gpu])
            waiting.append(bins.take(gpu, names[int(rng.integers(len(names)))]))
        bins.put(gpu, piece, use)
    bins.sums, bins.held, waiting = best
    return waiting


def spread(loads: Loads, num_gpus: int) -> Placement | None:
    """The most even load on num_gpus GPUs, for the lowest latency; None when they cannot hold it.

    Largest first, each to the GPU that is least full with it; then pieces leave the fullest GPU while that helps.
    Adapters larger than an even part of the whole are cut.
    """
    whole = fullness(loads.uses(range(len(loads.demands)), np.ones(len(loads.demands))))
    even = float(np.where(np.isfinite(whole), whole, 1).sum()) / num_gpus
    bins = Bins(loads, num_gpus)
    for piece in _largest_first(bins, cut(loads, min(1.0, max(even, 1e-6)))):
        use = bins.use(piece)
        free = [gpu for gpu in range(num_gpus) if piece[0] not in bins.held[gpu]]
        if not free:
            return None
        bins.put(free[int(fullness(bins.sums[..., free] + use[..., None]).argmin())], piece, use)
    _level(bins)
    return bins.placement() if (fullness(bins.sums) <= 1 + ROUNDING).all() else None


def _level(bins: Bins) -> None:
    """Move pieces away from the fullest GPU as long as the fuller of the two gets less full."""
    for _ in range(4 * len(bins.held)):
        full = fullness(bins.sums)
        source = int(full.argmax())
        for i, share in list(bins.held[source].items()):
            use = bins.use((i, share))
            after = fullness(bins.sums + use[..., None])
            after[[i in held for held in bins.held]] = np.inf
            target = int(after.argmin())
            if max(after[target], float(fullness(bins.sums[..., source] - use))) < full[source] - 1e-6:
                bins.put(target, bins.take(source, i), use)
                break
        else:
            return


def replace(old: Placement, loads: Loads, *, shrink: bool = True) -> Placement:
    """`old` for changed demand, with few moves. GPUs keep their numbers; one that is drained stays, empty.

    Only GPUs that are too full give adapters away, as few as will do. New GPUs are added when nothing else helps;
    with `shrink` GPUs are drained whose adapters fit whole onto the others.
    """
    index = {demand.name: i for i, demand in enumerate(loads.demands)}
    check_possible(loads)
    bins = Bins(loads, old.num_gpus)
    for name, shares in old.shares.items():
        for gpu, share in shares.items() if name in index else ():
            bins.put(gpu, (index[name], share), bins.use((index[name], share)))
    homeless = [piece for gpu in range(old.num_gpus) for piece in _relieved(bins, gpu)]
    homeless += [piece for piece in cut(loads) if loads.demands[piece[0]].name not in old.shares]
    for piece in _largest_first(bins, homeless):
        if bins.best_fit(piece, bins.use(piece)) or bins.pour(piece):
            continue
        fresh = place(_Part(loads, piece))
        first = len(bins.held)
        bins.grow(fresh.num_gpus)
        for gpu, share in fresh.shares[loads.demands[piece[0]].name].items():
            part = (piece[0], piece[1] * share)
            bins.put(first + gpu, part, bins.use(part))
    if shrink:
        _drain_in_place(bins)
    return bins.placement()


class _Part:
    """Loads of one piece alone."""

    def __init__(self, loads: Loads, piece: Piece):
        self.resources, self.demands = loads.resources, [loads.demands[piece[0]]]
        self._loads, self._piece = loads, piece

    def uses(self, which: Sequence[int], shares: Sequence[float] | Array) -> Array:
        i, share = self._piece
        return self._loads.uses([i] * len(which), share * np.asarray(shares, dtype=float))


def _relieved(bins: Bins, gpu: int) -> list[Piece]:
    """Take pieces from a GPU until it is not too full: the smallest that is enough, or else the largest, again."""
    taken: list[Piece] = []
    while not fits(bins.sums[..., gpu]):
        held = list(bins.held[gpu].items())
        uses = bins.loads.uses(*zip(*held, strict=True))
        enough = np.flatnonzero(fullness(bins.sums[..., gpu, None] - uses) <= 1 + ROUNDING)
        size = fullness(uses)
        chosen = enough[size[enough].argmin()] if len(enough) else size.argmax()
        taken.append(bins.take(gpu, held[int(chosen)][0]))
    return taken


def _drain_in_place(bins: Bins) -> None:
    """Empty GPUs, the least full first, as long as the others have room for their adapters, uncut."""
    for gpu in np.argsort(fullness(bins.sums), kind="stable").tolist():
        before = bins.sums.copy(), [dict(held) for held in bins.held]
        full_before = bins.sums[..., gpu].copy()
        pieces = _largest_first(bins, [bins.take(gpu, i) for i in list(bins.held[gpu])])
        empty = [g for g, held in enumerate(bins.held) if not held and g != gpu]
        bins.sums[..., [gpu, *empty]] = np.inf  # nothing goes there
        ok = all(bins.best_fit(piece, bins.use(piece), avoid=gpu) for piece in pieces)
        bins.sums[..., [gpu, *empty]] = 0
        if not ok:
            bins.sums, bins.held = before
            assert np.array_equal(bins.sums[..., gpu], full_before)
            return
