"""Attention of decode rows over paged keys and values, in one Triton kernel.

A row is one new token of a request. A program takes one key/value head of one row, with all query heads that share it,
and one part of the row's context. The row's own key and value come from the step, not from the pages: the program of
the first part begins with them and stores them, so nothing else writes the cache. Rows with a long context are cut into
parts; whichever program ends last adds the parts up, always in their order, so equal inputs give equal bits.

Shapes: T rows, H query heads, K key/value heads, D head size, P page size. The grid depends on the shapes alone and
nothing waits for the host, so a launch can be captured in a CUDA graph while page tables change between replays.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

PART = 256
"""Keys of a part at least; a longer context has up to `num_parts` parts of equal length."""
PROGRAMS = 2048
"""Wanted of a launch, by cutting contexts: about 15 for each of an H100's processors."""
MAX_PARTS = 64
FEW_ROWS = 64
BLOCKS = {True: (64, 4, 3), False: (32, 2, 2)}
"""Keys of a block, warps, stages, by whether there are fewer than FEW_ROWS rows. Llama-3.1-8B, context 288, H200,
us a layer: 1 row 10 with the former, 15 with the latter, 16 rows 15 and 20, 64 rows 31 and 30, 256 rows 117 and 94."""
LOG2E = tl.constexpr(1.4426950408889634)


@triton.jit
def _in_log2(s, scale, SOFTCAP: tl.constexpr):
    """Scores of which exp2 is to be taken."""
    s *= scale
    if SOFTCAP > 0:
        s = SOFTCAP * (2 * tl.sigmoid(2 * s / SOFTCAP) - 1)  # SOFTCAP * tanh(s / SOFTCAP)
    return s * LOG2E


