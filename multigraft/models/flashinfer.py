"""Attention through FlashInfer's paged kernels, on CUDA. The package is optional and imported when it is used."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

import numpy as np
import torch

from multigraft.core.batch import Batch, Phase, Span
from multigraft.kvcache.tensors import PagedKV
from multigraft.kvcache.transfer import upload

FEW_HEADS = (1, 2, 4)
"""Query heads to a key/value head for which decode runs without tensor cores: 256 rows of Llama-3.1-8B at context 160
take 69 us a layer in place of 93, at 384 149 in place of 156. With tensor cores decode would share prefill's build."""
WORKSPACE_BYTES = 256 * 2**20
"""FlashInfer's buffer for split-KV partial results; twice its recommendation, for 256 long rows."""


@dataclass(slots=True)
class _Part:
    """The rows of one kind (prefill or decode) as FlashInfer describes them: int32, on the host."""

    rows: slice
    row_indptr: torch.Tensor | None
    page_indptr: torch.Tensor
    pages: torch.Tensor
    """On either side."""
    last_page_len: torch.Tensor

    @classmethod
    def of(cls, spans: list[Span], first_row: int, page_size: int) -> _Part | None:
        if not spans:
            return None
        lengths = np.array([s.length for s in spans], dtype=np.int32)
        counts = np.array([-(-s.stop // page_size) for s in spans], dtype=np.int32)
        pages = gather_pages(spans, counts)
        last = np.array([(s.stop - 1) % page_size + 1 for s in spans], dtype=np.int32)
        return cls(
            rows=slice(first_row, first_row + int(lengths.sum())),
            row_indptr=_indptr(lengths),
            page_indptr=_indptr(counts),
            pages=torch.from_numpy(pages),
            last_page_len=torch.from_numpy(last),
        )


@dataclass(frozen=True, slots=True)
class FixedPages:
    """Device buffers that captured decode steps read their page tables from."""

    indptr: torch.Tensor
    """(rows + 1,) int32."""
    pages: torch.Tensor
    last_page_len: torch.Tensor
    """(rows,) int32."""


class FlashInferBackend:
    """Rows that decode and rows that prefill take a kernel each; layers that differ in scale, window or cap are
    planned apart.

    A step is prepared by `begin` or, when a CUDA graph is captured or replayed, by `begin_fixed`.
    """

    def __init__(self, kv: PagedKV):
        import flashinfer

        self.kv = kv
        self._library = flashinfer
        self._workspace = torch.zeros(WORKSPACE_BYTES, dtype=torch.uint8, device=kv.k.device)
        self._wrappers: dict[tuple[Any, ...], Any] = {}
        self._planned: set[tuple[Any, ...]] = set()
        self._plans_copied = torch.cuda.Event()
        self._fixed: FixedPages | None = None
        self._prefill: _Part | None = None
        self._decode: _Part | None = None
        self._rows = torch.empty(0, dtype=torch.long)

    def begin(self, batch: Batch) -> None:
        self._plans_copied.synchronize()  # a wrapper keeps its plan in one pinned buffer, and the host may be ahead
        prefill = [s for s in batch.spans if s.phase is not Phase.DECODE]
        decode = [s for s in batch.spans if s.phase is Phase.DECODE]
        p = self.kv.page_size
        self._prefill = _Part.of(prefill, 0, p)
        self._decode = _Part.of(decode, sum(s.length for s in prefill), p)
        self._rows = self.kv.rows_of(batch)
        self._fixed = None
        self._planned.clear()

    def begin_fixed(
        self, kv_rows: torch.Tensor, indptr: torch.Tensor, last_page_len: torch.Tensor, fixed: FixedPages
    ) -> None:
        """Prepare a step of decode rows whose kernels read `fixed`, which has room for just these rows.

        kv_rows: (rows,) int64 on the device, as PagedKV.rows_of. indptr, last_page_len: the page table on the host, in
        pinned memory; they are copied to `fixed`. fixed.pages is there already.
        """
        self._prefill = None
        num_rows = len(last_page_len)
        self._decode = _Part(slice(0, num_rows), None, indptr, fixed.pages[: int(indptr[-1])], last_page_len)
        self._rows, self._fixed = kv_rows, fixed
        self._planned.clear()
        for kind, *maths in self._wrappers:
            if kind == num_rows:
                self._wrapper(self._decode, kind, tuple(maths))

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
        self.kv.write(layer, self._rows, k_TKD, v_TKD)
        q = q_THD.contiguous()
        out = torch.empty_like(q)
        pages = (self.kv.k[layer], self.kv.v[layer])
        decode_kind = "decode" if self._fixed is None else len(q)
        for part, kind in ((self._prefill, "prefill"), (self._decode, decode_kind)):
            if part is not None:
                wrapper = self._wrapper(part, kind, (q.shape[1], scaling, window, softcap))
                wrapper.run(q[part.rows], pages, out=out[part.rows])
        return out

    def _wrapper(self, part: _Part, kind: str | int, maths: tuple[Any, ...]) -> Any:
        """The wrapper for this kind of rows (a number: captured steps of so many) and this maths, planned for the
        current step."""
        key = (kind, *maths)
        if key not in self._wrappers:
            self._wrappers[key] = self._make_wrapper(kind, maths[0] // self.kv.k.shape[3])
        wrapper = self._wrappers[key]
        if key in self._planned:
            return wrapper
        self._planned.add(key)
        num_heads, scaling, window, softcap = maths
        _, _, page_size, num_kv_heads, head_dim = self.kv.k.shape
        pages = part.pages if part.pages.is_cuda else upload(part.pages, self.kv.k.device)
        tables = (part.page_indptr, pages, part.last_page_len)
        common = {
            "sm_scale": scaling,
            "window_left": window - 1 if window else -1,
            "logits_soft_cap": softcap,
            "q_data_type": self.kv.k.dtype,
            "kv_data_type": self.kv.k.dtype,
        }
        sizes = (num_heads, num_kv_heads, head_dim, page_size)
        if kind == "prefill":
            wrapper.plan(part.row_indptr, *tables, *sizes, causal=True, **common)
        else:
            wrapper.plan(*tables, *sizes, **common)
        if kind in ("prefill", "decode"):
            self._plans_copied.record()
        return wrapper

    def _make_wrapper(self, kind: str | int, group: int) -> Any:
        """group: query heads that share a key/value head."""
        if kind == "prefill":
            return self._library.BatchPrefillWithPagedKVCacheWrapper(self._workspace, "NHD", backend="fa2")
        buffers = {}
        if self._fixed is not None:
            buffers = {
                "use_cuda_graph": True,
                "paged_kv_indptr_buffer": self._fixed.indptr,
                "paged_kv_indices_buffer": self._fixed.pages,
                "paged_kv_last_page_len_buffer": self._fixed.last_page_len,
            }
        return self._library.BatchDecodeWithPagedKVCacheWrapper(
            self._workspace, "NHD", use_tensor_cores=group not in FEW_HEADS, **buffers
        )


def gather_pages(spans: Sequence[Span], counts: np.ndarray) -> np.ndarray:
    """int32: the first counts[i] pages of every span's request, one after another."""
    each = zip(spans, counts.tolist(), strict=True)
    pages = chain.from_iterable(span.request.pages[:count] for span, count in each)
    return np.fromiter(pages, dtype=np.int32, count=int(counts.sum()))


def _indptr(lengths: np.ndarray) -> torch.Tensor:
    out = np.zeros(len(lengths) + 1, dtype=np.int32)
    np.cumsum(lengths, out=out[1:])
    return torch.from_numpy(out)
