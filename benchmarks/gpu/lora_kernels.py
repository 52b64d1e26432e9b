"""The segmented LoRA kernels on one GPU at Llama-3.1-8B's shapes: checked against float32, then timed.

Each row: the floor (bytes that must move at 3.0 TB/s, or operations at 800 TFLOP/s, the larger; every adapter, x and
y counted once, y read and written), our time, their ratio, and torch's grouped_mm (unfused: shrink, expand, add; equal
ranks only). Times are medians of CUDA graph replays, divided by the calls in the graph, whose inputs rotate through
more memory than the L2 holds.

"tp" are the sites as one rank of a tensor-parallel group has them, "gemm" the base model's own products there, without
adapters: what benchmarks.tp_model projects from.

    python -m benchmarks.gpu.lora_kernels [--only decode prefill train] [--tune] [--save]
"""

from __future__ import annotations

import argparse
import itertools
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
import triton
from rich.console import Console
from rich.table import Table

from benchmarks.common import finish
from multigraft.kernels import linear_triton, lora_reference, lora_triton
from multigraft.kernels.lora import NO_OFFSET, segmented_lora, segmented_lora_, segmented_lora_backward
from multigraft.kernels.tiles import DECODE_ROWS as LOW_RANK_ROWS
from multigraft.kernels.tiles import HIGH_RANK_ROWS, UNUSED, build_tiles, choose_block_m, decode_rows, max_tiles
from multigraft.kernels.tiles import PREFILL_ROWS as PROMPT_ROWS
from multigraft.models.segments import side_by_side

SITES = {
    "qkv": (4096, (4096, 1024, 1024)),
    "o": (4096, (4096,)),
    "gate_up": (4096, (14336, 14336)),
    "down": (14336, (4096,)),
}
BYTES_PER_S = 3.0e12
FLOP_PER_S = 800e12
ROTATED_BYTES = 200e6
DECODE_ROWS, PREFILL_ROWS = 256, 8192
MIXED = (8, 16, 24, 32, 64, 128)
TOLERANCE = 1e-2
"""Relative error that bf16 explains."""


@dataclass(frozen=True)
class Shape:
    site: str
    num_rows: int
    ranks: tuple[int, ...]
    """Of each adapter, on every member."""
    block_m: int

    @property
    def widths(self) -> tuple[int, tuple[int, ...]]:
        return SITES[self.site]

    @property
    def factor_elements(self) -> int:
        n_in, outs = self.widths
        return sum(self.ranks) * (len(outs) * n_in + sum(outs))

    @property
    def num_bytes(self) -> int:
        n_in, outs = self.widths
        return 2 * (self.factor_elements + self.num_rows * (n_in + 2 * sum(outs)))

    @property
    def flops(self) -> float:
        return 2 * self.num_rows * self.factor_elements / len(self.ranks)

    @property
    def floor_us(self) -> float:
        return 1e6 * max(self.num_bytes / BYTES_PER_S, self.flops / FLOP_PER_S)

    @property
    def copies(self) -> int:
        return min(32, 1 + int(ROTATED_BYTES / self.num_bytes))

    def segments(self) -> torch.Tensor:
        bounds = torch.linspace(0, self.num_rows, len(self.ranks) + 1).long()
        return torch.stack([bounds[:-1], bounds[1:]], dim=1)


