"""Log-probabilities of tokens as they are reported: of the model's own distribution.

As by vLLM's default ("raw_logprobs"), they are the log-softmax of the logits before any mask, bias, penalty,
temperature or truncation, in float32.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from multigraft.core.errors import InvalidLogits
from multigraft.core.request import Logprob, TokenLogprobs

from .draw import rows_at_once

MAX_LOGPROBS = 20
"""The most that a request may ask for (core.request.SamplingParams)."""


@dataclass(frozen=True, slots=True)
class RankedLogprobs:
    """Log-probabilities of N rows on the device; column 0 is the token itself, then the likeliest, descending."""

    token_ids: Tensor
    """(N, 1 + k) int64."""
    values: Tensor
    """(N, 1 + k) float32."""
    ranks: Tensor
    """(N,) int64: 1 + the number of likelier tokens, so tied tokens share the better rank."""

    def to_host(self, ks: Sequence[int]) -> list[TokenLogprobs]:
        """ks: how many of the likeliest each row reports."""
        rows = zip(self.token_ids.tolist(), self.values.tolist(), self.ranks.tolist(), ks, strict=True)
        return [
            TokenLogprobs(
                token=Logprob(ids[0], values[0], rank),
                top=tuple(Logprob(ids[i], values[i], i) for i in range(1, k + 1)),
            )
            for ids, values, rank, k in rows
        ]


def rank_logprobs(logits: Tensor, tokens: Tensor, k: int) -> RankedLogprobs:
    """logits: (N, V), unprocessed, any float dtype. tokens: (N,) int64 within the vocabulary."""
    step = rows_at_once(logits.shape[1], logits.device)
    chunks = zip(torch.split(logits, step), torch.split(tokens[:, None], step), strict=True)
    parts = [_rank(rows.float(), own, k) for rows, own in chunks]
    token_ids, values, ranks = (torch.cat(columns) for columns in zip(*parts, strict=True))
    return RankedLogprobs(token_ids, values, ranks)


def _rank(logits: Tensor, tokens_N1: Tensor, k: int) -> tuple[Tensor, Tensor, Tensor]:
    own_N1 = logits.gather(1, tokens_N1)
    top, top_ids = logits.topk(min(k, logits.shape[1]))
    values = torch.cat((own_N1, top), 1) - logits.logsumexp(-1, keepdim=True)
    likelier = torch.gt(logits, own_N1, out=torch.empty_like(logits)).sum(-1)
    return torch.cat((tokens_N1, top_ids), 1), values, likelier.long() + 1


def prompt_logprobs(logits: Tensor, targets: Tensor, k: int) -> list[TokenLogprobs]:
    """Log-probabilities of prompt tokens. Row i of `logits` (N, V) is the prediction of targets[i].

    The first token of a prompt has none, so a whole prompt gives rows 0 to N - 2 and targets 1 to N - 1.
    Raises InvalidLogits when a row has NaN or infinity.
    """
    found = rank_logprobs(logits, targets, k).to_host([k] * len(targets))
    for i, entry in enumerate(found):
        if entry.token.logprob != entry.token.logprob:
            raise InvalidLogits(f"The model's logits at prompt position {i} are not finite.")
    return found
