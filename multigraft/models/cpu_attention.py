"""Attention on the CPU: decoding rows read their pages in place, through our own kernel; prompts go through SDPA."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from multigraft.core.batch import Batch, Span
from multigraft.kernels.attention_numba import attend_decode, compiled
from multigraft.kvcache.tensors import PagedKV
from multigraft.models.sdpa import SdpaBackend


@dataclass(frozen=True, slots=True)
class _Rows:
    """All decoding rows of a step, whatever their lengths; adjacent, as phases are in order."""

    rows: slice
    pages: np.ndarray
    """(B, n) int64, zeros where a row has fewer."""
    lengths: np.ndarray
    """(B,) int64 keys of each row, its own included."""


class CpuBackend(SdpaBackend):
    def __init__(self, kv: PagedKV, num_heads: int):
        """num_heads: query heads."""
        super().__init__(kv)
        _, _, _, kv_heads, head_dim = kv.k.shape
        compiled(kv.k.dtype, head_dim, num_heads // kv_heads)  # so that no request waits for it

    def begin(self, batch: Batch) -> None:
        super().begin(batch)
        self._fresh = None  # what lies past a row's own keys is never read

    def _group_decode(self, spans: list[tuple[int, Span]]) -> list[_Rows]:
        if not spans:
            return []
        lengths = np.array([span.stop for _, span in spans])
        counts = -(-lengths // self.kv.page_size)
        pages = np.zeros((len(spans), counts.max()), dtype=np.int64)
        for row, count, (_, span) in zip(pages, counts, spans, strict=True):
            row[:count] = span.request.pages[:count]
        return [_Rows(slice(spans[0][0], spans[-1][0] + 1), pages, lengths)]

    def _attend_decode(
        self, d: _Rows, layer: int, q_BHD: torch.Tensor, scaling: float, window: int | None, softcap: float | None
    ) -> torch.Tensor:
        return attend_decode(q_BHD, self.kv.k[layer], self.kv.v[layer], d.pages, d.lengths, scaling, window, softcap)
