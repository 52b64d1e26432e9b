"""Tokenised training data in memory: 8 bytes a token, however many samples."""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Sequence

import numpy as np

from .microbatch import Sample


class Dataset:
    """Examples by number; an example is the samples that stay together: one, or the two of a dpo pair.

    All tensors-to-be are flat arrays; a Sample is made when it is asked for.
    """

    def __init__(self, samples_per_example: int = 1):
        self.samples_per_example = samples_per_example
        self.too_long: list[int] = []
        """Lines of the file that were left out because a sample of theirs was over max_length."""
        self._tokens = array("i")
        self._weights = array("f")
        self._starts = array("q", [0])
        self._prompt_lens = array("i")
        self._lines = array("q")
        self._weight_sums = array("d")

    def add(self, example: Sequence[Sample]) -> None:
        assert len(example) == self.samples_per_example
        for sample in example:
            self._tokens.extend(sample.tokens)
            self._weights.extend(sample.weights)
            self._starts.append(len(self._tokens))
            self._prompt_lens.append(sample.prompt_len)
            self._lines.append(sample.line)
            self._weight_sums.append(sum(self._weights[self._starts[-2] :]))

    def __len__(self) -> int:
        return len(self._lines) // self.samples_per_example

    def __getitem__(self, example: int) -> tuple[Sample, ...]:
        first = example * self.samples_per_example
        return tuple(self._sample(i) for i in range(first, first + self.samples_per_example))

    def _sample(self, i: int) -> Sample:
        part = slice(self._starts[i], self._starts[i + 1])
        return Sample(
            tokens=tuple(self._tokens[part]),
            weights=tuple(self._weights[part]),
            prompt_len=self._prompt_lens[i],
            line=self._lines[i],
        )

    @property
    def num_tokens(self) -> int:
        return len(self._tokens)

    @property
    def longest(self) -> int:
        """Tokens of the longest sample."""
        return int(np.diff(np.array(self._starts, dtype=np.int64)).max())

    def lengths(self) -> np.ndarray:
        """(examples,) tokens of each."""
        return np.diff(np.array(self._starts, dtype=np.int64)).reshape(len(self), -1).sum(axis=1)

    def weight(self, examples: Sequence[int]) -> float:
        """Sum of all weights of some examples."""
        n = self.samples_per_example
        return sum(self._weight_sums[e * n + i] for e in examples for i in range(n))

    def digest(self) -> str:
        """Of everything that training sees."""
        digest = hashlib.blake2b(digest_size=16)
        for part in (self._tokens, self._weights, self._starts, self._prompt_lens):
            digest.update(part)
        return digest.hexdigest()
