"""Attention through FlashInfer's paged kernels, on CUDA. The package is optional and imported when it is used."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from multigraft.core.batch import Batch, Phase, Span
from multigraft.kvcache.tensors import PagedKV

WORKSPACE_BYTES = 256 * 2**20
"""FlashInfer's buffer for split-KV partial results; twice its recommendation, for 256 long rows."""


@dataclass(slots=True)
class _Part:
    """The rows of one kind (prefill or decode) as FlashInfer describes them: int32, on the host."""

    rows: slice
    row_indptr: torch.Tensor
    page_indptr: torch.Tensor
    pages: torch.Tensor
    last_page_len: torch.Tensor

    @classmethod
    def of(cls, spans: list[Span], first_row: int, page_size: int) -> _Part | None:
        if not spans:
            return None
        lengths = np.array([s.length for s in spans], dtype=np.int32)
        counts = np.array([-(-s.stop // page_size) for s in spans], dtype=np.int32)
        pages: list[int] = []
        for span, count in zip(spans, counts.tolist(), strict=True):
            pages += span.request.pages[:count]
        last = np.array([(s.stop - 1) % page_size + 1 for s in spans], dtype=np.int32)
        return cls(
            rows=slice(first_row, first_row + int(lengths.sum())),
            row_indptr=_indptr(lengths),
            page_indptr=_indptr(counts),
            pages=torch.tensor(pages, dtype=torch.int32),
            last_page_len=torch.from_numpy(last),
        )


class FlashInferBackend:
    """Rows that decode and rows that prefill take a kernel each; layers that differ in scale, window or cap are
    planned apart. The decode wrapper uses the tensor-core kernel, which shares the prefill kernel's build."""

    def __init__(self, kv: PagedKV):
        import flashinfer

        self.kv = kv
        self._library = flashinfer
        self._wrappers: dict[tuple[Any, ...], Any] = {}
        self._planned: set[tuple[Any, ...]] = set()
        self._prefill: _Part | None = None
        self._decode: _Part | None = None
        self._rows = torch.empty(0, dtype=torch.long)

    def begin(self, batch: Batch) -> None:
        prefill = [s for s in batch.spans if s.phase is not Phase.DECODE]
        decode = [s for s in batch.spans if s.phase is Phase.DECODE]
        p = self.kv.page_size
        self._prefill = _Part.of(prefill, 0, p)
        self._decode = _Part.of(decode, sum(s.length for s in prefill), p)
        self._rows = self.kv.rows_of(batch)
        self._planned.clear()

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
        for part, decodes in ((self._prefill, False), (self._decode, True)):
            if part is not None:
                wrapper = self._wrapper(part, decodes, q, (scaling, window, softcap))
                out[part.rows] = wrapper.run(q[part.rows], pages)
        return out

    def _wrapper(self, part: _Part, decodes: bool, q_THD: torch.Tensor, maths: tuple[Any, ...]) -> Any:
        """The wrapper for this kind of rows and this maths, planned for the current step."""
        key = (decodes, *maths)
        if key not in self._wrappers:
            workspace = torch.zeros(WORKSPACE_BYTES, dtype=torch.uint8, device=q_THD.device)
            self._wrappers[key] = (
                self._library.BatchDecodeWithPagedKVCacheWrapper(workspace, "NHD", use_tensor_cores=True)
                if decodes
                else self._library.BatchPrefillWithPagedKVCacheWrapper(workspace, "NHD", backend="fa2")
            )
        wrapper = self._wrappers[key]
        if key not in self._planned:
            self._planned.add(key)
            scaling, window, softcap = maths
            sizes = (q_THD.shape[1], self.kv.k.shape[3], q_THD.shape[2], self.kv.page_size)
            common = {
                "sm_scale": scaling,
                "window_left": window - 1 if window else -1,
                "logits_soft_cap": softcap,
                "q_data_type": q_THD.dtype,
                "kv_data_type": self.kv.k.dtype,
            }
            if decodes:
                wrapper.plan(part.page_indptr, part.pages.to(q_THD.device), part.last_page_len, *sizes, **common)
            else:
                wrapper.plan(
                    part.row_indptr,
                    part.page_indptr,
                    part.pages.to(q_THD.device),
                    part.last_page_len,
                    *sizes,
                    causal=True,
                    **common,
                )
        return wrapper


def _indptr(lengths: np.ndarray) -> torch.Tensor:
    out = np.zeros(len(lengths) + 1, dtype=np.int32)
    np.cumsum(lengths, out=out[1:])
    return torch.from_numpy(out)
