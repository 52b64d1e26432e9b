"""Drawing tokens from weights: counter-based uniforms, min-p, top-k and top-p, and the inverse-CDF draw.

Shapes: R rows, V vocabulary. A weight is exp((logit - the row's largest logit) / temperature), so that the
likeliest token's is 1; the filters and the draw need no normalised probabilities.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

MAX_TOPK = 1024
"""Up to this top_k the k largest are selected; beyond it the row is sorted (on the CPU they then cost the same)."""

_SCALE = 2.0**40
"""Weights become integers in units of 2^-40: V <= 2^18 of them add up below 2^63, and exactly."""


def rows_at_once(vocab_size: int, device: torch.device) -> int:
    """Rows to work on at a time: on the CPU about what its cache holds, elsewhere what bounds the memory.

    32 rows of 49,152 whole take up to twice as long on the CPU: the allocator returns such large buffers to the
    system and gets them back page by page.
    """
    return max(1, 2 ** (18 if device.type == "cpu" else 25) // vocab_size)


def uniforms(seeds: np.ndarray, positions: np.ndarray) -> np.ndarray:
    """One number in [0, 1) for every (seed, position): output number `position` of SplitMix64 from `seed`.

    seeds: (R,) uint64. positions: (R,) from 0. Returns float64 (R,) with 53 random bits.
    Source: Steele, Lea and Flood, "Fast splittable pseudorandom number generators", OOPSLA 2014; constants of
    Vigna's splitmix64.c. Its state only counts, so any output can be had without those before it.
    """
    bits: np.ndarray = splitmix64(seeds, positions) >> np.uint64(11)
    return bits.astype(np.float64) * 2.0**-53


def splitmix64(seeds: np.ndarray, positions: np.ndarray) -> np.ndarray:
    with np.errstate(over="ignore"):
        z: np.ndarray = seeds + (positions.astype(np.uint64) + np.uint64(1)) * np.uint64(0x9E3779B97F4A7C15)
        z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        z ^= z >> np.uint64(31)
    return z


def truncate_(w_RV: Tensor, min_p: np.ndarray, top_k: np.ndarray, top_p: np.ndarray) -> None:
    """Set to 0, in place, the weights that min-p, then top-k, then top-p leave out.

    top_k is V and top_p is 1 where a row does not ask. Each filter is a threshold on the weight, so tokens tied
    with the last one kept are kept too, whatever their order: that makes the result independent of the batch
    and of the sorting algorithm. top_p counts the mass of what min_p and top_k left.
    """
    cut_R1 = torch.from_numpy(min_p).to(w_RV)[:, None]
    ranked = (top_k < w_RV.shape[1]) | (top_p < 1.0)
    few = ranked & (top_k <= MAX_TOPK)
    for group in (few, ranked & ~few):
        if group.all():
            cut_R1 = _rank_cut(w_RV, cut_R1, top_k, top_p)
        elif group.any():
            at = torch.from_numpy(np.flatnonzero(group)).to(w_RV.device)
            cut_R1[at] = _rank_cut(w_RV[at], cut_R1[at], top_k[group], top_p[group])
    w_RV.mul_(_at_least(w_RV, cut_R1))


def _rank_cut(w_RV: Tensor, cut_R1: Tensor, top_k: np.ndarray, top_p: np.ndarray) -> Tensor:
    """The smallest weight that top-k and then top-p keep, not below `cut`; (R, 1)."""
    device = w_RV.device
    largest_RK = _largest(w_RV, int(top_k.max()))
    last = torch.from_numpy(top_k - 1).to(device)[:, None]
    cut_R1 = torch.maximum(cut_R1, largest_RK.gather(1, last))
    if (top_p == 1.0).all():
        return cut_R1
    # The last token kept is the first at which the running mass reaches top_p; an infinite target keeps all.
    share = torch.from_numpy(np.where(top_p < 1.0, top_p, np.inf)).to(w_RV)[:, None]
    mass_R1 = _at_least(w_RV, cut_R1).mul_(w_RV).sum(-1, keepdim=True)
    last = torch.searchsorted(largest_RK.cumsum(-1), share * mass_R1).clamp_(max=largest_RK.shape[1] - 1)
    return torch.maximum(cut_R1, largest_RK.gather(1, last))


def _largest(w_RV: Tensor, k: int) -> Tensor:
    """The k largest of each row, descending."""
    if k <= MAX_TOPK:
        return w_RV.topk(k).values
    if w_RV.device.type == "cpu":
        # numpy sorts values alone and with SIMD: 0.15 ms a row of 49,152 against 1.5 ms for torch.sort (AVX-512).
        return torch.from_numpy(np.sort(w_RV.numpy(), axis=-1)).flip(-1)[:, :k]
    return w_RV.sort(-1, descending=True).values[:, :k]


def _at_least(w_RV: Tensor, cut_R1: Tensor) -> Tensor:
    """1.0 where w >= cut, else 0.0. Written as float at once: a bool mask costs three times as much on the CPU."""
    return torch.ge(w_RV, cut_R1, out=torch.empty_like(w_RV))


def draw(w_RV: Tensor, u_R: Tensor) -> Tensor:
    """One token a row with probability in proportion to its weight; int64 (R,). Overwrites w.

    u: float64 in [0, 1). The running sum is over integers, hence exact, ascending and the same on every device
    and in every batch; a token of weight 0 adds nothing to it and cannot be drawn. Weights under 2^-40 of the
    largest count as 0. A row with NaN yields any token within the vocabulary.
    """
    cdf_RV = w_RV.mul_(_SCALE).long().cumsum_(-1)
    total_R1 = cdf_RV[:, -1:]
    target_R1 = (u_R[:, None] * total_R1).long()  # u <= 1 - 2^-53, so below the total, rounding included
    return torch.searchsorted(cdf_RV, target_R1, right=True).squeeze(1).clamp_(max=w_RV.shape[1] - 1)
