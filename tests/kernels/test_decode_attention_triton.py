"""Decode attention in Triton against plain attention over each row's own keys."""

from __future__ import annotations

import pytest
import torch

from multigraft.kernels import decode_attention_triton as kernel
from tests.kernels.conftest import DEVICE, INTERPRETED

OTHERS = 5
"""Pages of other requests, which the kernel must leave as they are."""


def attend(q, k, v, scaling, cap):  # type: ignore[no-untyped-def]
    """(H, D) for q (H, D), k and v (N, K, D)."""
    k, v = (t.repeat_interleave(len(q) // t.shape[1], 1).double() for t in (k, v))
    scores = torch.einsum("hd,nhd->hn", q.double(), k) * scaling
    scores = scores if cap is None else cap * torch.tanh(scores / cap)
    return torch.einsum("hn,nhd->hd", scores.softmax(-1), v)


@pytest.mark.parametrize(
    ("positions", "heads", "kv_heads", "dim", "page", "window", "cap"),
    [
        ([0, 31, 32, 70], 8, 2, 32, 16, None, None),  # the first token of all, and around a block's edge
        ([900, 3], 4, 4, 16, 16, None, None),  # in parts, beside a row in one
        ([700, 40], 6, 2, 24, 4, 20, None),  # a window that begins inside a page; sizes that are no power of two
        ([600], 4, 1, 16, 16, 300, 5.0),
    ],
)
def test_rows_of_any_length(positions, heads, kv_heads, dim, page, window, cap, monkeypatch):  # type: ignore[no-untyped-def]
    if INTERPRETED:  # most of 64 parts would find nothing to do, at 1 ms each
        monkeypatch.setattr(kernel, "MAX_PARTS", 8)
    generator = torch.Generator().manual_seed(len(positions))

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator).to(DEVICE)

    counts = [p // page + 1 for p in positions]
    num_pages = sum(counts) + OTHERS
    pages = torch.randperm(num_pages, generator=generator).int()[: sum(counts)].to(DEVICE)
    indptr = torch.tensor([0, *torch.tensor(counts).cumsum(0)], dtype=torch.int32, device=DEVICE)
    caches = [normal(num_pages, page, kv_heads, dim) for _ in range(2)]
    for i, position in enumerate(positions):  # what a former tenant left behind the context
        last = pages[indptr[i + 1] - 1].long()
        for cache in caches:
            cache[last, position % page :] = float("nan")
    before = [cache.clone() for cache in caches]
    n = len(positions)
    wide = normal(n, (heads + 2 * kv_heads) * dim)  # of a fused projection: rows lie apart
    q, k, v = (t.unflatten(1, (-1, dim)) for t in wide.split([heads * dim, kv_heads * dim, kv_heads * dim], 1))
    run = kernel.DecodeAttention(n, heads, kv_heads, dim, device=torch.device(DEVICE))
    rows = torch.tensor(positions, device=DEVICE)
    out, again = torch.full((2, n, heads, dim), float("nan"), device=DEVICE).unbind()
    for result in (out, again):  # the second finds the counters of the first
        run(result, q, k, v, *caches, pages, indptr, rows, dim**-0.5, window, cap)
    assert torch.equal(out, again)
    for i, position in enumerate(positions):
        own = pages[indptr[i] : indptr[i + 1]].long()
        keys, values = (
            torch.cat([cache[own].flatten(0, 1)[:position], new[i : i + 1]])[-(window or 0) :]
            for cache, new in zip(before, (k, v), strict=True)
        )
        expected = attend(q[i], keys, values, dim**-0.5, cap)
        torch.testing.assert_close(out[i].double(), expected, rtol=2e-5, atol=2e-5)
        for cache, old, new in zip(caches, before, (k, v), strict=True):
            place = own[-1], position % page
            assert torch.equal(cache[place], new[i])
            old[place] = new[i]
    for cache, old in zip(caches, before, strict=True):
        assert torch.equal(cache.nan_to_num(), old.nan_to_num()), "another position was written"
