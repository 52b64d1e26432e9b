"""Work tables of the segmented kernels: which rows of the token axis use which adapter slot, cut into tiles."""

from __future__ import annotations

import numpy as np
import torch

from multigraft.core.batch import LOW_RANK

UNUSED = -1
"""Slot of a tile that stands for no work."""
BASE = -2
"""Slot of a tile whose rows have no adapter. Only operations that also do the base model's work look at it."""

DECODE_ROWS = 4
HIGH_RANK_ROWS = 16
PREFILL_ROWS = 64
"""Rows a tile, `block_m`, for few rows an adapter, for few with ranks above LOW_RANK, and for many: up to LOW_RANK
they are expanded without tensor cores, above it with them, which take 16 rows at once. lora_triton.py has block sizes
for each, and gradients for the last."""


def decode_rows(max_rank: int) -> int:
    """Rows a tile where adapters have few rows, for ranks up to max_rank."""
    return HIGH_RANK_ROWS if max_rank > LOW_RANK else DECODE_ROWS


def choose_block_m(num_rows: int, num_segments: int, max_rank: int) -> int:
    """Rows a tile for this many adapted rows in this many segments, for ranks up to max_rank."""
    return PREFILL_ROWS if 4 * num_rows > PREFILL_ROWS * num_segments else decode_rows(max_rank)


def build_tiles(
    segments: torch.Tensor, seg_slot: torch.Tensor, block_m: int, num_tiles: int | None = None
) -> torch.Tensor:
    """Cut segments into tiles: int32 (num_tiles, 3) of (first row, rows <= block_m, slot), on the CPU.

    segments: int (S, 2), (first row, last row + 1), ascending and disjoint; gaps and empty segments are allowed.
    seg_slot: int (S,), slots >= 0, or BASE; several segments may share one.
    num_tiles: length of the table, the rest filled with UNUSED tiles; default: as many as there are.

    Tiles are sorted by slot, those of BASE after all others, unused ones last: neighbours share an adapter, and a
    slot's tiles are one range.
    """
    segments, seg_slot = segments.long(), seg_slot.long()
    first, stop = segments.unbind(1)
    assert bool((first <= stop).all() and (first[1:] >= stop[:-1]).all()), "segments overlap or are out of order"
    assert bool(((seg_slot >= 0) | (seg_slot == BASE)).all()), "a segment without a slot"
    counts = (stop - first + block_m - 1) // block_m
    seg = torch.repeat_interleave(torch.arange(len(counts)), counts)
    nth = torch.arange(len(seg)) - (counts.cumsum(0) - counts)[seg]
    tile_first = first[seg] + nth * block_m
    tile_rows = (stop[seg] - tile_first).clamp(max=block_m)
    slots = seg_slot[seg]
    order = torch.where(slots == BASE, torch.iinfo(slots.dtype).max, slots).argsort(stable=True)
    work = torch.stack([tile_first, tile_rows, slots], dim=1)[order]
    num_tiles = len(work) if num_tiles is None else num_tiles
    assert len(work) <= num_tiles, f"{len(work)} tiles do not fit into a table of {num_tiles}"
    tiles = torch.zeros(num_tiles, 3, dtype=torch.int32)
    tiles[:, 2] = UNUSED
    tiles[: len(work)] = work
    return tiles


def cut_tiles(row_slot: np.ndarray, block_m: int) -> np.ndarray:
    """Tiles, as of build_tiles, of rows with these slots, in row order; int32 (n, 3) on the host. UNUSED: no tile."""
    edges = np.flatnonzero(row_slot[1:] != row_slot[:-1]) + 1
    first = np.concatenate(([0], edges))
    lengths = np.diff(first, append=len(row_slot))
    within = np.arange(len(row_slot)) - np.repeat(first, lengths)
    starts = np.flatnonzero((within % block_m == 0) & (row_slot != UNUSED))
    left = np.repeat(lengths, lengths)[starts] - within[starts]
    return np.stack([starts, np.minimum(left, block_m), row_slot[starts]], axis=1).astype(np.int32)


def max_tiles(num_rows: int, max_slots: int, block_m: int) -> int:
    """Tiles that rows sorted by slot are cut into, at most, rows without a slot at either end among them."""
    runs = min(num_rows, max_slots + 2)
    return runs + (num_rows - runs) // block_m
