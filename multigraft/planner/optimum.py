"""The fewest GPUs, exactly, for a handful of adapters: a covering by patterns, solved by HiGHS."""

from __future__ import annotations

import numpy as np
from scipy.optimize import Bounds, LinearConstraint, milp

from multigraft.core.errors import CapacityExceeded

from .placement import ROUNDING, Loads, Placement, check_possible, fullness

MAX_PATTERNS = 300_000


def optimum(loads: Loads, *, parts: int = 1) -> Placement:
    """No placement whose shares are multiples of 1/parts takes fewer GPUs.

    A pattern says how many parts of each adapter a GPU has. Patterns that fit, and to which nothing can be added, are
    enumerated; the fewest that cover all parts are an integer program. CapacityExceeded when there are too many, or
    when a part alone fits on no GPU.
    """
    check_possible(loads)
    n = len(loads.demands)
    if (parts + 1) ** n > MAX_PATTERNS:
        raise CapacityExceeded(
            f"{n} adapters in {parts} parts are too many for an exact placement: ({parts} + 1)^{n} > {MAX_PATTERNS}."
        )
    patterns = _fitting(loads, parts)
    held = {pattern.tobytes() for pattern in patterns}
    step = np.eye(n, dtype=patterns.dtype)
    maximal = np.array([p for p in patterns if not any((p + one).tobytes() in held for one in step)])
    if not (maximal.max(axis=0) > 0).all():
        raise CapacityExceeded(f"An adapter in {parts} parts still fits on no GPU.")
    solution = milp(
        np.ones(len(maximal)),
        constraints=LinearConstraint(maximal.T, lb=parts),
        bounds=Bounds(0, n * parts),
        integrality=np.ones(len(maximal)),
    )
    assert solution.success, solution.message
    chosen = np.repeat(maximal, np.round(solution.x).astype(int), axis=0)
    left = np.full(n, parts)
    shares: dict[str, dict[int, float]] = {d.name: {} for d in loads.demands}
    for gpu, pattern in enumerate(chosen):
        taken = np.minimum(pattern, left)
        left -= taken
        for i in np.flatnonzero(taken).tolist():
            shares[loads.demands[i].name][gpu] = int(taken[i]) / parts
    return Placement(len(chosen), shares)


def _fitting(loads: Loads, parts: int) -> np.ndarray:
    """(patterns, adapters) int8: all that one GPU holds."""
    n = len(loads.demands)
    fractions = np.arange(parts + 1) / parts
    table = [loads.uses([i] * (parts + 1), fractions) * (fractions > 0) for i in range(n)]
    patterns = np.zeros((1, 0), dtype=np.int8)
    sums = np.zeros((*table[0].shape[:2], 1))
    for i in range(n):  # a pattern that does not fit is not extended
        grown = (sums[..., None] + table[i][:, :, None]).reshape(*sums.shape[:2], -1)
        counts = np.tile(np.arange(parts + 1, dtype=np.int8), len(patterns))
        patterns = np.column_stack([np.repeat(patterns, parts + 1, axis=0), counts])
        fit = fullness(grown) <= 1 + ROUNDING
        patterns, sums = np.ascontiguousarray(patterns[fit]), grown[..., fit]
    return patterns