@triton.jit
def _decode_kernel(
    out, q, k_new, v_new, k_cache, v_cache, pages, indptr, positions, partial, counters, scale,
    q_stride, k_new_stride, v_new_stride, page_stride, token_stride,
    HEADS: tl.constexpr, GROUP: tl.constexpr, BLOCK_G: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr,
    P: tl.constexpr, WINDOW: tl.constexpr, SOFTCAP: tl.constexpr, PART: tl.constexpr, PARTS: tl.constexpr,
    BLOCK_N: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    head, row, part = tl.program_id(0), tl.program_id(1).to(tl.int64), tl.program_id(2)
    position = tl.load(positions + row).to(tl.int32)  # as many keys lie in the pages
    table = pages + tl.load(indptr + row)
    first = 0
    if WINDOW > 0:
        first = tl.maximum(position - WINDOW + 1, 0)
    size = tl.maximum(tl.cdiv(position - first, PARTS), PART)
    size = tl.cdiv(size, BLOCK_N) * BLOCK_N
    num_parts = tl.maximum(tl.cdiv(position - first, size), 1)
    if part >= num_parts:
        return

    offs_g, offs_d, offs_n = tl.arange(0, BLOCK_G), tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_N)
    in_g, in_d = offs_g < GROUP, offs_d < D
    gd = in_g[:, None] & in_d[None, :]
    q_gd = q + row * q_stride + (head * GROUP + offs_g)[:, None] * D + offs_d[None, :]
    q_gd = tl.load(q_gd, mask=gd, other=0.0)
    high = tl.full((BLOCK_G,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK_G,), tl.float32)
    acc = tl.zeros((BLOCK_G, BLOCK_D), tl.float32)
    k_cache += head * D
    v_cache += head * D
    if part == 0:
        k_d = tl.load(k_new + row * k_new_stride + head * D + offs_d, mask=in_d, other=0.0)
        v_d = tl.load(v_new + row * v_new_stride + head * D + offs_d, mask=in_d, other=0.0)
        page = tl.load(table + position // P).to(tl.int64)
        where = page * page_stride + (position % P) * token_stride + offs_d
        tl.store(k_cache + where, k_d, mask=in_d)
        tl.store(v_cache + where, v_d, mask=in_d)
        high = _in_log2(tl.sum(q_gd.to(tl.float32) * k_d.to(tl.float32)[None, :], axis=1), scale, SOFTCAP)
        total += 1.0
        acc += v_d.to(tl.float32)[None, :]

    start = first + part * size
    stop = tl.minimum(start + size, position)
    for n in tl.range(start, stop, BLOCK_N, num_stages=STAGES):
        at = n + offs_n
        in_n = at < stop
        page = tl.load(table + at // P, mask=in_n, other=0).to(tl.int64)
        where = (page * page_stride + (at % P) * token_stride)[:, None] + offs_d[None, :]
        nd = in_n[:, None] & in_d[None, :]
        k_nd = tl.load(k_cache + where, mask=nd, other=0.0)
        s = _in_log2(tl.dot(q_gd, tl.trans(k_nd), input_precision="ieee"), scale, SOFTCAP)
        s = tl.where(in_n[None, :], s, float("-inf"))
        higher = tl.maximum(high, tl.max(s, axis=1))
        p = tl.exp2(s - higher[:, None])
        shrunk = tl.exp2(high - higher)
        total = total * shrunk + tl.sum(p, axis=1)
        v_nd = tl.load(v_cache + where, mask=nd, other=0.0)
        acc = tl.dot(p.to(v_nd.dtype), v_nd, acc * shrunk[:, None], input_precision="ieee")
        high = higher

    out_gd = out + row * HEADS * GROUP * D + (head * GROUP + offs_g)[:, None] * D + offs_d[None, :]
    if num_parts == 1:
        tl.store(out_gd, (acc / total[:, None]).to(out.dtype.element_ty), mask=gd)
        return
    # (parts, GROUP, D + 2) of the row and head: sums, then the highest score and the total weight.
    mine = partial + ((row * HEADS + head) * PARTS) * (GROUP * (D + 2))
    here = mine + part * (GROUP * (D + 2)) + offs_g * (D + 2)
    tl.store(here[:, None] + offs_d[None, :], acc, mask=gd)
    tl.store(here + D, high, mask=in_g)
    tl.store(here + D + 1, total, mask=in_g)
    tl.debug_barrier()
    ended = tl.atomic_add(counters + row * HEADS + head, 1, sem="acq_rel")
    if ended < num_parts - 1:
        return
    tl.store(counters + row * HEADS + head, 0)  # for the next launch
    tl.debug_barrier()
    high = tl.full((BLOCK_G,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK_G,), tl.float32)
    acc = tl.zeros((BLOCK_G, BLOCK_D), tl.float32)
    for i in range(num_parts):
        there = mine + i * (GROUP * (D + 2)) + offs_g * (D + 2)
        h = tl.load(there + D, mask=in_g, other=0.0, cache_modifier=".cg")
        weight = tl.load(there + D + 1, mask=in_g, other=1.0, cache_modifier=".cg")
        a = tl.load(there[:, None] + offs_d[None, :], mask=gd, other=0.0, cache_modifier=".cg")
        higher = tl.maximum(high, h)
        old, new = tl.exp2(high - higher), tl.exp2(h - higher)
        acc = acc * old[:, None] + a * new[:, None]
        total = total * old + weight * new
        high = higher
    tl.store(out_gd, (acc / total[:, None]).to(out.dtype.element_ty), mask=gd)


class DecodeAttention:
    """The kernel with the memory that it needs, for up to max_rows rows at once."""

    def __init__(self, max_rows: int, num_heads: int, num_kv_heads: int, head_dim: int, device: torch.device):
        self.num_kv_heads = num_kv_heads
        most = max(n * num_parts(n, num_kv_heads) for n in {1, *range(1, max_rows + 1)})
        group = num_heads // num_kv_heads
        self._partial = torch.empty(most * num_kv_heads * group * (head_dim + 2), dtype=torch.float32, device=device)
        self._counters = torch.zeros(max_rows * num_kv_heads, dtype=torch.int32, device=device)

    def __call__(
        self,
        out_THD: torch.Tensor,
        q_THD: torch.Tensor,
        k_TKD: torch.Tensor,
        v_TKD: torch.Tensor,
        k_cache: torch.Tensor,
        v_cache: torch.Tensor,
        pages: torch.Tensor,
        indptr: torch.Tensor,
        positions: torch.Tensor,
        scaling: float,
        window: int | None = None,
        softcap: float | None = None,
    ) -> None:
        """Write the outputs to out, contiguous, and the rows' keys and values to the caches, (pages, P, K, D) each.

        pages: int32, row i's from indptr[i] (int32, at least T) on, the page of its own position included;
        positions: int (T,), of each row in its request. window: keys at most window - 1 positions back; softcap: bound
        of the scores.
        """
        num_rows, num_heads, head_dim = q_THD.shape
        group = num_heads // self.num_kv_heads
        q, k, v = (_rows_whole(t) for t in (q_THD, k_TKD, v_TKD))
        parts = num_parts(num_rows, self.num_kv_heads)
        block, num_warps, num_stages = BLOCKS[num_rows < FEW_ROWS]
        _decode_kernel[(self.num_kv_heads, num_rows, parts)](
            out_THD, q, k, v, k_cache, v_cache, pages, indptr, positions, self._partial, self._counters, scaling,
            q.stride(0), k.stride(0), v.stride(0), k_cache.stride(0), k_cache.stride(1),
            HEADS=self.num_kv_heads, GROUP=group, BLOCK_G=max(16, triton.next_power_of_2(group)), D=head_dim,
            BLOCK_D=triton.next_power_of_2(head_dim), P=k_cache.shape[1], WINDOW=window or 0, SOFTCAP=softcap or 0.0,
            PART=PART, PARTS=parts, BLOCK_N=block, STAGES=num_stages, num_warps=num_warps,
        )  # fmt: skip


def num_parts(num_rows: int, num_kv_heads: int) -> int:
    """Into how many parts a context is cut at most."""
    wanted = triton.next_power_of_2(triton.cdiv(PROGRAMS, num_rows * num_kv_heads))
    return max(8, min(wanted, MAX_PARTS))


def _rows_whole(t: torch.Tensor) -> torch.Tensor:
    """Each row's heads one after another; rows may be apart, as in a view of a wider projection."""
    return t if t.stride(2) == 1 and t.stride(1) == t.shape[2] else t.contiguous()
