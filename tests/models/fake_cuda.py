"""On the CPU, in place of CUDA, FlashInfer and our Triton kernels, what captured steps need of them.

The kernels read the tables that they are given when they run, as real ones do. (In Triton's interpreter the same steps
took 50 times as long: over a minute for each of two tests.)
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from functools import partial
from types import ModuleType
from typing import Any
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from multigraft.kernels import decode_attention_triton, linear_triton, lora_triton
from multigraft.kernels import lora_reference as reference
from multigraft.kernels.tiles import UNUSED
from multigraft.models import flashinfer

seen: set[tuple[int, int]] = set()
"""block_m and max_rank of the kernels that ran."""


class Graph(TorchDispatchMode):
    """As torch.cuda.CUDAGraph: keeps what was launched during its capture, with the tensors and numbers of then, and
    launches that again. What Python does beside it is not repeated, and no value may be asked for."""

    capturing: Graph | None = None

    def __init__(self) -> None:
        super().__init__()
        self.launches: list[Callable[[], object]] = []
        self.in_kernel = False
        self.num_replays = 0

    def replay(self) -> None:
        self.num_replays += 1
        for run in self.launches:
            run()

    def __enter__(self) -> Graph:
        Graph.capturing = self
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        Graph.capturing = None
        super().__exit__(*error)

    def __torch_dispatch__(self, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        run = partial(op, *args, **(kwargs or {}))
        result = run()
        if self.in_kernel:
            return result
        assert op is not torch.ops.aten._local_scalar_dense.default, "a value is asked for during a capture"
        if op._schema.is_mutable:
            self.launches.append(run)
        elif not _memory(result) <= _memory((args, kwargs)):  # else a view, which is no work
            self.launches.append(partial(_run_into, result, run))
        return result


def launch(kernel: Callable[[], object]) -> None:
    """Run it as one launch, of whose inside a graph knows nothing."""
    graph = Graph.capturing
    if graph is None:
        kernel()
        return
    graph.launches.append(kernel)
    graph.in_kernel = True
    kernel()
    graph.in_kernel = False


def _tensors(values: Any) -> list[torch.Tensor]:
    return [leaf for leaf in tree_leaves(values) if isinstance(leaf, torch.Tensor)]


def _memory(values: Any) -> set[int]:
    return {t.untyped_storage().data_ptr() for t in _tensors(values)}


def _run_into(result: Any, run: Callable[[], object]) -> None:
    for old, new in zip(_tensors(result), _tensors(run()), strict=True):
        old.copy_(new)


class PrefillWrapper:
    """As flashinfer.BatchPrefillWithPagedKVCacheWrapper, for causal attention without window or cap."""

    def __init__(
        self,
        workspace: torch.Tensor,
        layout: str,
        *,
        backend: str,
        use_cuda_graph: bool = False,
        qo_indptr_buf: torch.Tensor | None = None,
        paged_kv_indptr_buf: torch.Tensor | None = None,
        paged_kv_indices_buf: torch.Tensor | None = None,
        paged_kv_last_page_len_buf: torch.Tensor | None = None,
    ):
        assert layout == "NHD"
        self._fixed = use_cuda_graph
        self._tables = (qo_indptr_buf, paged_kv_indptr_buf, paged_kv_indices_buf, paged_kv_last_page_len_buf)
        self._max_rows: int | None = None

    def plan(self, *tables_and_sizes: Any, causal: bool, sm_scale: float, window_left: int, **options: Any) -> None:
        """Of a captured step: as many spans as there is room for, and not more rows than the first time."""
        *tables, _, _, _, _ = tables_and_sizes
        assert Graph.capturing is None and causal and window_left == -1 and not options["logits_soft_cap"]
        self._scale = sm_scale
        if not self._fixed:
            self._tables = tuple(tables)
            return
        num_rows, num_pages = (int(table[-1]) for table in tables[:2])
        assert num_pages == len(tables[2])
        self._max_rows = num_rows if self._max_rows is None else self._max_rows
        assert num_rows <= self._max_rows and len(tables[3]) == len(self._tables[3])
        for buffer, table in zip(self._tables, tables, strict=True):
            buffer[: len(table)].copy_(table)

    def run(
        self, q: torch.Tensor, kv: tuple[torch.Tensor, torch.Tensor], out: torch.Tensor | None = None
    ) -> torch.Tensor:
        out = torch.empty_like(q) if out is None else out
        launch(partial(_attend_spans, out, q, *kv, *self._tables, self._scale))
        return out


def _attend_spans(
    out_THD: torch.Tensor,
    q_THD: torch.Tensor,
    k_pages: torch.Tensor,
    v_pages: torch.Tensor,
    row_indptr: torch.Tensor,
    page_indptr: torch.Tensor,
    pages: torch.Tensor,
    last_page_len: torch.Tensor,
    scale: float,
) -> None:
    rows, indptr = row_indptr.tolist(), page_indptr.tolist()
    for i, last in enumerate(last_page_len.tolist()):
        if rows[i] < rows[i + 1]:
            mine, span = pages[indptr[i] : indptr[i + 1]], slice(rows[i], rows[i + 1])
            length = (len(mine) - 1) * k_pages.shape[1] + last
            out_THD[span] = _attend(q_THD[span], k_pages, v_pages, mine, length, scale)


def _attend_rows(
    out_THD: torch.Tensor,
    q_THD: torch.Tensor,
    k_TKD: torch.Tensor,
    v_TKD: torch.Tensor,
    k_pages: torch.Tensor,
    v_pages: torch.Tensor,
    pages: torch.Tensor,
    indptr: torch.Tensor,
    positions: torch.Tensor,
    scale: float,
    window: int | None,
    softcap: float | None,
) -> None:
    """As decode_attention_triton.DecodeAttention."""
    assert window is None and softcap is None
    size = k_pages.shape[1]
    for row, position in enumerate(positions.tolist()):
        mine = pages[indptr[row] :][: position // size + 1]
        k_pages[mine[position // size], position % size] = k_TKD[row]
        v_pages[mine[position // size], position % size] = v_TKD[row]
        out_THD[row] = _attend(q_THD[row : row + 1], k_pages, v_pages, mine, position + 1, scale)[0]


def _attend(
    q_THD: torch.Tensor,
    k_pages: torch.Tensor,
    v_pages: torch.Tensor,
    pages: torch.Tensor,
    length: int,
    scale: float,
) -> torch.Tensor:
    """For the last of `length` positions that lie in these pages."""
    k, v = (cache[pages.long()].flatten(0, 1)[:length].transpose(0, 1)[None] for cache in (k_pages, v_pages))
    seen = torch.ones(len(q_THD), length, dtype=torch.bool).tril(length - len(q_THD))
    q = q_THD.transpose(0, 1)[None]
    return F.scaled_dot_product_attention(q, k, v, seen, scale=scale, enable_gqa=True)[0].transpose(0, 1)


def _expand(
    y: torch.Tensor, h: torch.Tensor, arena: torch.Tensor, work: lora_triton.Work, side: str, widths: Sequence[int]
) -> None:
    """With x for h: all is computed here."""

    def kernel() -> None:
        _check(work, work.tiles, len(y))
        reference.forward(y, h, arena, work.table, work.scales, work.tiles, widths)

    launch(kernel)


def _linear(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    arena: torch.Tensor,
    work: lora_triton.Work,
    widths: Sequence[int],
    counters: torch.Tensor,
) -> torch.Tensor:
    y = x.new_empty(len(x), sum(widths))

    def kernel() -> None:
        _check(work, work.tiles, len(y))
        y.copy_(F.linear(x, weight, bias))
        reference.forward(y, x, arena, work.table, work.scales, work.tiles, widths)

    launch(kernel)
    return y


def _gated(
    y: torch.Tensor, h: torch.Tensor, arena: torch.Tensor, work: lora_triton.Work, all_tiles: torch.Tensor
) -> torch.Tensor:
    z = y.new_empty(len(y), y.shape[1] // 2)

    def kernel() -> None:
        adapted = y.clone()
        reference.forward(adapted, h, arena, work.table, work.scales, all_tiles, [z.shape[1]] * 2)
        rows = _check(work, all_tiles, len(y))
        z[rows] = reference.swiglu(adapted[rows])

    launch(kernel)
    return z


def _check(work: lora_triton.Work, tiles: torch.Tensor, num_rows: int) -> list[int]:
    """The rows of all tiles; none may be in two of them, nor beyond the last, and no rank above max_rank."""
    seen.add((work.block_m, work.max_rank))
    slots = tiles[tiles[:, 2] >= 0, 2].long()
    assert (work.table[slots, :, 2] <= work.max_rank).all() and (tiles[:, 1] <= work.block_m).all()
    rows = [row for first, count, slot in tiles.tolist() if slot != UNUSED for row in range(first, first + count)]
    assert len(set(rows)) == len(rows) and max(rows, default=0) < num_rows
    return rows


def install(patch: pytest.MonkeyPatch) -> None:
    fakes = {
        "CUDAGraph": Graph,
        "graph": lambda graph, **options: graph,
        "graph_pool_handle": lambda: None,
        "synchronize": lambda: None,
        "Event": mock.Mock,
    }
    for name, fake in fakes.items():
        patch.setattr(torch.cuda, name, fake)
    library = ModuleType("flashinfer")
    library.BatchPrefillWithPagedKVCacheWrapper = PrefillWrapper
    patch.setitem(sys.modules, "flashinfer", library)
    patch.setattr(flashinfer, "WORKSPACE_BYTES", 1)
    decode = decode_attention_triton.DecodeAttention
    patch.setattr(decode, "__call__", lambda self, *args: launch(partial(_attend_rows, *args)))
    kernels = {"shrink": lambda x, *rest: x, "unwritten": lambda x, work: x, "expand": _expand, "gated": _gated}
    for name, kernel in kernels.items():
        patch.setattr(lora_triton, name, kernel)
    patch.setattr(linear_triton, "linear", _linear)
