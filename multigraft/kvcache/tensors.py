"""The KV pages of every layer in device memory."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from multigraft.core.batch import Span
from multigraft.kvcache.transfer import upload


class PagedKV:
    """k and v: (layers, num_pages + 1, page_size, key/value heads, head size), zeroed at the start.

    The last page is nobody's: rows that only fill up a batch write there.
    """

    def __init__(
        self,
        *,
        num_layers: int,
        num_kv_heads: int,
        head_dim: int,
        num_pages: int,
        page_size: int,
        dtype: torch.dtype,
        device: torch.device,
    ):
        shape = (num_layers, num_pages + 1, page_size, num_kv_heads, head_dim)
        self.k = torch.zeros(shape, dtype=dtype, device=device)
        self.v = torch.zeros(shape, dtype=dtype, device=device)
        self.num_pages = num_pages
        self.scratch_page = num_pages
        self.page_size = page_size
        self.nbytes = 2 * self.k.numel() * self.k.element_size()

    def rows_of(self, spans: Sequence[Span]) -> torch.Tensor:
        """(T,) where each of the spans' rows puts its key and value, as page * page_size + offset, on the device."""
        return upload(torch.from_numpy(self.host_rows_of(spans)), self.k.device)

    def host_rows_of(self, spans: Sequence[Span]) -> np.ndarray:
        """As rows_of, on the host."""
        p = self.page_size
        rows = np.empty(sum(span.length for span in spans), dtype=np.int64)
        row = 0
        for span in spans:
            pages, end = span.request.pages, row + span.length
            if span.length == 1:
                rows[row] = pages[span.start // p] * p + span.start % p
            else:
                positions = np.arange(span.start, span.stop)
                rows[row:end] = np.asarray(pages)[positions // p] * p + positions % p
            row = end
        return rows

    def write(self, layer: int, rows: torch.Tensor, k_TKD: torch.Tensor, v_TKD: torch.Tensor) -> None:
        """Store the step's keys and values at `rows_of` its batch."""
        self.k[layer].flatten(0, 1).index_copy_(0, rows, k_TKD)
        self.v[layer].flatten(0, 1).index_copy_(0, rows, v_TKD)
