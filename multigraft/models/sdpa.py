"""Attention by torch's scaled_dot_product_attention over gathered pages: the CPU's prompts, and CUDA's fallback."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import torch
import torch.nn.functional as F

from multigraft.core.batch import Batch, Phase, Span
from multigraft.kvcache.tensors import PagedKV


@dataclass(slots=True)
class _Decode:
    """Rows with one new token and contexts of similar length, attended in one call."""

    rows: slice | torch.Tensor
    pages: torch.Tensor
    """(B * N,) page numbers, N pages a row, padded with the row's own first page."""
    lengths: torch.Tensor
    """(B, 1): keys of each row, its own included."""
    masks: dict[int | None, torch.Tensor] = field(default_factory=dict)
    """By window: (B, 1, 1, N * P), additive."""


@dataclass(slots=True)
class _Prefill:
    """Spans with no earlier context and the same length (num of them, adjacent), or one span with context."""

    first: int
    num: int
    length: int
    start: int
    pages: torch.Tensor | None
    masks: dict[int | None, torch.Tensor] = field(default_factory=dict)
    """By window: (length, start + length), additive."""


class SdpaBackend:
    def __init__(self, kv: PagedKV):
        self.kv = kv
        self._rows = torch.empty(0, dtype=torch.long)
        self._fresh: torch.Tensor | None = None
        self._decode: list[_Decode] = []
        self._prefill: list[_Prefill] = []

    def begin(self, batch: Batch) -> None:
        p = self.kv.page_size
        fresh, prefill, decode = [], [], []
        row = 0
        for span in batch.spans:
            # A page begun but not filled now keeps a former tenant's tail: a NaN there would survive any mask.
            if span.stop % p and span.start <= span.stop - span.stop % p:
                fresh.append(span.request.pages[span.stop // p])
            (decode if span.phase is Phase.DECODE else prefill).append((row, span))
            row += span.length
        self._rows = self.kv.rows_of(batch.spans)
        self._fresh = torch.tensor(fresh, device=self.kv.k.device) if fresh else None
        self._prefill = self._group_prefill(prefill)
        self._decode = self._group_decode(decode)

    def _group_prefill(self, spans: list[tuple[int, Span]]) -> list[_Prefill]:
        groups: list[_Prefill] = []
        for row, span in spans:
            last = groups[-1] if groups else None
            if span.start:
                pages = torch.tensor(span.request.pages[: -(-span.stop // self.kv.page_size)], device=self.kv.k.device)
                groups.append(_Prefill(row, 1, span.length, span.start, pages))
            elif last and not last.start and last.length == span.length:
                last.num += 1
            else:
                groups.append(_Prefill(row, 1, span.length, 0, None))
        return groups

    def _group_decode(self, spans: list[tuple[int, Span]]) -> list[_Decode]:
        buckets: dict[int, list[tuple[int, Span]]] = {}
        for row, span in spans:
            num_pages = -(-span.stop // self.kv.page_size)
            buckets.setdefault(max(8, num_pages - 1).bit_length(), []).append((row, span))
        return [self._decode_group(bucket) for bucket in buckets.values()]

    def _decode_group(self, spans: list[tuple[int, Span]]) -> _Decode:
        device, p = self.kv.k.device, self.kv.page_size
        width = max(-(-span.stop // p) for _, span in spans)
        table = np.empty((len(spans), width), dtype=np.int64)
        for i, (_, span) in enumerate(spans):
            pages = span.request.pages[: -(-span.stop // p)]
            table[i, : len(pages)] = pages
            table[i, len(pages) :] = pages[0]
        rows = [row for row, _ in spans]
        contiguous = rows[-1] - rows[0] + 1 == len(rows)
        return _Decode(
            rows=slice(rows[0], rows[-1] + 1) if contiguous else torch.tensor(rows, device=device),
            pages=torch.from_numpy(table.reshape(-1)).to(device),
            lengths=torch.tensor([[span.stop] for _, span in spans], device=device),
        )

    def attend(
        self,
        layer: int,
        q_THD: torch.Tensor,
        k_TKD: torch.Tensor,
        v_TKD: torch.Tensor,
        scaling: float,
        window: int | None,
        softcap: float | None,
    ) -> torch.Tensor:
        k_cache, v_cache = self.kv.k[layer], self.kv.v[layer]
        if self._fresh is not None:
            k_cache.index_fill_(0, self._fresh, 0)
            v_cache.index_fill_(0, self._fresh, 0)
        self.kv.write(layer, self._rows, k_TKD, v_TKD)
        if len(self._decode) == 1 and not self._prefill:
            return self._attend_decode(self._decode[0], layer, q_THD, scaling, window, softcap)
        out = torch.empty(q_THD.shape, dtype=q_THD.dtype, device=q_THD.device)
        for p in self._prefill:
            rows = slice(p.first, p.first + p.num * p.length)
            if p.pages is None:
                k, v = (t[rows].unflatten(0, (p.num, p.length)) for t in (k_TKD, v_TKD))
            else:
                k, v = (
                    c.index_select(0, p.pages).flatten(0, 1)[None, : p.start + p.length] for c in (k_cache, v_cache)
                )
            q = q_THD[rows].unflatten(0, (p.num, p.length))
            mask = None if p.pages is None and not window else self._prefill_mask(p, window, q)
            o = _sdpa(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), mask, scaling, softcap)
            out[rows] = o.transpose(1, 2).flatten(0, 1)
        for d in self._decode:
            out[d.rows] = self._attend_decode(d, layer, q_THD[d.rows], scaling, window, softcap)
        return out

    def _attend_decode(
        self, d: _Decode, layer: int, q_BHD: torch.Tensor, scaling: float, window: int | None, softcap: float | None
    ) -> torch.Tensor:
        pages = (cache[layer].index_select(0, d.pages) for cache in (self.kv.k, self.kv.v))
        k, v = (p.view(len(d.lengths), -1, *p.shape[2:]).transpose(1, 2) for p in pages)
        # The query heads that share a key head become its query positions: no repeated keys.
        q = q_BHD.unflatten(1, (k.shape[1], -1))
        return _sdpa(q, k, v, self._decode_mask(d, window, q), scaling, softcap).flatten(1, 2)

    def _prefill_mask(self, p: _Prefill, window: int | None, q: torch.Tensor) -> torch.Tensor:
        if window not in p.masks:
            queries = torch.arange(p.start, p.start + p.length, device=q.device)[:, None]
            keys = torch.arange(p.start + p.length, device=q.device)[None]
            unseen = keys > queries
            if window:
                unseen |= keys <= queries - window
            p.masks[window] = _additive(unseen, q.dtype)
        return p.masks[window]

    def _decode_mask(self, d: _Decode, window: int | None, q: torch.Tensor) -> torch.Tensor:
        if window not in d.masks:
            keys = torch.arange(d.pages.numel() // len(d.lengths) * self.kv.page_size, device=q.device)[None]
            unseen = keys >= d.lengths
            if window:
                unseen |= keys < d.lengths - window
            d.masks[window] = _additive(unseen, q.dtype)[:, None, None]
        return d.masks[window]


def _additive(unseen: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    return torch.zeros(unseen.shape, dtype=dtype, device=unseen.device).masked_fill_(unseen, float("-inf"))


def _sdpa(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    mask: torch.Tensor | None,
    scaling: float,
    softcap: float | None,
) -> torch.Tensor:
    """q (B, H, L, D), k and v (B, K, S, D); mask None is causal with L == S."""
    gqa = q.shape[1] != k.shape[1]
    if softcap is None:
        return F.scaled_dot_product_attention(
            q, k, v, attn_mask=mask, is_causal=mask is None, scale=scaling, enable_gqa=gqa
        )
    if gqa:
        k, v = (t.repeat_interleave(q.shape[1] // k.shape[1], dim=1) for t in (k, v))
    scores = torch.tanh(q @ k.transpose(2, 3) * (scaling / softcap)) * softcap
    if mask is None:
        mask = torch.full(scores.shape[-2:], float("-inf"), dtype=q.dtype, device=q.device).triu_(1)
    return (scores + mask).softmax(-1, dtype=torch.float32).to(q.dtype) @ v
