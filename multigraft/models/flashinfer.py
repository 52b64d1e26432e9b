"""Attention on CUDA: prompts by FlashInfer's paged kernel, decode rows by ours. The package is optional and imported
when it is used."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
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


@dataclass(frozen=True, slots=True)
class FixedSpans:
    """Device buffers that a captured step reads its page tables from, prompts and decode rows alike."""

    num_rows: int
    row_indptr: torch.Tensor
    """(spans + 1,) int32."""
    page_indptr: torch.Tensor
    """(spans + 1,) int32."""
    pages: torch.Tensor
    """int32, as many as the spans may have at most."""
    last_page_len: torch.Tensor
    """(spans,) int32."""
    kv_rows: torch.Tensor
    """(num_rows,) int64."""
    wrappers: dict[tuple[Any, ...], Any] = field(default_factory=dict)
    """FlashInfer's, by maths."""

    @classmethod
    def make(cls, num_spans: int, pages: torch.Tensor, kv_rows: torch.Tensor) -> FixedSpans:
        def zeros(count: int) -> torch.Tensor:
            return torch.zeros(count, dtype=torch.int32, device=pages.device)

        return cls(len(kv_rows), zeros(num_spans + 1), zeros(num_spans + 1), pages, zeros(num_spans), kv_rows)


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
        self._fixed: FixedSpans | None = None

    def begin(self, batch: Batch) -> None:
        self._plans_copied.synchronize()  # a wrapper keeps its plan in one pinned buffer, and the host may be ahead
        prompts = [s for s in batch.spans if s.phase is not Phase.DECODE]
        decode = [s for s in batch.spans if s.phase is Phase.DECODE]
        self._prompts = _Prompts.of(prompts, self.kv) if prompts else None
        self._decode = DecodeRows.of(decode, self.kv) if decode else None
        self._fixed = None
        self._planned.clear()

    def begin_fixed(self, rows: DecodeRows | FixedSpans) -> None:
        """Prepare to capture a step whose kernels read these buffers whenever they run: decode rows alone, or any."""
        self._prompts = None
        self._decode, self._fixed = (None, rows) if isinstance(rows, FixedSpans) else (rows, None)

    def plan_fixed(self, fixed: FixedSpans, spans: Sequence[Span]) -> None:
        """Fill the buffers, but for kv_rows, for the spans of a step that is to be captured or replayed; none: for as
        many rows as it has at most."""
        self._plans_copied.synchronize()
        tables = self._fixed_tables(fixed, spans)
        for maths, wrapper in fixed.wrappers.items():
            _plan(wrapper, maths, self.kv, *tables, fixed=True)
        self._plans_copied.record()

    def _fixed_tables(self, fixed: FixedSpans, spans: Sequence[Span]) -> tuple[torch.Tensor, ...]:
        """What _plan takes, of as many spans as `fixed` has room for; none: see plan_fixed."""
        room = len(fixed.last_page_len)
        lengths, stops = np.zeros(room, np.int32), np.zeros(room, np.int32)
        if spans:
            lengths[: len(spans)] = [s.length for s in spans]
            stops[: len(spans)] = [s.stop for s in spans]
        else:
            lengths[:], stops[:] = 1, 1
            lengths[0] = stops[0] = fixed.num_rows - room + 1
        p = self.kv.page_size
        counts = -(-stops // p)
        pages = gather_pages(spans, counts[: len(spans)]) if spans else np.zeros(int(counts.sum()), np.int32)
        last_page_len = torch.from_numpy(stops - p * np.maximum(counts - 1, 0))
        return _indptr(lengths), _indptr(counts), upload(torch.from_numpy(pages), self.kv.k.device), last_page_len

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
        if self._fixed is not None:
            self.kv.write(layer, self._fixed.kv_rows, k_TKD, v_TKD)
            wrapper = self._fixed_wrapper(self._fixed, (q_THD.shape[1], scaling, window, softcap))
            return wrapper.run(q_THD.contiguous(), (k_pages, v_pages))
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
            p = prompts
            _plan(wrapper, maths, self.kv, p.row_indptr, p.page_indptr, p.pages, p.last_page_len)
            self._plans_copied.record()
        return wrapper

    def _fixed_wrapper(self, fixed: FixedSpans, maths: tuple[Any, ...]) -> Any:
        """The wrapper for this maths; made, and planned for as many rows as there may be, before a capture."""
        if maths not in fixed.wrappers:
            wrapper = fixed.wrappers[maths] = self._library.BatchPrefillWithPagedKVCacheWrapper(
                self._workspace, "NHD", backend="fa2", use_cuda_graph=True,
                qo_indptr_buf=fixed.row_indptr, paged_kv_indptr_buf=fixed.page_indptr,
                paged_kv_indices_buf=fixed.pages, paged_kv_last_page_len_buf=fixed.last_page_len,
            )  # fmt: skip
            _plan(wrapper, maths, self.kv, *self._fixed_tables(fixed, ()), fixed=True)
            self._plans_copied.record()
        return fixed.wrappers[maths]


def _plan(
    wrapper: Any,
    maths: tuple[Any, ...],
    kv: PagedKV,
    row_indptr: torch.Tensor,
    page_indptr: torch.Tensor,
    pages: torch.Tensor,
    last_page_len: torch.Tensor,
    fixed: bool = False,
) -> None:
    """fixed: for a captured step. Contexts are not split there: partial results of as many splits as there could be
    would take 670 MB for 2,048 rows."""
    num_heads, scaling, window, softcap = maths
    _, _, page_size, num_kv_heads, head_dim = kv.k.shape
    wrapper.plan(
        row_indptr, page_indptr, pages, last_page_len, num_heads, num_kv_heads, head_dim, page_size,
        causal=True,
        disable_split_kv=fixed,
        sm_scale=scaling,
        window_left=window - 1 if window else -1,
        logits_soft_cap=softcap,
        q_data_type=kv.k.dtype,
        kv_data_type=kv.k.dtype,
    )  # fmt: skip


def gather_pages(spans: Sequence[Span], counts: np.ndarray) -> np.ndarray:
    """int32: the first counts[i] pages of every span's request, one after another."""
    each = zip(spans, counts.tolist(), strict=True)
    pages = chain.from_iterable(span.request.pages[:count] for span, count in each)
    return np.fromiter(pages, dtype=np.int32, count=int(counts.sum()))


def _indptr(lengths: np.ndarray) -> torch.Tensor:
    out = np.zeros(len(lengths) + 1, dtype=np.int32)
    np.cumsum(lengths, out=out[1:])
    return torch.from_numpy(out)
