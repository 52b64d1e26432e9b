"""Placements of others, to compare with, each judged by the same loads as ours."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import groupby

import numpy as np
from scipy.optimize import linear_sum_assignment

from .packing import Bins, Piece, cut
from .placement import ROUNDING, Loads, Placement, fits, fullness, holds

TESTED_AT = (1, 2, 4, 8)
"""Served counts of the paper's greedy before its multiples of two from 8 on; below 8 only when 8 are too many."""


def round_robin(loads: Loads, num_gpus: int) -> Placement | None:
    """In turn, whatever their demand. Adapters too large for a GPU are cut before, as for every method here."""
    bins = Bins(loads, num_gpus)
    for turn, piece in enumerate(cut(loads)):
        bins.put(turn % num_gpus, piece)
    return _if_held(bins)


def first_fit(loads: Loads, num_gpus: int) -> Placement | None:
    """As they come, each to the first GPU that has room."""
    bins = Bins(loads, num_gpus)
    for piece in cut(loads):
        room = np.flatnonzero(fullness(bins.sums + bins.use(piece)[..., None]) <= 1 + ROUNDING)
        if not len(room):
            return None
        bins.put(int(room[0]), piece)
    return bins.placement()


def paper_greedy(loads: Loads, num_gpus: int) -> Placement | None:
    """Agullo et al., arXiv 2602.24044: one GPU after another filled up, by rank, in each rank large and small in turn.

    Whether a GPU starves is tested at served counts 8, 16, 32, 64, …; it keeps what it had at the last one that passed.
    """
    bins = Bins(loads, num_gpus)
    queue = _zig_zag(loads)
    for gpu in range(num_gpus):
        count = _largest_passing(loads, queue)
        for piece in queue[:count]:
            bins.put(gpu, piece)
        queue = queue[count:]
        if not queue:
            return bins.placement()
    return None


def _zig_zag(loads: Loads) -> list[Piece]:
    """By rank descending; inside a rank the highest rate, the lowest, the next highest, …"""
    pieces = sorted(cut(loads), key=lambda p: (-loads.demands[p[0]].rank, -loads.demands[p[0]].rate * p[1]))
    ordered: list[Piece] = []
    for _, group in groupby(pieces, key=lambda p: loads.demands[p[0]].rank):
        rest = list(group)
        while rest:
            ordered.append(rest.pop(0))
            if rest:
                ordered.append(rest.pop())
    return ordered


def _largest_passing(loads: Loads, queue: Sequence[Piece]) -> int:
    def passes(count: int) -> bool:
        return fits(loads.uses(*zip(*queue[:count], strict=True)).sum(axis=2))

    points = [8]
    while points[-1] < len(queue):
        points.append(points[-1] * 2)
    points[-1] = min(points[-1], len(queue))
    best = 0
    for count in points:
        if not passes(count):
            break
        best = count
    return best or max(count for count in TESTED_AT if count <= len(queue) and passes(count))


