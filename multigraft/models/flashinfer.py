"""Attention on CUDA: prompts by FlashInfer's paged kernel, decode rows by ours. The package is optional and imported
when it is used."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from multigraft.core.batch import Batch, Phase, Span
from multigraft.kvcache.tensors import PagedKV
from multigraft.kvcache.transfer import upload

if TYPE_CHECKING:
    from multigraft.kernels.decode_attention_triton import DecodeAttention

WORKSPACE_BYTES = 256 * 2**20
"""FlashInfer's buffer for split-KV partial results; twice its recommendation, for 256 long rows."""


@dataclass(frozen=True, slots=True)
class _Prompts:
    """The rows of prompts as FlashInfer describes them: int32, on the host."""

    num_rows: int
    row_indptr: torch.Tensor
    page_indptr: torch.Tensor
    pages: torch.Tensor
    """On the device."""
    last_page_len: torch.Tensor
    kv_rows: torch.Tensor
    """As PagedKV.rows_of, on the device."""

    @classmethod
    def of(cls, spans: list[Span], kv: PagedKV) -> _Prompts:
        lengths = np.array([s.length for s in spans], dtype=np.int32)
        counts = np.array([-(-s.stop // kv.page_size) for s in spans], dtype=np.int32)
        return cls(
            num_rows=int(lengths.sum()),
            row_indptr=_indptr(lengths),
            page_indptr=_indptr(counts),
            pages=upload(torch.from_numpy(gather_pages(spans, counts)), kv.k.device),
            last_page_len=torch.tensor([(s.stop - 1) % kv.page_size + 1 for s in spans], dtype=torch.int32),
            kv_rows=kv.rows_of(spans),
        )


@dataclass(frozen=True, slots=True)
class DecodeRows:
    """Page tables of decode rows, on the device."""

    positions: torch.Tensor
    """(rows,) int64."""
    indptr: torch.Tensor
    """(rows + 1,) int32."""
    pages: torch.Tensor
    """int32, at least indptr[-1] of them."""

    @classmethod
    def of(cls, spans: list[Span], kv: PagedKV) -> DecodeRows:
        counts = np.array([-(-s.stop // kv.page_size) for s in spans], dtype=np.int32)
        device = kv.k.device
        return cls(
            positions=upload(torch.tensor([s.start for s in spans]), device),
            indptr=upload(_indptr(counts), device),
            pages=upload(torch.from_numpy(gather_pages(spans, counts)), device),
        )


class FlashInferBackend:
    """Rows that decode and rows that prefill take a kernel each; layers that differ in scale, window or cap are
    planned apart.

    A step is prepared by `begin` or, when a CUDA graph is captured or replayed, by `begin_fixed`.
    """

    def __init__(self, kv: PagedKV, num_heads: int, max_rows: int):
        """num_heads: query heads; max_rows: decode rows of a step at most."""
        import flashinfer

        from multigraft.kernels.decode_attention_triton import DecodeAttention

        self.kv = kv
        self._library = flashinfer
        self._workspace = torch.zeros(WORKSPACE_BYTES, dtype=torch.uint8, device=kv.k.device)
        self._wrappers: dict[tuple[Any, ...], Any] = {}
        self._planned: set[tuple[Any, ...]] = set()
        self._plans_copied = torch.cuda.Event()
        self._decode_kernel: DecodeAttention = DecodeAttention(max_rows, num_heads, *kv.k.shape[3:], device=kv.k.device)
        self._prompts: _Prompts | None = None
        self._decode: DecodeRows | None = None

    def begin(self, batch: Batch) -> None:
        self._plans_copied.synchronize()  # a wrapper keeps its plan in one pinned buffer, and the host may be ahead
        prompts = [s for s in batch.spans if s.phase is not Phase.DECODE]
        decode = [s for s in batch.spans if s.phase is Phase.DECODE]
        self._prompts = _Prompts.of(prompts, self.kv) if prompts else None
        self._decode = DecodeRows.of(decode, self.kv) if decode else None
        self._planned.clear()

    def begin_fixed(self, rows: DecodeRows) -> None:
        """Prepare a step of decode rows alone, whose kernels read these buffers whenever they run."""
        self._prompts, self._decode = None, rows

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
        k_pages, v_pages = self.kv.k[layer], self.kv.v[layer]
        n = 0 if self._prompts is None else self._prompts.num_rows
        out = torch.empty_like(q_THD, memory_format=torch.contiguous_format)
        if self._prompts is not None:
            self.kv.write(layer, self._prompts.kv_rows, k_TKD[:n], v_TKD[:n])
            wrapper = self._wrapper(self._prompts, (q_THD.shape[1], scaling, window, softcap))
            wrapper.run(q_THD[:n].contiguous(), (k_pages, v_pages), out=out[:n])
        if self._decode is not None:
            rows = self._decode
            tables = (k_pages, v_pages, rows.pages, rows.indptr, rows.positions)
            self._decode_kernel(out[n:], q_THD[n:], k_TKD[n:], v_TKD[n:], *tables, scaling, window, softcap)
        return out

    def _wrapper(self, prompts: _Prompts, maths: tuple[Any, ...]) -> Any:
        """The wrapper for this maths, planned for the current step."""
        if maths not in self._wrappers:
            make = self._library.BatchPrefillWithPagedKVCacheWrapper
            self._wrappers[maths] = make(self._workspace, "NHD", backend="fa2")
        wrapper = self._wrappers[maths]
        if maths not in self._planned:
            self._planned.add(maths)
            num_heads, scaling, window, softcap = maths
            _, _, page_size, num_kv_heads, head_dim = self.kv.k.shape
            wrapper.plan(
                prompts.row_indptr, prompts.page_indptr, prompts.pages, prompts.last_page_len,
                num_heads, num_kv_heads, head_dim, page_size, causal=True,
                sm_scale=scaling,
                window_left=window - 1 if window else -1,
                logits_soft_cap=softcap,
                q_data_type=self.kv.k.dtype,
                kv_data_type=self.kv.k.dtype,
            )  # fmt: skip
            self._plans_copied.record()
        return wrapper


def gather_pages(spans: Sequence[Span], counts: np.ndarray) -> np.ndarray:
    """int32: the first counts[i] pages of every span's request, one after another."""
    each = zip(spans, counts.tolist(), strict=True)
    pages = chain.from_iterable(span.request.pages[:count] for span, count in each)
    return np.fromiter(pages, dtype=np.int32, count=int(counts.sum()))


def _indptr(lengths: np.ndarray) -> torch.Tensor:
    out = np.zeros(len(lengths) + 1, dtype=np.int32)
    np.cumsum(lengths, out=out[1:])
    return torch.from_numpy(out)
