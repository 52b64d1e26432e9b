"""Attention of a decode step: our kernel and FlashInfer's, Llama-3.1-8B's heads, pages of 16 in random order.

Every row has the same context. Times are of one layer, from replays of a CUDA graph over several layers so that no
layer finds its keys in the cache; TB/s counts keys and values alone. Ours stores the step's keys and values itself; to
FlashInfer's times the two copies are added that do so (`copies`). --tune tries block sizes of ours for most rows.

    python -m benchmarks.gpu.decode_attention [--rows 1 16 64 256] [--contexts 160 288 640] [--tune] [--xqa] [--save]
"""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from benchmarks.common import finish
from benchmarks.gpu.lora_kernels import graph_us, relative_error
from multigraft.kernels import decode_attention_triton as kernel
from multigraft.models.flashinfer import WORKSPACE_BYTES

H, K, D, P = 32, 8, 128, 16
LAYERS = 8
MAX_PAGES = 2**18
"""Of the cache: 16 GiB at one layer in eight."""


class Case:
    def __init__(self, rows: int, context: int):
        self.rows, self.context = rows, context
        each = (context + P - 1) // P
        self.num_pages = min(rows * each * 4, MAX_PAGES)
        device = torch.device("cuda")
        self.k = torch.randn(LAYERS, self.num_pages, P, K, D, device=device, dtype=torch.bfloat16)
        self.v = torch.randn_like(self.k)
        order = torch.randperm(self.num_pages, device=device)[: rows * each].int()
        self.pages, self.each = order, each
        self.indptr = torch.arange(rows + 1, device=device, dtype=torch.int32) * each
        self.positions = torch.full((rows,), context - 1, device=device)
        self.kv_rows = order.view(rows, each)[:, -1].long() * P + (context - 1) % P
        self.q = torch.randn(rows, H, D, device=device, dtype=torch.bfloat16)
        self.new_k = torch.randn(rows, K, D, device=device, dtype=torch.bfloat16)
        self.new_v = torch.randn_like(self.new_k)

    @property
    def nbytes(self) -> int:
        return 2 * self.rows * self.context * K * D * 2

    def copies(self, layer: int) -> None:
        self.k[layer].flatten(0, 1).index_copy_(0, self.kv_rows, self.new_k)
        self.v[layer].flatten(0, 1).index_copy_(0, self.kv_rows, self.new_v)

    def ours(self) -> Callable[[int], torch.Tensor]:
        attention = kernel.DecodeAttention(self.rows, H, K, D, self.q.device)
        tables = (self.pages, self.indptr, self.positions)
        out = torch.empty_like(self.q)

        def call(i: int) -> torch.Tensor:
            attention(out, self.q, self.new_k, self.new_v, self.k[i], self.v[i], *tables, D**-0.5)
            return out

        return call

    def flashinfer(self, tensor_cores: bool) -> Callable[[int], torch.Tensor]:
        import flashinfer

        workspace = torch.zeros(WORKSPACE_BYTES, dtype=torch.uint8, device="cuda")
        last = ((self.positions % P) + 1).int()
        wrapper = flashinfer.BatchDecodeWithPagedKVCacheWrapper(
            workspace, "NHD", use_tensor_cores=tensor_cores, use_cuda_graph=True,
            paged_kv_indptr_buffer=self.indptr.clone(), paged_kv_indices_buffer=self.pages.clone(),
            paged_kv_last_page_len_buffer=last.clone(),
        )  # fmt: skip
        wrapper.plan(self.indptr.cpu(), self.pages, last.cpu(), H, K, D, P, sm_scale=D**-0.5, q_data_type=self.q.dtype)
        return lambda i: wrapper.run(self.q, (self.k[i], self.v[i]))

    def xqa(self) -> Callable[[int], torch.Tensor]:
        from flashinfer.decode import xqa_batch_decode_with_kv_cache as decode

        workspace = torch.zeros(WORKSPACE_BYTES, dtype=torch.uint8, device="cuda")
        table = self.pages.view(self.rows, self.each)
        lengths = (self.positions + 1).to(torch.uint32)
        return lambda i: decode(
            self.q, (self.k[i], self.v[i]), workspace, table, lengths, self.context, D**-0.5, kv_layout="NHD"
        )

    def reference(self, layer: int) -> torch.Tensor:
        pages = self.pages.view(self.rows, self.each).long()
        k, v = (t[layer][pages].flatten(1, 2)[:, : self.context].transpose(1, 2).float() for t in (self.k, self.v))
        q = self.q.float()[:, :, None]
        return torch.nn.functional.scaled_dot_product_attention(q, k, v, enable_gqa=True)[:, :, 0]


def microseconds(call: Callable[[int], Any]) -> float:
    """Of one layer."""
    return graph_us([partial(call, layer) for layer in range(LAYERS)])


def measure(args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    for context, rows in itertools.product(args.contexts, args.rows):
        case = Case(rows, context)
        case.copies(0)
        expected = case.reference(0)
        copies = microseconds(case.copies)
        kinds = {"ours": case.ours, "flashinfer": lambda c=case: c.flashinfer(False)}
        kinds["flashinfer, tensor cores"] = lambda c=case: c.flashinfer(True)
        if args.xqa:
            kinds["xqa"] = case.xqa
        for name, make in kinds.items():
            call = make()
            error = relative_error(call(0), expected)
            us = microseconds(call) + (0.0 if name == "ours" else copies)
            yield {"kernel": name, "rows": rows, "context": context, "us": us, "copies": copies, "error": error,
                   "tb_s": case.nbytes / us / 1e6}  # fmt: skip


def tune(rows: int, context: int) -> None:
    case = Case(rows, context)
    for block, warps, stages in itertools.product((32, 64, 128), (1, 2, 4, 8), (2, 3, 4)):
        kernel.BLOCKS[rows < kernel.FEW_ROWS] = (block, warps, stages)
        try:
            us = microseconds(case.ours())
        except Exception as e:  # too much shared memory, mostly
            print(f"block {block}, {warps} warps, {stages} stages: {type(e).__name__}")
            continue
        rate = case.nbytes / us / 1e6
        print(f"block {block}, {warps} warps, {stages} stages: {us:.1f} us, {rate:.2f} TB/s", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 16, 64, 256])
    parser.add_argument("--contexts", type=int, nargs="+", default=[160, 288, 640])
    parser.add_argument("--tune", action="store_true")
    parser.add_argument("--xqa", action="store_true", help="FlashInfer's XQA beside them, which it compiles first")
    parser.add_argument("--save", action="store_true")
    args = parser.parse_args()
    if args.tune:
        tune(max(args.rows), args.contexts[len(args.contexts) // 2])
        return
    rows = list(measure(args))
    table = Table("rows", "context", "kernel", "us a layer", "TB/s", "relative error")
    for r in rows:
        table.add_row(
            str(r["rows"]), str(r["context"]), r["kernel"], f"{r['us']:.1f}", f"{r['tb_s']:.2f}", f"{r['error']:.1e}"
        )
    Console(width=100).print(table)
    finish("decode_attention", {}, rows, save=args.save)


if __name__ == "__main__":
    main()