def dlora(loads: Loads, num_gpus: int, copies: int = 2) -> Placement | None:
    """dLoRA's proactive placement (OSDI 2024): the adapter with most demand a copy gets one more, where load is least.

    Every adapter has one copy first, then copies are added while the GPUs have room for `copies` times the adapters,
    evenly; requests go to all copies alike.
    """
    sizes = fullness(loads.uses(range(len(loads.demands)), np.ones(len(loads.demands))))
    on: list[list[int]] = [[] for _ in sizes]
    room = np.full(num_gpus, -(-copies * len(sizes) // num_gpus))
    load = np.zeros(num_gpus)
    for i in [*np.argsort(-sizes, kind="stable").tolist(), *[-1] * (copies - 1) * len(sizes)]:
        if i < 0:
            per_copy = [size / len(gpus) if len(gpus) < num_gpus else -1 for size, gpus in zip(sizes, on, strict=True)]
            i = int(np.argmax(per_copy))
        free = [g for g in range(num_gpus) if room[g] and g not in on[i]]
        if not free:
            continue
        gpu = min(free, key=lambda g: load[g])
        before = sizes[i] / len(on[i]) if on[i] else 0
        load[on[i]] -= before
        on[i].append(gpu)
        load[on[i]] += sizes[i] / len(on[i])
        room[gpu] -= 1
    bins = Bins(loads, num_gpus)
    for i, gpus in enumerate(on):
        for gpu in gpus:
            bins.put(gpu, (i, 1 / len(gpus)))
    return _if_held(bins)


def loraserve(loads: Loads, num_gpus: int, old: Placement | None = None) -> Placement | None:
    """LoRAServe (arXiv 2511.22880): GPUs to ranks by demand over each rank's operating point, filled by shares.

    An operating point is the token rate that one GPU gives adapters of that rank alone. The rank's GPUs are a rounding
    of their even part of all; adapters fill GPUs to that part, cut at the border, and the rest goes where room is left.
    At last GPUs are renumbered so that as many copies as possible of `old` stay where they are.
    """
    sizes = fullness(loads.uses(range(len(loads.demands)), np.ones(len(loads.demands))))
    ranks = sorted({d.rank for d in loads.demands}, reverse=True)
    need = np.array([sum(s for s, d in zip(sizes, loads.demands, strict=True) if d.rank == rank) for rank in ranks])
    if need.sum() > num_gpus:
        return None
    level = need.sum() / num_gpus
    counts = _largest_remainder(need / need.sum() * num_gpus, num_gpus)
    shares: dict[int, dict[int, float]] = {i: {} for i in range(len(sizes))}
    room = np.full(num_gpus, level)
    first = 0
    rest: list[Piece] = []
    for rank, count in zip(ranks, counts, strict=True):
        members = [i for i, d in enumerate(loads.demands) if d.rank == rank]
        members.sort(key=lambda i: -sizes[i])
        rest += _pour(members, sizes, shares, room, range(first, first + count))
        first += count
    for i, share in rest:
        left = share
        for gpu in np.argsort(-room, kind="stable").tolist():
            part = min(left, max(room[gpu], 0) / sizes[i])
            if part > 0:
                shares[i][gpu] = shares[i].get(gpu, 0) + part
                room[gpu] -= part * sizes[i]
                left -= part
        if left > ROUNDING:
            gpu = int(room.argmax())
            shares[i][gpu] = shares[i].get(gpu, 0) + left
            room[gpu] -= left * sizes[i]
    placement = Placement(num_gpus, {loads.demands[i].name: on for i, on in shares.items()})
    if old is not None:
        placement = relabelled(placement, old)
    return placement if holds(placement, loads) else None


def _pour(
    members: Sequence[int],
    sizes: Sequence[float],
    shares: dict[int, dict[int, float]],
    room: np.ndarray,
    gpus: Sequence[int],
) -> list[Piece]:
    """Fill GPUs one after another; what they do not hold."""
    rest: list[Piece] = []
    queue = list(gpus)
    for i in members:
        left = 1.0
        while left > ROUNDING and queue:
            part = min(left, room[queue[0]] / sizes[i])
            if part > ROUNDING:
                shares[i][queue[0]] = part
                room[queue[0]] -= part * sizes[i]
                left -= part
            if room[queue[0]] <= ROUNDING:
                queue.pop(0)
        if left > ROUNDING:
            rest.append((i, left))
    return rest


def _largest_remainder(parts: np.ndarray, total: int) -> list[int]:
    counts = np.floor(parts).astype(int)
    order = np.argsort(counts - parts, kind="stable")
    counts[order[: total - counts.sum()]] += 1
    return [int(c) for c in counts]


def relabelled(placement: Placement, old: Placement) -> Placement:
    """The same placement with GPUs numbered so that fewest copies move from `old`."""
    kept = np.zeros((placement.num_gpus, max(placement.num_gpus, old.num_gpus)))
    for name, shares in placement.shares.items():
        for gpu in shares:
            for before in old.shares.get(name, {}):
                kept[gpu, before] += 1
    kept = kept[:, : placement.num_gpus]
    rows, columns = linear_sum_assignment(-kept)
    number = dict(zip(rows.tolist(), columns.tolist(), strict=True))
    shares = {name: {number[gpu]: share for gpu, share in on.items()} for name, on in placement.shares.items()}
    return Placement(placement.num_gpus, shares)


def _if_held(bins: Bins) -> Placement | None:
    return bins.placement() if (fullness(bins.sums) <= 1 + ROUNDING).all() else None


BASELINES: dict[str, Callable[[Loads, int], Placement | None]] = {
    "round robin": round_robin,
    "first fit": first_fit,
    "paper's greedy": paper_greedy,
    "dLoRA": dlora,
    "LoRAServe": loraserve,
}