@dataclass(frozen=True)
class Part(Shape):
    """A rank's part of a site, of a tensor-parallel group."""

    num_ranks: int = 1

    @property
    def widths(self) -> tuple[int, tuple[int, ...]]:
        n_in, outs = SITES[self.site]
        n = self.num_ranks
        return (n_in // n, outs) if self.site in ("o", "down") else (n_in, tuple(out // n for out in outs))


@dataclass(frozen=True)
class Inputs:
    x: torch.Tensor
    y: torch.Tensor
    arena: torch.Tensor
    tables: tuple[Any, ...]
    """The op's arguments after arena."""

    @classmethod
    def random(cls, shape: Shape) -> Inputs:
        n_in, outs = shape.widths
        table, offset = [], 0
        for rank in shape.ranks:
            a, b = offset, offset + rank * n_in * len(outs)
            entry = []
            for out in outs:
                entry.append((a, b, rank, NO_OFFSET))
                a, b = a + rank * n_in, b + rank * out
            table.append(entry)
            offset = b
        # A decode step's table has the length that its graph was captured with.
        num_tiles = None
        if shape.num_rows == DECODE_ROWS:
            num_tiles = max_tiles(shape.num_rows, len(shape.ranks), shape.block_m)
        tiles = build_tiles(shape.segments(), torch.randperm(len(shape.ranks)), shape.block_m, num_tiles)
        on_gpu = {"device": "cuda", "dtype": torch.bfloat16}
        return cls(
            x=torch.randn(shape.num_rows, n_in, **on_gpu),
            y=torch.randn(shape.num_rows, sum(outs), **on_gpu) * 0.1,
            arena=torch.randn(offset, **on_gpu) * 0.02,
            tables=(
                torch.tensor(table, device="cuda"),
                torch.rand(len(table), len(outs), device="cuda") + 0.5,
                tiles.cuda(),
                list(outs),
                shape.block_m,
                max(shape.ranks),
            ),
        )

    @property
    def work(self) -> lora_triton.Work:
        table, scales, tiles, _, block_m, max_rank = self.tables
        return lora_triton.Work(table, scales, tiles, block_m, max_rank)

    def check(self) -> float:
        """Relative error of y += ... against float32."""
        table, scales, tiles, outs = self.tables[:4]
        y, ref = self.y.clone(), self.y.float()
        segmented_lora_(y, self.x, self.arena, *self.tables)
        lora_reference.forward(ref, self.x.float(), self.arena, table.cpu(), scales.cpu(), tiles, outs)
        return relative_error(y, ref)


def relative_error(actual: torch.Tensor, ref: torch.Tensor) -> float:
    return float((actual.float() - ref).norm() / ref.norm())


def graph_us(calls: Sequence[Callable[[], object]]) -> float:
    """Median time of one call, in microseconds."""
    for call in calls:
        call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    return 1e3 * triton.testing.do_bench(graph.replay, warmup=10, rep=50, return_mode="median") / len(calls)


def gated_row(kind: str, shape: Shape) -> dict[str, Any]:
    """Adapters inside SwiGLU, against adding them and SwiGLU as one compiled kernel after it (unfused_us)."""
    n_in, (width, _) = shape.widths
    inputs = [Inputs.random(shape) for _ in range(shape.copies)]

    def gated(i: Inputs) -> torch.Tensor:
        h = lora_triton.shrink(i.x, i.arena, i.work, "a", [n_in])
        return lora_triton.gated(i.y, h, i.arena, i.work, i.work.tiles)

    i = inputs[0]
    ref = i.y.float()
    lora_reference.forward(ref, i.x.float(), i.arena, i.tables[0].cpu(), i.tables[1].cpu(), i.tables[2], i.tables[3])
    error = relative_error(gated(i), lora_reference.swiglu(ref))
    us = graph_us([lambda i=i: gated(i) for i in inputs])
    compiled = torch.compile(lora_reference.swiglu)
    after = graph_us([lambda i=i: compiled(i.y) for i in inputs])
    unfused = graph_us([lambda i=i: segmented_lora_(i.y, i.x, i.arena, *i.tables) for i in inputs]) + after
    num_bytes = 2 * (shape.factor_elements + shape.num_rows * (n_in + 3 * width))
    floor = 1e6 * max(num_bytes / BYTES_PER_S, shape.flops / FLOP_PER_S)
    sizes = {"mb": num_bytes / 1e6, "floor_us": floor, "us": us, "ratio": us / floor}
    return {**describe(kind, shape), **sizes, "swiglu_us": after, "unfused_us": unfused, "error": error}


def gated_rows() -> Iterator[dict[str, Any]]:
    for num, rank in ((16, 8), (64, 8), (256, 8), (64, 64)):
        yield gated_row("decode gated", Shape("gate_up", DECODE_ROWS, (rank,) * num, decode_rows(rank)))
    for num, rank in ((16, 8), (64, 8), (16, 64)):
        yield gated_row(
            "prefill gated", Shape("gate_up", PREFILL_ROWS, (rank,) * num, choose_block_m(PREFILL_ROWS, num, rank))
        )


def layer_rows() -> Iterator[dict[str, Any]]:
    """What adapters add to a decoder layer's products and SwiGLU (floor: as if these were not there), in the ways of
    captured steps, of which `us` is the one that they take: shrink one after the other with the base product, or beside
    it, or, for few rows, one kernel for both, whose products are not cuBLAS's (so it may add less than nothing)."""
    swiglu, beside = torch.compile(lora_reference.swiglu), torch.cuda.Stream()
    counters = linear_triton.new_counters(max(sum(outs) for _, outs in SITES.values()), torch.device("cuda"))
    ways: dict[str, Way] = {
        "base": plain,
        "serial": partial(after_product, None),
        "beside": partial(after_product, beside),
    }
    for num_ranks, (rows, ranks) in itertools.product((1, 2), LAYERS):
        shapes = [Part(site, rows, ranks, decode_rows(max(ranks)), num_ranks) for site in SITES]
        fits = linear_triton.fits(rows, max(ranks))
        mine = ways | ({"one_kernel": partial(in_product, counters)} if fits else {})
        sites = [(s, Inputs.random(s), weight(s)) for _ in range(3) for s in shapes]
        graph_us([partial(swiglu, i.y) for s, i, _ in sites if s.site == "gate_up"])  # compiled before a capture
        us = {f"{name}_us": graph_us([partial(run_layers, sites, swiglu, way)]) / 3 for name, way in mine.items()}
        us = {name: t if name == "base_us" else t - us["base_us"] for name, t in us.items()}
        us["us"] = us["one_kernel_us" if fits else "beside_us"]
        serial, taken = (run_layers(sites[:4], swiglu, mine[way]) for way in ("serial", list(mine)[-1]))
        error = max(relative_error(a, s.float()) for a, s in zip(taken, serial, strict=True))
        floor = sum(s.floor_us for s in shapes)
        sizes = {"kind": "layer", "num_ranks": num_ranks, "rows": rows, "adapters": len(ranks), "rank": max(ranks)}
        yield {**sizes, "floor_us": floor, **us, "ratio": us["us"] / floor, "error": error}


def few_rows() -> Iterator[dict[str, Any]]:
    """Sites with few rows: the base product alone (cuBLAS), adapters after it (shrink beside it), and both in one
    kernel, also without any adapter (idle)."""
    beside = torch.cuda.Stream()
    counters = linear_triton.new_counters(max(sum(outs) for _, outs in SITES.values()), torch.device("cuda"))
    for num_ranks, site, (rows, ranks) in itertools.product((1, 2), SITES, FEW):
        part = Part(site, rows, ranks, decode_rows(max(ranks)), num_ranks)
        n_in, outs = part.widths
        pairs = [
            (Inputs.random(part), weight(part)) for _ in range(max(3, int(ROTATED_BYTES / (2 * n_in * sum(outs)))))
        ]
        none = torch.tensor([[0, 0, UNUSED]] * len(pairs[0][0].work.tiles), dtype=torch.int32, device="cuda")

        one = partial(linear_triton.linear, bias=None, out_features=outs, counters=counters)
        times = {
            "linear_us": graph_us([partial(F.linear, i.x, w) for i, w in pairs]),
            "beside_us": graph_us([partial(expanded, beside, part, i, w) for i, w in pairs]),
            "idle_us": graph_us(
                [partial(one, i.x, w, arena=i.arena, work=i.work._replace(tiles=none)) for i, w in pairs]
            ),
            "us": graph_us([partial(one, i.x, w, arena=i.arena, work=i.work) for i, w in pairs]),
        }
        i, w = pairs[0]
        error = relative_error(one(i.x, w, arena=i.arena, work=i.work), expanded(None, part, i, w).float())
        sizes = {"kind": "few", "num_ranks": num_ranks, "site": site, "rows": rows, "adapters": len(ranks)}
        yield {**sizes, "rank": max(ranks), **times, "error": error}


FEW = ((2, (16,)), (16, (16,) * 4), (16, (16,) * 16), (32, (16,) * 4), (4, (64,) * 4))
LAYERS = (
    (1, (16,)),
    (2, (16,)),
    (2, (64,)),
    (16, (16,) * 4),
    (64, (16,) * 4),
    (64, (64,) * 4),
    (64, (8,) * 64),
    (256, (8,) * 64),
    (256, (8,) * 256),
)
"""Rows, and the adapters' ranks."""


def weight(shape: Shape) -> torch.Tensor:
    n_in, outs = shape.widths
    return torch.randn(sum(outs), n_in, device="cuda", dtype=torch.bfloat16) * 0.02


Swiglu = Callable[[torch.Tensor], torch.Tensor]
Way = Callable[[Shape, Inputs, torch.Tensor, Swiglu], torch.Tensor]
"""The output of a site with these weights: of the gate, after SwiGLU."""


def run_layers(sites: Sequence[tuple[Shape, Inputs, torch.Tensor]], swiglu: Swiglu, way: Way) -> list[torch.Tensor]:
    """Outputs by site."""
    return [way(shape, i, w, swiglu) for shape, i, w in sites]


def plain(shape: Shape, i: Inputs, w: torch.Tensor, swiglu: Swiglu) -> torch.Tensor:
    y = F.linear(i.x, w)
    return swiglu(y) if shape.site == "gate_up" else y


def after_product(
    beside: torch.cuda.Stream | None, shape: Shape, i: Inputs, w: torch.Tensor, swiglu: Swiglu
) -> torch.Tensor:
    if shape.site != "gate_up":
        return expanded(beside, shape, i, w)
    y, h = shrunk(beside, i, w)
    return lora_triton.gated(y, h, i.arena, i.work, i.work.tiles)


def expanded(beside: torch.cuda.Stream | None, shape: Shape, i: Inputs, w: torch.Tensor) -> torch.Tensor:
    y, h = shrunk(beside, i, w)
    lora_triton.expand(y, h, i.arena, i.work, "b", shape.widths[1])
    return y


def shrunk(beside: torch.cuda.Stream | None, i: Inputs, w: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    shrink = partial(lora_triton.shrink, i.x, i.arena, i.work, "a", [i.x.shape[1]])
    return side_by_side(partial(F.linear, i.x, w), shrink, beside)


def in_product(counters: torch.Tensor, shape: Shape, i: Inputs, w: torch.Tensor, swiglu: Swiglu) -> torch.Tensor:
    y = linear_triton.linear(i.x, w, None, i.arena, i.work, shape.widths[1], counters)
    return swiglu(y) if shape.site == "gate_up" else y


def grouped_mm_us(shape: Shape) -> float:
    """The same work through torch.nn.functional.grouped_mm, factors laid out as it likes them."""
    n_in, outs = shape.widths
    rank, num = shape.ranks[0], len(shape.ranks)
    ends = shape.segments()[:, 1].int().cuda()
    on_gpu = {"device": "cuda", "dtype": torch.bfloat16}

    def one() -> Callable[[], None]:
        x, y = torch.randn(shape.num_rows, n_in, **on_gpu), torch.randn(shape.num_rows, sum(outs), **on_gpu)
        a = torch.randn(num, rank * len(outs), n_in, **on_gpu).transpose(1, 2)
        b = [torch.randn(num, rank, out, **on_gpu) for out in outs]

        def call() -> None:
            h = F.grouped_mm(x, a, offs=ends).split(rank, dim=1)
            for part, h_m, b_m in zip(y.split(outs, dim=1), h, b, strict=True):
                part.add_(F.grouped_mm(h_m.contiguous(), b_m, offs=ends), alpha=0.5)

        return call

    return graph_us([one() for _ in range(shape.copies)])


def decode_shapes() -> Iterator[Shape]:
    for site in SITES:
        for num in (1, 16, 64, 256):
            for rank in (8, 64):
                yield Shape(site, DECODE_ROWS, (rank,) * num, decode_rows(rank))
        yield Shape(site, DECODE_ROWS, tuple(MIXED[i % len(MIXED)] for i in range(64)), decode_rows(max(MIXED)))


def prefill_shapes() -> Iterator[Shape]:
    for site in SITES:
        rows = PREFILL_ROWS
        for num in (1, 16, 64):
            yield Shape(site, rows, (8,) * num, choose_block_m(rows, num, 8))
        yield Shape(site, rows, (64,) * 16, choose_block_m(rows, 16, 64))
        yield Shape(site, rows, tuple(MIXED[i % len(MIXED)] for i in range(16)), choose_block_m(rows, 16, max(MIXED)))


def part_rows() -> Iterator[dict[str, Any]]:
    """Decode steps of few adapters, as in benchmarks.tp: ranks of LoRA whole, and of a BD-LoRA's share."""
    for num_ranks in (2, 8):
        for site in SITES:
            for rows, num in ((2, 1), (16, 4), (64, 4), (256, 4)):
                for rank in (8, 16, 64, 128):
                    part = Part(site, rows, (rank,) * num, decode_rows(rank), num_ranks)
                    yield inference_row("tp", part, grouped=False) | {"num_ranks": num_ranks, "rows": rows}


def gemm_rows() -> Iterator[dict[str, Any]]:
    for num_ranks in (1, 2, 8):
        for site in SITES:
            for rows in (2, 16, 64, 256, PREFILL_ROWS):
                part = Part(site, rows, (1,), 4, num_ranks)
                n_in, outs = part.widths
                on_gpu = {"device": "cuda", "dtype": torch.bfloat16}
                num_bytes = 2 * (n_in * sum(outs) + rows * (n_in + sum(outs)))
                copies = min(32, 1 + int(ROTATED_BYTES / num_bytes))
                x = torch.randn(rows, n_in, **on_gpu)
                weights = [torch.randn(sum(outs), n_in, **on_gpu) for _ in range(copies)]
                us = graph_us([lambda x=x, w=w: F.linear(x, w) for w in weights])
                flops = 2 * rows * n_in * sum(outs)
                floor = 1e6 * max(num_bytes / BYTES_PER_S, flops / FLOP_PER_S)
                sizes = {"mb": num_bytes / 1e6, "gflop": flops / 1e9, "floor_us": floor}
                row = {"kind": "gemm", "site": site, "num_ranks": num_ranks, "rows": rows}
                yield row | sizes | {"us": us, "ratio": us / floor}


def inference_row(kind: str, shape: Shape, *, grouped: bool = True) -> dict[str, Any]:
    inputs = [Inputs.random(shape) for _ in range(shape.copies)]
    error = inputs[0].check()
    us = graph_us([lambda i=i: segmented_lora_(i.y, i.x, i.arena, *i.tables) for i in inputs])
    del inputs
    equal = len(set(shape.ranks)) == 1
    other = {"grouped_us": grouped_mm_us(shape) if equal and shape.block_m > 1 else None} if grouped else {}
    return {**describe(kind, shape), "us": us, "ratio": us / shape.floor_us, **other, "error": error}


def describe(kind: str, shape: Shape) -> dict[str, Any]:
    rank = shape.ranks[0] if len(set(shape.ranks)) == 1 else f"{min(shape.ranks)}-{max(shape.ranks)}"
    return {
        "kind": kind,
        "site": shape.site,
        "adapters": len(shape.ranks),
        "rank": rank,
        "block_m": shape.block_m,
        "mb": shape.num_bytes / 1e6,
        "gflop": shape.flops / 1e9,
        "floor_us": shape.floor_us,
    }


def training_rows() -> Iterator[dict[str, Any]]:
    """Forward (functional) and backward of one site. Floors: inputs read once and outputs written once."""
    for site, (n_in, outs) in SITES.items():
        for num in (1, 4):
            shape = Shape(site, PREFILL_ROWS, (16,) * num, 64)
            i = Inputs.random(shape)
            g = torch.randn_like(i.y)
            table, scales, tiles = (t.cpu() for t in i.tables[:3])
            ref = lora_reference.backward(g.float(), i.x.float(), i.arena.float(), table, scales, tiles, outs)
            got = segmented_lora_backward(g, i.x, i.arena, *i.tables, True, True)
            error = max(relative_error(a, r) for a, r in zip(got, ref, strict=True))
            rows_bytes, factor_bytes = 2 * PREFILL_ROWS * (n_in + sum(outs)), 2 * shape.factor_elements
            forward, backward = rows_bytes + factor_bytes, rows_bytes + 2 * PREFILL_ROWS * n_in + 2 * factor_bytes
            calls = {
                "train fwd": (forward, shape.flops, lambda i=i: segmented_lora(i.x, i.arena, *i.tables)),
                "train bwd": (
                    backward,
                    2.5 * shape.flops,  # h again, u, d_x, d_A, d_B: five products of the forward pass's two
                    lambda i=i, g=g: segmented_lora_backward(g, i.x, i.arena, *i.tables, True, True),
                ),
            }
            for kind, (num_bytes, flops, call) in calls.items():
                us, floor = graph_us([call]), 1e6 * max(num_bytes / BYTES_PER_S, flops / FLOP_PER_S)
                sizes = {"mb": num_bytes / 1e6, "gflop": flops / 1e9, "floor_us": floor}
                yield {**describe(kind, shape), **sizes, "us": us, "ratio": us / floor, "error": error}


def options(block: str, *choices: tuple[int, ...]) -> list[dict[str, int]]:
    """choices: BLOCK_R, the other block, warps, stages, and for shrink CHUNK."""
    names = ("BLOCK_R", block, "num_warps", "num_stages", "CHUNK")
    return [dict(zip(names, c, strict=False)) for c in choices]


def changed(kernel: str, kind: str, *choices: tuple[int, ...]) -> list[dict[str, int]]:
    """choices: BLOCK_R, BLOCK_N, DOT_N, STAGES, warps."""
    names = ("BLOCK_R", "BLOCK_N", "DOT_N", "STAGES", "num_warps")
    return [getattr(lora_triton, kernel)[kind] | dict(zip(names, c, strict=True)) for c in choices]


CANDIDATES: dict[tuple[str, str], list[dict[str, int]]] = {
    ("SHRINK", "few"): options("BLOCK_K", (16, 64, 1, 6, 256), (8, 128, 2, 4, 256)),
    ("SHRINK", "many"): options("BLOCK_K", (16, 64, 1, 6, 256), (16, 128, 2, 4, 1024), (16, 64, 1, 6, 2048)),
    **{
        (kernel, kind): changed(kernel, kind, *choices)
        for kernel in ("EXPAND", "GATED")
        for kind, choices in {
            "few": ((4, 1024, 0, 1, 4), (8, 512, 0, 1, 2)),
            "many": ((4, 2048, 0, 1, 4), (4, 512, 0, 1, 2), (8, 1024, 0, 1, 4)),
            "high": ((64, 1024, 128, 3, 4), (64, 512, 64, 3, 4), (32, 512, 128, 3, 4)),
            "prompts": ((16, 1024, 128, 2, 4), (16, 2048, 128, 3, 4), (16, 1024, 64, 3, 4)),
            "prompts, high": ((64, 1024, 64, 3, 4), (64, 512, 64, 3, 8), (64, 512, 128, 2, 8)),
        }.items()
    },
}  # fmt: skip
TUNED_AT = {
    "few": (LOW_RANK_ROWS, (((8,), 2), ((16,) * 4, 16))),
    "many": (LOW_RANK_ROWS, (((8,) * 64, DECODE_ROWS), ((8,) * 256, DECODE_ROWS), ((8,) * 16, DECODE_ROWS))),
    "high": (
        HIGH_RANK_ROWS,
        (((64,) * 64, DECODE_ROWS), ((64,), 2), ((64,) * 4, DECODE_ROWS), ((8,) * 63 + (128,), DECODE_ROWS)),
    ),
    "prompts": (PROMPT_ROWS, (((8,) * 64, PREFILL_ROWS), ((8,) * 4, 1024))),
    "prompts, high": (PROMPT_ROWS, (((64,) * 16, PREFILL_ROWS), ((8,) * 63 + (64,), PREFILL_ROWS))),
}
"""Rows a tile, and the ranks of the adapters and the rows at which block sizes are compared."""


def tuning_rows(kernels: Sequence[str]) -> Iterator[dict[str, Any]]:
    """Kernels alone, summed over one layer's sites, for the present options (first) and the
    candidates."""
    for (kernel, kind), candidates in CANDIDATES.items():
        if kernel not in kernels:
            continue
        table, (block_m, tuned_at) = getattr(lora_triton, kernel), TUNED_AT[kind]
        present = table[kind]
        for choice in (present, *candidates):
            table[kind] = choice
            row: dict[str, Any] = {"kernel": kernel, "for": kind, **choice}
            for ranks, num_rows in tuned_at:
                sites = ["gate_up"] if kernel == "GATED" else SITES
                shapes = [Shape(site, num_rows, ranks, block_m) for site in sites]
                row[f"us_{len(ranks)}x{max(ranks)}"] = sum(kernel_us(kernel, shape) for shape in shapes)
            print(row, flush=True)
            yield row
        table[kind] = present


def kernel_us(kernel: str, shape: Shape) -> float:
    n_in, outs = shape.widths
    calls: list[Callable[[], object]] = []
    for _ in range(shape.copies):
        i = Inputs.random(shape)
        work = i.work
        h = lora_triton.shrink(i.x, i.arena, work, "a", [n_in])
        if kernel == "GATED":
            calls.append(lambda i=i, h=h, work=work: lora_triton.gated(i.y, h, i.arena, work, work.tiles))
        elif kernel == "SHRINK":
            calls.append(lambda i=i, work=work: lora_triton.shrink(i.x, i.arena, work, "a", [n_in]))
        else:
            calls.append(lambda i=i, h=h, work=work: lora_triton.expand(i.y, h, i.arena, work, "b", outs))
    return graph_us(calls)


def show(rows: list[dict[str, Any]], title: str) -> None:
    table = Table(title=title)
    for name in dict.fromkeys(k for row in rows for k in row):
        table.add_column(name, justify="right")
    for row in rows:
        cells = (row.get(c.header) for c in table.columns)
        table.add_row(*("" if v is None else f"{v:.3g}" if isinstance(v, float) else str(v) for v in cells))
    Console(width=160).print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    kinds = ["decode", "prefill", "gated", "layer", "train", "few", "tp", "gemm"]
    parser.add_argument("--only", nargs="+", choices=kinds, default=kinds[:5])
    kernels = sorted({kernel for kernel, _ in CANDIDATES})
    parser.add_argument("--tune", nargs="+", choices=kernels, default=[], help="also time these with other block sizes")
    parser.add_argument("--save", action="store_true")
    args = parser.parse_args()
    start = time.perf_counter()
    rows: list[dict[str, Any]] = []
    if "decode" in args.only:
        rows += [inference_row("decode", s) for s in decode_shapes()]
    if "prefill" in args.only:
        rows += [inference_row("prefill", s) for s in prefill_shapes()]
    if "gated" in args.only:
        rows += gated_rows()
    if "layer" in args.only:
        rows += layer_rows()
    if "few" in args.only:
        rows += few_rows()
    if "train" in args.only:
        rows += training_rows()
    show(rows, "Segmented LoRA")
    if "tp" in args.only:
        rows += part_rows()
    if "gemm" in args.only:
        rows += gemm_rows()
    if args.tune:
        tuned = list(tuning_rows(args.tune))
        show(tuned, "Block sizes: sum over a layer's sites; the first of each kernel is in use")
        rows += tuned
    seconds = time.perf_counter() - start
    finish("lora_kernels", {"triton": triton.__version__, "seconds": seconds}, rows, save=args.save)
    wrong = [row for row in rows if not row.get("error", 0.0) < TOLERANCE]  # NaN is wrong, too
    if wrong:
        sys.exit(f"wrong results: {wrong}")


if __name__ == "__main__":
    main()
