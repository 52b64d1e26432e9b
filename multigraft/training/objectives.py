"""Losses over log-probabilities; implementations of microbatch.Objective.

A policy gradient is one more class here: log-probabilities in, loss and their gradient out.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F

from .microbatch import Sample


@dataclass(frozen=True, slots=True)
class Supervised:
    """Cross-entropy: - sum(weight * logp) / total.

    total: the weights of the whole optimizer step, known beforehand, so that however a step is cut into microbatches,
    their losses and gradients add up to the same.
    """

    two_pass: ClassVar[bool] = False
    samples: Sequence[Sample]
    """Those of the microbatch."""
    total: float

    def __call__(self, logps: Sequence[torch.Tensor]) -> tuple[torch.Tensor, list[torch.Tensor]]:
        weights = [w for sample in self.samples for w in sample.weights if w]
        flat = torch.cat(list(logps))
        if all(w == weights[0] for w in weights):
            grad = torch.full_like(flat, -weights[0] / self.total)
        else:
            grad = to_device(weights, flat.dtype, flat.device) / -self.total
        return (grad * flat).sum(), list(grad.split([len(logp) for logp in logps]))


@dataclass(frozen=True, slots=True)
class Dpo:
    """Direct preference optimisation (arXiv 2305.18290), the sigmoid loss; equal to trl's.

    The microbatch holds pairs: preferred, non-preferred, preferred, …
    """

    two_pass: ClassVar[bool] = True
    reference: torch.Tensor
    """(pairs, 2) float32 on the device: the sums of the reference's log-probabilities. Read when the loss is made."""
    beta: float
    total: int
    """Pairs of the whole optimizer step."""

    def __call__(self, logps: Sequence[torch.Tensor]) -> tuple[torch.Tensor, list[torch.Tensor]]:
        margins = self.margins(logps)
        loss = -F.logsigmoid(margins).sum() / self.total
        slope = -torch.sigmoid(-margins) * (self.beta / self.total)  # d loss / d log-probability of a preferred token
        slopes = torch.stack([slope, -slope], dim=1).flatten()
        return loss, [s.expand(len(logp)) for s, logp in zip(slopes.unbind(), logps, strict=True)]

    def margins(self, logps: Sequence[torch.Tensor]) -> torch.Tensor:
        """(pairs,) how much more than the reference the adapter prefers the preferred, times beta."""
        ratios = sequence_sums(logps).view(-1, 2) - self.reference
        return self.beta * (ratios[:, 0] - ratios[:, 1])


def sequence_sums(logps: Sequence[torch.Tensor]) -> torch.Tensor:
    """(samples,) the log-probability of each sequence of trained tokens."""
    return torch.stack([logp.sum() for logp in logps])


def to_device(values: Sequence[float], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """Without waiting for the work that is queued there, which torch.tensor(…, device) does."""
    return torch.tensor(values, dtype=dtype, pin_memory=device.type == "cuda").to(device, non_blocking=True)
