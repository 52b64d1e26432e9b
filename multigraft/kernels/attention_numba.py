"""Attention of decoding rows on the CPU, straight from the pages of the KV cache: nothing is gathered or padded.

A unit of work is one row and some of its key heads, whose keys and values lie side by side in a page. What bounds it
is the memory, so each page's successor is fetched while it is worked on.
"""

from __future__ import annotations

import ctypes
from functools import cache
from typing import Any

import numpy as np
import torch
from numba import carray

from .jit import (
    VERSION,
    add_rows,
    exp_of_negative,
    float_at,
    inlined,
    int64_at,
    kernel,
    load,
    next_unit,
    prefetch,
    size_of,
    store,
)
from .openmp import run_on_team

UNITS_A_THREAD = 4
"""With fewer rows than this for each thread, key heads become units of their own."""
CACHE_LINE = 64


class _Arguments(ctypes.Structure):
    _fields_ = (
        *((name, ctypes.c_int64) for name in (
            "counter", "q", "q_row", "q_head", "k", "v", "out", "lengths", "pages", "pages_a_row",
            "num_rows", "num_kv_heads", "heads_a_unit", "page_size", "window",
        )),
        ("scaling", ctypes.c_float),
        ("softcap", ctypes.c_float),
    )  # fmt: skip


