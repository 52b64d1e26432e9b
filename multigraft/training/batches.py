"""Which examples an optimizer step sees, and how they are cut into passes; all of it from (seed, step) alone."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np


class Order:
    """The examples of every optimizer step: each epoch sees each example once, in an order of its own."""

    def __init__(self, num_examples: int, batch_size: int, seed: int):
        self._num_examples = num_examples
        self._batch_size = batch_size
        self._seed = seed
        self.steps_per_epoch = -(-num_examples // batch_size)
        self._epoch = -1
        self._permutation = np.empty(0, dtype=np.int64)

    def examples(self, step: int) -> list[int]:
        """Of step `step`, from 0. The last step of an epoch has what is left over."""
        epoch, position = divmod(step, self.steps_per_epoch)
        if epoch != self._epoch:
            # A sort of raw bits: numpy promises the same ones in every version, but not the same permutations.
            bits = np.random.PCG64(np.random.SeedSequence([self._seed, epoch])).random_raw(self._num_examples)
            self._epoch, self._permutation = epoch, np.argsort(bits, kind="stable")
        return self._permutation[position * self._batch_size :][: self._batch_size].tolist()


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
    """48 bits, which leaves room for a pass to derive one for each site."""
    return int(np.random.SeedSequence([seed, step, microbatch]).generate_state(1, np.uint64)[0]) >> 16
