"""Log-probabilities of target tokens, and the gradient of their logits, where ranks may share the vocabulary out.

Shapes: R rows, V logits of this rank.
"""

from __future__ import annotations

import torch
from torch import nn

from multigraft.adapters.site import Site
from multigraft.models.parallel import Group


class Vocabulary:
    """The tokens whose logits this rank computes: all, or a part."""

    def __init__(self, site: Site, group: Group | None):
        """site: the output head's."""
        ((self.first, self.stop),) = site.whole.outputs
        self._group = group if site.shard is not None else None

    @classmethod
    def of(cls, model: nn.Module, sites: list[Site], group: Group | None) -> Vocabulary:
        """model: grafted."""
        head = model.get_output_embeddings()  # type: ignore[operator]
        return cls(sites[head.siblings.point.site], group)

    def trim(self, logits_RV: torch.Tensor) -> torch.Tensor:
        """Without the logits of what pads the last rank's part."""
        num = self.stop - self.first
        return logits_RV if logits_RV.shape[1] == num else logits_RV[:, :num]

    def score(self, logits_RV: torch.Tensor, ids_R: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """(log-probabilities of the ids, log-sum-exps of all logits, ids of the likeliest tokens), each (R,).

        logits: float32, trimmed. One collective, of 16 bytes a row and rank.
        """
        own, place = self._own(ids_R)
        picked = logits_RV.gather(1, place)[:, 0].where(own, 0.0)
        lse, (peak, best) = logits_RV.logsumexp(-1), logits_RV.max(-1)
        best = best + self.first
        if self._group is not None:
            lses, picks, peaks, bests = self._group.all_gather(torch.stack([lse, picked, peak, best.float()])).unbind(1)
            lse, picked = lses.logsumexp(0), picks.sum(0)
            best = bests.gather(0, peaks.argmax(0)[None])[0].long()  # exact: ids are below 2^24
        return picked - lse, lse, best

    def gradient_(
        self, logits_RV: torch.Tensor, ids_R: torch.Tensor, lse_R: torch.Tensor, c_R: torch.Tensor
    ) -> torch.Tensor:
        """That of sum(c * log-probabilities) by the logits, in their place."""
        own, place = self._own(ids_R)
        c = c_R[:, None]
        d = logits_RV.sub_(lse_R[:, None]).exp_().mul_(-c)
        return d.scatter_add_(1, place, c * own[:, None])

    def _own(self, ids_R: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Which ids are in the part, (R,), and their columns, (R, 1)."""
        own = (ids_R >= self.first) & (ids_R < self.stop)
        return own, (ids_R - self.first).clamp(0, self.stop - self.first - 1)[:, None]