def attend_decode(
    q_BHD: torch.Tensor,
    k_NPKD: torch.Tensor,
    v_NPKD: torch.Tensor,
    pages: np.ndarray,
    lengths: np.ndarray,
    scaling: float,
    window: int | None,
    softcap: float | None,
) -> torch.Tensor:
    """(B, H, D): each row's attention over its own keys, bf16 or float32; sums are float32 and rounded once.

    k, v: a layer's N pages of P tokens, contiguous. pages: (B, n) int64, each row's page numbers, whatever where
    there are no more. lengths: (B,) int64 keys of each row, at least 1, its own included.
    window: keys at most window - 1 positions back; softcap: bound of the scores.
    """
    (num_rows, heads, dim), (_, page_size, kv_heads, _) = q_BHD.shape, k_NPKD.shape
    assert k_NPKD.is_contiguous() and v_NPKD.is_contiguous() and q_BHD.stride(2) == 1
    out = torch.empty(q_BHD.shape, dtype=q_BHD.dtype)
    whole_rows = num_rows >= UNITS_A_THREAD * torch.get_num_threads()
    arguments = _Arguments(
        0, q_BHD.data_ptr(), q_BHD.stride(0), q_BHD.stride(1), k_NPKD.data_ptr(), v_NPKD.data_ptr(), out.data_ptr(),
        lengths.ctypes.data, pages.ctypes.data, pages.shape[1],
        num_rows, kv_heads, kv_heads if whole_rows else 1, page_size, window or 0, scaling, softcap or 0.0,
    )  # fmt: skip
    run_on_team(compiled(q_BHD.dtype, dim, heads // kv_heads).address, arguments)
    return out


@cache
def compiled(dtype: torch.dtype, head_dim: int, group: int) -> Any:
    """group: query heads of a key head."""
    return _compile({torch.bfloat16: True, torch.float32: False}[dtype], head_dim, group, VERSION)


@inlined
def _scores(scores, stride, q, k, dim, group, half):
    """scores[g * stride] = q_g · k for each query head g of a key head; q float32 (group, dim)."""
    for g in range(group):
        s = np.float32(0)
        for d in range(dim):
            s += float_at(q)[g * dim + d] * load(k, d, half)
        float_at(scores)[g * stride] = s


@inlined
def _softmax(scores, n, scaling, softcap):
    """Turns n scores into weights, the largest 1, and returns their sum."""
    if softcap > 0:
        for i in range(n):
            z = float_at(scores)[i] * (scaling / softcap)
            e = exp_of_negative(np.float32(-2) * abs(z))
            t = softcap * (np.float32(1) - e) / (np.float32(1) + e)
            float_at(scores)[i] = t if z > 0 else -t
    factor = np.float32(1) if softcap > 0 else scaling
    largest = float_at(scores)[0]
    for i in range(n):
        largest = max(largest, float_at(scores)[i])
    total = np.float32(0)
    for i in range(n):
        w = exp_of_negative((float_at(scores)[i] - largest) * factor)
        float_at(scores)[i] = w
        total += w
    return total


@inlined
def _page(cache, a, row, n, token):
    """Address of page n of a row; of its last one for what would come after."""
    n = min(n, (int64_at(a.lengths)[row] - 1) // a.page_size)
    return cache + int64_at(a.pages)[row * a.pages_a_row + n] * a.page_size * token


@inlined
def _fetch(start, stop):
    for address in range(start, stop, CACHE_LINE):
        prefetch(address)


@inlined
def _score_keys(scores, most, q, keys, a, row, start, length, token, dim, group, half):
    """Scores of the positions from start to length, most for each head."""
    for n in range(start // a.page_size, (length - 1) // a.page_size + 1):
        page, following = _page(keys, a, row, n, token), _page(keys, a, row, n + 1, token)
        for t in range(max(start, n * a.page_size), min(length, (n + 1) * a.page_size)):
            offset = (t - n * a.page_size) * token
            _fetch(following + offset, following + offset + token)
            for h in range(a.heads_a_unit):
                at, k = scores + 4 * (h * group * most + t - start), page + offset + size_of(half) * h * dim
                _scores(at, most, q + 4 * h * group * dim, k, dim, group, half)


@inlined
def _sum_values(sums, scores, most, values, a, row, start, length, token, dim, group, half):
    """Adds up the values of the positions from start to length, in proportion to their scores."""
    for n in range(start // a.page_size, (length - 1) // a.page_size + 1):
        page, following = _page(values, a, row, n, token), _page(values, a, row, n + 1, token)
        stop = min(length, (n + 1) * a.page_size)
        for t in range(max(start, n * a.page_size), stop, 4):
            offset, num = (t - n * a.page_size) * token, min(4, stop - t)
            _fetch(following + offset, following + offset + num * token)
            for h in range(a.heads_a_unit * group):
                v = page + offset + size_of(half) * (h // group) * dim
                at = scores + 4 * (h * most + t - start)
                add_rows(sums + 4 * h * dim, at, v, a.num_kv_heads * dim, num, dim, half)


@inlined
def _attend_unit(a, row, first_head, scratch, most, dim, group, half):
    """Key heads from first_head on of one row. scratch: for each query head `most` scores, dim sums and a total."""
    heads, size = a.heads_a_unit * group, size_of(half)
    length = int64_at(a.lengths)[row]
    start = max(0, length - a.window) if a.window > 0 else 0
    token, offset = size * a.num_kv_heads * dim, size * first_head * dim
    sums = scratch + 4 * heads * most
    totals = sums + 4 * heads * dim
    for h in range(heads):
        q = a.q + size * (row * a.q_row + (first_head * group + h) * a.q_head)
        for d in range(dim):
            float_at(sums)[h * dim + d] = load(q, d, half)
    _score_keys(scratch, most, sums, a.k + offset, a, row, start, length, token, dim, group, half)
    for h in range(heads):
        float_at(totals)[h] = _softmax(scratch + 4 * h * most, length - start, a.scaling, a.softcap)
        for d in range(dim):
            float_at(sums)[h * dim + d] = 0
    _sum_values(sums, scratch, most, a.v + offset, a, row, start, length, token, dim, group, half)
    out = a.out + size * (row * a.num_kv_heads + first_head) * group * dim
    for h in range(heads):
        for d in range(dim):
            store(out, h * dim + d, float_at(sums)[h * dim + d] / float_at(totals)[h], half)


def _compile(half: bool, dim: int, group: int, version: int):
    @kernel(_Arguments)
    def attend(arguments):
        _ = version
        a = carray(arguments, 1)[0]
        most = a.pages_a_row * a.page_size
        scratch = np.empty(a.heads_a_unit * group * (most + dim + 1), dtype=np.float32)
        units_a_row = a.num_kv_heads // a.heads_a_unit
        while True:
            unit = next_unit(a.counter)
            if unit >= a.num_rows * units_a_row:
                return
            row, first_head = unit // units_a_row, unit % units_a_row * a.heads_a_unit
            _attend_unit(a, row, first_head, scratch.ctypes.data, most, dim, group, half)

    return attend
