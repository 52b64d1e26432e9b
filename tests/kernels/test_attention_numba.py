"""Decode attention on the CPU against float64, row by row; what no row owns in the pages is NaN."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from multigraft.kernels.attention_numba import attend_decode

PAGE = 5
LENGTHS = [1, 4, 5, 6, 33, 12, 20]
CASES = [
    (torch.float32, 9, 3, 64),
    (torch.float32, 4, 4, 16),
    (torch.float32, 2, 1, 24),
    (torch.bfloat16, 9, 3, 64),
    (torch.bfloat16, 2, 1, 24),
]
"""Each dtype, heads per key head and head size is compiled for 2 to 3 s: most are those of a model that other tests
run."""


def reference(
    q_HD: torch.Tensor, k_SKD: torch.Tensor, v_SKD: torch.Tensor, scaling: float, window: int | None, cap: float | None
) -> torch.Tensor:
    k, v = (t.double().repeat_interleave(len(q_HD) // t.shape[1], dim=1) for t in (k_SKD, v_SKD))
    if window:
        k, v = k[-window:], v[-window:]
    scores = torch.einsum("hd,shd->hs", q_HD.double(), k) * scaling
    if cap:
        scores = cap * torch.tanh(scores / cap)
    return torch.einsum("hs,shd->hd", scores.softmax(-1), v)


@pytest.mark.parametrize("window, cap", [(None, None), (3, None), (8, 2.5), (None, 30.0)])
@pytest.mark.parametrize("dtype, heads, kv_heads, dim", CASES, ids=str)
@pytest.mark.parametrize("threads", [1, 3])
def test_rows_of_any_length(threads, dtype, heads, kv_heads, dim, window, cap):
    tolerance = {torch.float32: 3e-6, torch.bfloat16: 6e-3}[dtype]
    torch.manual_seed(0)
    most = -(-max(LENGTHS) // PAGE)
    pages = np.random.default_rng(0).permutation(len(LENGTHS) * most).reshape(len(LENGTHS), most)
    k, v = (torch.full((pages.size, PAGE, kv_heads, dim), torch.nan, dtype=dtype) for _ in range(2))
    for row, length in enumerate(LENGTHS):
        for t in range(length):
            for cache in (k, v):
                cache[pages[row, t // PAGE], t % PAGE] = torch.randn(kv_heads, dim).to(dtype)
    q = (3 * torch.randn(heads, len(LENGTHS), dim)).to(dtype).transpose(0, 1)  # as transformers hands it over
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    out = attend_decode(q, k, v, pages, np.array(LENGTHS), dim**-0.5, window, cap)
    torch.set_num_threads(before)
    assert out.dtype == dtype
    for row, length in enumerate(LENGTHS):
        own = [cache[pages[row]].flatten(0, 1)[:length] for cache in (k, v)]
        want = reference(q[row], *own, dim**-0.5, window, cap)
        error = (out[row].double() - want).norm()
        assert error <= tolerance * want.norm(), (row, float(error))


def test_a_nan_among_a_rows_own_keys_shows_in_that_row_alone():
    k, v = torch.randn(4, PAGE, 2, 16), torch.randn(4, PAGE, 2, 16)
    k[2, 3, 1, 0] = torch.nan
    pages = np.array([[0, 1], [2, 3]])
    out = attend_decode(torch.randn(2, 4, 16), k, v, pages, np.array([7, 7]), 0.3, None, None)
    assert out[0].isfinite().all() and out[1, :2].isfinite().all() and out[1, 2:].isnan().all()
