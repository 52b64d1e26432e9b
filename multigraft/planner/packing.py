"""Our placement: the fewest GPUs, the most even load on a given number, few moves when demand drifts."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np

from .placement import MOST_GPUS, ROUNDING, Array, Loads, Placement, check_possible, fits, fullness

MIN_SHARE = 1 / 32
"""No adapter is cut into smaller parts, unless its demand alone fills as many GPUs."""
TRIES = 5_000
"""Looks for room in one search of exchanges, about 40 us each."""
POURED = 300
"""Adapters poured in search for a packing, about 1 ms each."""
FEW = 500
"""Up to so many pieces are packed in several ways."""
CUTS = (1.0, 0.5, 0.25)
"""Sizes beyond which adapters are cut, to try."""

Piece = tuple[int, float]
"""A demand by index, and a share of it."""


class Bins:
    """GPUs being filled."""

    def __init__(self, loads: Loads, num_gpus: int):
        modes, resources, _ = loads.uses([], []).shape
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
        fewer = Bins(self.loads, 0)
        fewer.sums = np.delete(self.sums, gpu, axis=2)
        fewer.held = [dict(held) for g, held in enumerate(self.held) if g != gpu]
        fewer._known = self._known
        return fewer

    def grow(self, num_gpus: int) -> None:
        """Add empty GPUs."""
        self.sums = np.concatenate([self.sums, np.zeros((*self.sums.shape[:2], num_gpus))], axis=2)
        self.held += [{} for _ in range(num_gpus)]

    def state(self) -> tuple[Array, list[dict[int, float]]]:
        return self.sums.copy(), [dict(held) for held in self.held]

    def put(self, gpu: int, piece: Piece) -> None:
        """Add a piece; it joins another of its demand, which never takes more than both apart."""
        i, share = piece
        if before := self.held[gpu].get(i):
            self.sums[..., gpu] -= self.use((i, before))
            share += before
        self.held[gpu][i] = share
        self.sums[..., gpu] += self.use((i, share))

    def take(self, gpu: int, i: int) -> Piece:
        piece = (i, self.held[gpu].pop(i))
        self.sums[..., gpu] -= self.use(piece)
        return piece

    def best_fit(self, piece: Piece, opened: int | None = None) -> bool:
        """Put a piece where it leaves least room, among the first `opened` GPUs; False when it fits nowhere."""
        full = fullness(self.sums[..., :opened] + self.use(piece)[..., None])
        full[full > 1 + ROUNDING] = -1
        gpu = int(full.argmax()) if len(full) else -1
        if gpu < 0 or full[gpu] < 0:
            return False
        self.put(gpu, piece)
        return True

    def pour(self, piece: Piece) -> bool:
        """Put a piece in as few parts as the gaps allow; False, and nothing changed, when they are too small."""
        before = self.state()
        i, left = piece
        while left > ROUNDING:
            room = self.largest_shares(i, left)
            gpu = int(room.argmax())
            share = left if room[gpu] >= left - ROUNDING else min(room[gpu], left - MIN_SHARE)
            if share < min(left, MIN_SHARE):
                self.sums, self.held = before
                return False
            self.put(gpu, (i, float(share)))
            left -= share
        return True

    def largest_shares(self, i: int, share: float) -> Array:
        """For every GPU how much of demand i it has room for, at most `share`."""
        which = [i] * len(self.held)
        has = np.array([held.get(i, 0.0) for held in self.held])
        without = self.sums - self.loads.uses(which, has) * (has > 0)
        low, high = np.zeros(len(self.held)), np.full(len(self.held), share)
        for step in range(20):
            tried = high if step == 0 else (low + high) / 2
            ok = fullness(without + self.loads.uses(which, has + tried)) <= 1
            low, high = np.where(ok, tried, low), np.where(ok, high, tried)
        return low

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
    single = uses.min(axis=0).sum(axis=1).max()
    evenly = uses.mean(axis=1).min(axis=0).sum()
    return max(1, int(np.ceil(max(single, evenly) - 1e-6)))


def cut(loads: Loads, limit: float = 1.0, most: int = MOST_GPUS) -> list[Piece]:
    """Whole demands, and those that fill a GPU beyond `limit` in as few equal parts as fit, at most `most`."""
    check_possible(loads)
    everything = range(len(loads.demands))
    full = fullness(loads.uses(everything, np.ones(len(everything))))
    pieces: list[Piece] = []
    for i, size in enumerate(full.tolist()):
        parts = 1
        while size > limit + ROUNDING and parts < most:
            parts += 1
            size = float(fullness(loads.uses([i], [1 / parts]))[0])
        pieces += [(i, 1 / parts)] * parts
    return pieces


def place(loads: Loads, *, whole: bool = False) -> Placement:
    """On the fewest GPUs we find. whole: cut only those adapters that no GPU can serve alone.

    Few adapters are packed by best fit in several orders, many are levelled out over a number of GPUs that is guessed
    from how full they get. Then GPU after GPU is taken away as long as the others can take its pieces: by exchanges,
    and unless `whole` by cutting adapters to fill the gaps, or all adapters, a few times in random order.
    """
    pieces = cut(loads)
    least = lower_bound(loads)
    best = _levelled_on_fewest(loads, pieces, least)
    drains = 4
    if len(pieces) <= FEW:
        for limit in (1.0,) if whole else CUTS:
            pieces = cut(loads, limit)
            filled = [_filled(loads, pieces, order) for order in _orders(loads.uses(*zip(*pieces, strict=True)))]
            best = min([best, *filled], key=lambda bins: len(bins.held))
        drains = len(best.held)
    for _ in range(min(drains, len(best.held) - least)):
        fewer = _drained(best, whole)
        if fewer is None and not whole:
            fewer = _poured(loads, len(best.held) - 1)
        if fewer is None:
            break
        best = fewer
    return best.placement()


def _levelled_on_fewest(loads: Loads, pieces: Sequence[Piece], least: int) -> Bins:
    pieces = _largest_first(Bins(loads, 0), pieces)
    low, num_gpus = least - 1, least
    best: Bins | None = None
    while best is None or low + 1 < len(best.held):
        bins = _levelled(loads, pieces, num_gpus)
        fullest = float(fullness(bins.sums).max())
        if fullest <= 1 + ROUNDING:
            best = bins
        else:
            low = num_gpus
        num_gpus = max(low + 1, int(np.ceil(num_gpus * min(fullest, 2.0))))
        if best is not None:
            num_gpus = min(num_gpus, len(best.held) - 1)
    return best


def _levelled(loads: Loads, pieces: Sequence[Piece], num_gpus: int) -> Bins:
    """Pieces in turn, each to the GPU that is least full with it, fuller than full if need be."""
    bins = Bins(loads, num_gpus)
    for piece in pieces:
        bins.put(int(fullness(bins.sums + bins.use(piece)[..., None]).argmin()), piece)
    return bins


def _orders(uses: Array) -> list[Sequence[int]]:
    """Of pieces, largest first by several measures: their fullest resource in each mode, their sum; as they came."""
    in_modes = uses.max(axis=1)
    keys = [in_modes.min(axis=0), *in_modes[::-2], np.median(uses.sum(axis=1), axis=0)]
    return [*(np.argsort(-key, kind="stable").tolist() for key in keys), range(uses.shape[2])]


def _filled(loads: Loads, pieces: Sequence[Piece], order: Sequence[int]) -> Bins:
    """Best fit in the given order, opening GPUs as needed."""
    bins = Bins(loads, len(pieces))
    opened = 0
    for p in order:
        if not bins.best_fit(pieces[p], opened):
            bins.put(opened, pieces[p])
            opened += 1
    bins.sums, bins.held = bins.sums[..., :opened], bins.held[:opened]
    return bins


def _drained(bins: Bins, whole: bool) -> Bins | None:
    """The same pieces on one GPU fewer, or None."""
    for gpu in np.argsort(fullness(bins.sums))[: 3 if len(bins.held) < 100 else 1].tolist():
        fewer = bins.but(gpu)
        homeless = _exchange(fewer, list(bins.held[gpu].items()))
        if not homeless or (not whole and all(fewer.pour(p) for p in _largest_first(fewer, homeless))):
            return fewer
    return None


def _poured(loads: Loads, num_gpus: int) -> Bins | None:
    """Everything poured in, adapter after adapter, or None."""
    rng = np.random.default_rng(0)
    for _ in range(POURED // len(loads.demands)):
        bins = Bins(loads, num_gpus)
        if all(bins.pour((i, 1.0)) for i in rng.permutation(len(loads.demands)).tolist()):
            return bins
    return None


def _largest_first(bins: Bins, pieces: Iterable[Piece]) -> list[Piece]:
    return sorted(pieces, key=lambda p: (-bins.size(p), p))


def _exchange(bins: Bins, homeless: list[Piece]) -> list[Piece]:
    """Find room for pieces, putting out others in turn; what is homeless in the best state, in which `bins` is left.

    A piece that fits nowhere takes the place of smaller ones on a GPU drawn at random, as long as that lessens what
    is homeless or luck allows it.
    """
    rng = np.random.default_rng(0)
    waiting, smallest, best = homeless, np.inf, (bins.state(), homeless)
    tries = 0
    while tries < TRIES:
        tries += len(waiting)
        waiting = [piece for piece in _largest_first(bins, waiting) if not bins.best_fit(piece)]
        size = sum(map(bins.size, waiting))
        if size < smallest:
            smallest, best = size, (bins.state(), list(waiting))
        if not waiting or not bins.held:
            break
        piece = waiting.pop(int(rng.integers(len(waiting))))
        gpu = int(rng.integers(len(bins.held)))
        while bins.held[gpu] and not fits(bins.sums[..., gpu] + bins.use(piece)):
            waiting.append(bins.take(gpu, list(bins.held[gpu])[int(rng.integers(len(bins.held[gpu])))]))
        bins.put(gpu, piece)
    (bins.sums, bins.held), waiting = best
    return waiting


def spread(loads: Loads, num_gpus: int) -> Placement | None:
    """The most even load on num_gpus GPUs, for the lowest latency; None when they cannot hold it.

    Largest first, each to the GPU that is least full with it; then pieces leave the fullest GPU while that helps.
    Adapters larger than an even part of the whole are cut.
    """
    sizes = fullness(loads.uses(range(len(loads.demands)), np.ones(len(loads.demands))))
    even = float(sizes.sum()) / num_gpus
    pieces = _largest_first(Bins(loads, 0), cut(loads, min(1.0, max(even, 1e-3)), num_gpus))
    bins = _levelled(loads, pieces, num_gpus)
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
            target = int(after.argmin())
            if max(after[target], float(fullness(bins.sums[..., source] - use))) < full[source] - 1e-6:
                bins.put(target, bins.take(source, i))
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
            bins.put(gpu, (index[name], share))
    homeless = [piece for gpu in range(old.num_gpus) for piece in _relieved(bins, gpu)]
    homeless += [piece for piece in cut(loads) if loads.demands[piece[0]].name not in old.shares]
    for piece in _largest_first(bins, homeless):
        if bins.best_fit(piece) or bins.pour(piece):
            continue
        first = len(bins.held)
        fresh = place(_Part(loads, piece))
        bins.grow(fresh.num_gpus)
        for gpu, share in fresh.shares[loads.demands[piece[0]].name].items():
            bins.put(first + gpu, (piece[0], piece[1] * share))
    if shrink:
        _drain(bins)
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
    """Take pieces from a GPU until it is not too full: the smallest that is enough, or else the largest, again. Of one
    that nearly fills a GPU only as much as must go."""
    taken: list[Piece] = []
    while not fits(bins.sums[..., gpu]):
        held = list(bins.held[gpu].items())
        uses = bins.loads.uses(*zip(*held, strict=True))
        enough = np.flatnonzero(fullness(bins.sums[..., gpu, None] - uses) <= 1 + ROUNDING)
        size = fullness(uses)
        chosen = enough[size[enough].argmin()] if len(enough) else size.argmax()
        i, share = bins.take(gpu, held[int(chosen)][0])
        if size[chosen] > CUTS[1]:
            kept = float(bins.largest_shares(i, share)[gpu])
            if MIN_SHARE * share < kept < share:
                bins.put(gpu, (i, kept))
                share -= kept
        taken.append((i, share))
    return taken


def _drain(bins: Bins) -> None:
    """Empty GPUs, the least full first, as long as the others have room for their adapters, uncut."""
    for gpu in np.argsort(fullness(bins.sums), kind="stable").tolist():
        before = bins.state()
        pieces = [bins.take(gpu, i) for i in list(bins.held[gpu])]
        empty = [g for g, held in enumerate(bins.held) if not held]
        bins.sums[..., empty] = np.inf  # nothing goes there
        if not all(bins.best_fit(piece) for piece in _largest_first(bins, pieces)):
            bins.sums, bins.held = before
            return
        bins.sums[..., empty] = 0
