"""Which examples an optimizer step sees, and how they are cut into passes; all of it from (seed, step) alone."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np


def epoch_order(num_examples: int, seed: int, epoch: int) -> np.ndarray:
    """(num_examples,) a permutation. The same in every version of numpy, which promises that of raw bits alone."""
    bits = np.random.PCG64(np.random.SeedSequence([seed, epoch])).random_raw(num_examples)
    return np.argsort(bits, kind="stable")


def step_examples(num_examples: int, batch_size: int, seed: int, step: int) -> np.ndarray:
    """Examples of optimizer step `step`, from 0. The last step of an epoch has what is left over."""
    epoch, position = divmod(step, -(-num_examples // batch_size))
    order = epoch_order(num_examples, seed, epoch)
    return order[position * batch_size : (position + 1) * batch_size]


def pack(examples: Sequence[int], lengths: np.ndarray, max_tokens: int) -> list[list[int]]:
    """Cut examples into microbatches of at most max_tokens: first fit, longest first.

    lengths: tokens of every example of the dataset, all of its samples together; none of `examples` has more than
    max_tokens.
    """
    bins: list[list[int]] = []
    room: list[int] = []
    for example in sorted((int(e) for e in examples), key=lambda e: (-lengths[e], e)):
        length = int(lengths[example])
        assert length <= max_tokens, (example, length, max_tokens)
        fit = next((i for i, free in enumerate(room) if length <= free), None)
        if fit is None:
            bins.append([])
            room.append(max_tokens)
            fit = len(bins) - 1
        bins[fit].append(example)
        room[fit] -= length
    return bins


def dropout_seed(seed: int, step: int, microbatch: int) -> int:
    """63 bits."""
    return int(np.random.SeedSequence([seed, step, microbatch]).generate_state(1, np.uint64)[0]) >> 1
