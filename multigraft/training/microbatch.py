"""What training hands to the engine: rows of one job for one pass, and what comes back."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import torch

if TYPE_CHECKING:
    from .adapter import TrainableAdapter


@dataclass(frozen=True, slots=True, kw_only=True)
class Sample:
    """One tokenised sequence. Row i of the forward pass predicts tokens[i + 1]."""

    tokens: tuple[int, ...]
    weights: tuple[float, ...]
    """weights[i]: of predicting tokens[i] from the tokens before it; 0 where nothing is learned, as at index 0."""
    prompt_len: int
    """Leading tokens that a server would be given as the prompt: scope prefill adapts these alone."""
    line: int = 0
    """1-based line of the data file it came from; 0: of none."""


class Objective(Protocol):
    """A loss over log-probabilities: supervised, dpo, and in time a policy gradient."""

    @property
    def two_pass(self) -> bool:
        """Whether a gradient needs every log-probability of the microbatch first; then the head runs twice."""
        ...

    def __call__(self, logps: Sequence[torch.Tensor]) -> tuple[torch.Tensor, list[torch.Tensor]]:
        """The loss, a float32 scalar, and its gradient with respect to each of `logps`. Never waits for the device.

        logps: for each sample (n,) float32, the log-probabilities of its tokens of weight other than 0, in order.
        Without `two_pass` the loss is linear in them: the caller takes the gradient from any values, zeros say, and
        sums gradient * logps up itself.
        """
        ...


@dataclass(slots=True, kw_only=True)
class Microbatch:
    """Whole samples of one job, one after another, nothing padded."""

    job_id: str
    samples: tuple[Sample, ...]
    adapter: TrainableAdapter | None
    """None: the base model alone, as dpo's reference."""
    objective: Objective
    grad: bool
    """False: evaluation; nothing is kept for a backward pass, and nothing is dropped out."""
    seed: int = 0
    """Of its dropout masks: the same when a job is resumed and repeats the microbatch."""

    @property
    def num_tokens(self) -> int:
        return sum(len(s.tokens) for s in self.samples)


@dataclass(slots=True, kw_only=True)
class PassResult:
    """All tensors on the device, so that reading them is the caller's choice."""

    loss: torch.Tensor
    """float32 scalar."""
    logps: list[torch.Tensor]
    """For each sample (n,) float32, of its tokens of weight other than 0, in order."""
    num_correct: torch.Tensor
    """int64 scalar: those of them that were the likeliest token."""
    num_trained: int
    """How many they are."""
