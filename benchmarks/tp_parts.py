"""What the parts of a tensor-parallel step cost, for tp_model.py: read from results/, or from a named stand-in.

Kernels cost a time for each launch, for each byte and for each operation, fitted to times measured at Llama-3.1-8B's
shapes. Collectives are interpolated between measured sizes; for more GPUs than were measured, NCCL's cost model takes
what it is off by for two.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import transformers

from benchmarks.common import LLAMA_8B, RESULTS, linear_shapes
from multigraft.core.batch import LOW_RANK

MEMORY = {"A100": 2.039e12, "H100": 3.35e12, "H200": 4.8e12}
COMPUTE = {"A100": 312e12, "H100": 989e12, "H200": 989e12}
"""bytes/s and dense bf16 FLOP/s of NVIDIA's datasheets (SXM; 80, 80 and 141 GB)."""
WIRE = {"A100": 235e9, "H100": 370e9, "H200": 370e9}
"""bytes/s of a ring over NVLink: NCCL's limit for A100 (tuning.cc), its maintainers' figure (nccl-tests issue 212)."""
RINGS = ((6.6, 0.6, 0.5), (14.0, 1.9, 0.92), (8.4, 3.4, 1.0))
"""NCCL's cost model of its protocols LL, LL128, Simple (2.28.7, tuning.cc): us, us a step, share of the bandwidth."""
SITES = {
    "qkv": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "o": ("self_attn.o_proj",),
    "gate_up": ("mlp.gate_proj", "mlp.up_proj"),
    "down": ("mlp.down_proj",),
}
BY_INPUTS = ("o", "down")
BASE_BYTES_PER_S = 3.0e12
"""With which docs/log.md counts its floors on an H100."""


class Cost(NamedTuple):
    """us of kernels that are launched, bytes that move, and operations."""

    launch: float
    byte: float
    flop: float

    def us(self, kernels: float, nbytes: float, flops: float = 0.0) -> float:
        return self.launch * kernels + self.byte * nbytes + self.flop * flops

    def scaled(self, of: str, to: str) -> Cost:
        """As on another card."""
        return Cost(self.launch, self.byte * MEMORY[of] / MEMORY[to], self.flop * COMPUTE[of] / COMPUTE[to])

    @classmethod
    def fit(cls, features: Sequence[tuple[float, float, float]], us: Sequence[float]) -> Cost:
        """Least squares of the relative errors, no term negative. features: (kernels, bytes, operations)."""
        x = np.array(features) / np.array(us)[:, None]
        used = [i for i in range(3) if x[:, i].any()]
        while True:
            scale = x[:, used].max(0)
            found = np.linalg.lstsq(x[:, used] / scale, np.ones(len(x)), rcond=None)[0]
            if (found >= 0).all():
                break
            used.pop(int(found.argmin()))
        terms = dict(zip(used, found / scale, strict=True))
        return cls(*(float(terms.get(i, 0.0)) for i in range(3)))


@dataclass(frozen=True)
class Layer:
    """One rank's part of a Llama-shaped decoder layer."""

    config: Any
    num_ranks: int

    def site(self, name: str) -> tuple[int, tuple[int, ...]]:
        """(inputs, outputs of each member)"""
        shapes, n = linear_shapes(self.config), self.num_ranks
        n_in, outs = shapes[SITES[name][0]][0], tuple(shapes[path][1] for path in SITES[name])
        if name in BY_INPUTS:
            return n_in // n, outs
        return n_in, (outs[0] // n, self.kv_width, self.kv_width) if name == "qkv" else tuple(o // n for o in outs)

    @property
    def kv_width(self) -> int:
        """Features of the keys: heads are repeated where there are more ranks."""
        return max(1, self.config.num_key_value_heads // self.num_ranks) * self.config.head_dim

    def small_bytes(self, rows: int) -> float:
        """Of norms with the residual added (four passes, twice), rotation and cache writes, and SwiGLU."""
        split = 2 * sum(self.site("qkv")[1]) + 3 * self.site("gate_up")[1][0]
        return 2 * rows * (8 * self.config.hidden_size + split)


FEW_ROWS = 32
"""As kernels.linear_triton.MAX_ROWS, which only Triton can tell."""
WHOLE_8B = Layer(transformers.LlamaConfig(**LLAMA_8B), 1)


def lora_sizes(
    n_in: int, outs: Sequence[int], rank_a: float, rank_b: float, num: int, rows: int, *, in_swiglu: bool = False
) -> tuple[int, float, float]:
    """(kernels, bytes, operations) of shrink and expand: rank_a rows of A for each member, rank_b of B on its outputs.

    in_swiglu: expand is inside SwiGLU, which is launched and passes over y for the base anyway."""
    a, b = rank_a * n_in * len(outs), rank_b * sum(outs)
    kernels, y = (1, 0) if in_swiglu else (2, 2 * sum(outs))
    return kernels, 2 * (num * (a + b) + rows * (n_in + y)), 2 * rows * (a + b)


def known_gpu(line: dict[str, Any]) -> str | None:
    """The card of a result line; None: some other machine."""
    return next((gpu for gpu in MEMORY if gpu in line["machine"]), None)


def read_lines(folder: Path, name: str) -> list[dict[str, Any]]:
    """Result lines of cards that are known here."""
    file = folder / f"{name}.jsonl"
    lines = map(json.loads, file.read_text().splitlines()) if file.exists() else ()
    return [line for line in lines if known_gpu(line)]


def newest(lines: list[dict[str, Any]], wanted: Callable[[dict[str, Any]], bool]) -> dict[str, Any] | None:
    """The last line with such rows, and those alone."""
    for line in reversed(lines):
        if rows := [row for row in line["rows"] if "kind" in row and wanted(row)]:
            return line | {"rows": rows}
    return None


@dataclass
class Parts:
    """On one kind of card."""

    gpu: str
    folder: Path = RESULTS
    sources: list[tuple[str, str, bool]] = field(default_factory=list)
    """(what, where from, whether measured)"""

    def __post_init__(self) -> None:
        lines = read_lines(self.folder, "lora_kernels")
        kinds = (("gemm",), ("decode", "tp"), ("prefill",))
        gemm, decode, prefill = (newest(lines, lambda row, k=k: row["kind"] in k) for k in kinds)
        alike = [line for line in lines if decode and known_gpu(line) == known_gpu(decode)]
        layers = newest(alike, lambda row: row["kind"] == "layer")
        needed = {"layer": layers, "decode": decode, "prefill": prefill}
        assert all(needed.values()), f"{self.folder}/lora_kernels.jsonl must have rows of each kind of {list(needed)}"
        self._read_others()
        self._gemm = self._read_gemm(gemm) if gemm else self._read_layers(layers)
        self._gemm_rate = self._read_gemm_rate(gemm)
        self.adapters = self._read_adapters(decode, layers)
        self.adapters_prefill = self._read_adapters(prefill)
        self._spared = {of: self._read_spared(layers, *of) for of in ((True, True), (True, False), (False, False))}
        self._collectives: dict[int, dict[str, tuple[list[float], list[float]]]] = {}
        self._read_collectives()

    def _note(self, what: str, where: str, measured: bool = True) -> None:
        self.sources.append((what, where, measured))

    # Sources -------------------------------------------------------------------------------------------------------

    def _read_gemm(self, line: dict[str, Any]) -> Cost:
        """Of up to a few hundred rows."""
        of, features, times = known_gpu(line), [], []
        for row in (row for row in line["rows"] if row["rows"] <= 256):
            n_in, outs = Layer(WHOLE_8B.config, row["num_ranks"]).site(row["site"])
            features.append((1, 2 * n_in * sum(outs), 2 * row["rows"] * n_in * sum(outs)))
            times.append(row["us"])
        self._note("base products", f"lora_kernels.jsonl, gemm, {line['date']} ({of})")
        return Cost.fit(features, times).scaled(of, self.gpu)

    def _read_layers(self, line: dict[str, Any]) -> Cost:
        """As _read_gemm, from whole layers' products and SwiGLU: weights of one size, so launches are in the bytes."""
        of, features, times = known_gpu(line), [], []
        whole = sum(n_in * n_out for n_in, n_out in linear_shapes(WHOLE_8B.config).values())
        for row in line["rows"]:
            weights = whole / row.get("num_ranks", 1)
            swiglu = 6 * row["rows"] * WHOLE_8B.config.intermediate_size / row.get("num_ranks", 1)
            features.append((0, 2 * weights + swiglu, 2 * row["rows"] * weights))
            times.append(row["base_us"] - self.small_kernel)
        cost = Cost.fit(features, times)
        self._note("base products", f"{1e-6 / cost.byte:.1f} TB/s: lora_kernels.jsonl, layer, {line['date']} ({of})")
        return cost.scaled(of, self.gpu)

    def _read_gemm_rate(self, line: dict[str, Any] | None) -> float:
        """us an operation of thousands of rows."""
        if line is None:
            self._note("base products, prefill", "738 TFLOP/s: docs/log.md, GPU second round (H100)")
            return 1e6 / 738e12 * COMPUTE["H100"] / COMPUTE[self.gpu]
        rates = []
        for row in (row for row in line["rows"] if row["rows"] > 256):
            n_in, outs = Layer(WHOLE_8B.config, row["num_ranks"]).site(row["site"])
            rates.append(row["us"] / (2 * row["rows"] * n_in * sum(outs)))
        return float(np.median(rates)) * COMPUTE[known_gpu(line)] / COMPUTE[self.gpu]

    def _read_adapters(self, line: dict[str, Any], layers: dict[str, Any] | None = None) -> Cost:
        """Of kernels that wait for one another. layers: of the same card; each of its rows counts as its four sites."""
        features, times = [], []
        for row in (row for row in line["rows"] if isinstance(row["rank"], int)):
            site = Layer(WHOLE_8B.config, row.get("num_ranks", 1)).site(row["site"])
            rows = row.get("rows", 8192 if row["kind"] == "prefill" else 256)
            features.append(lora_sizes(*site, row["rank"], row["rank"], row["adapters"], rows))
            times.append(row["us"])
        for row in layers["rows"] if layers else ():
            of_row = (row["rank"], row["rank"], row["adapters"], row["rows"])
            layer = Layer(WHOLE_8B.config, row.get("num_ranks", 1))
            sizes = [lora_sizes(*layer.site(s), *of_row, in_swiglu=s == "gate_up") for s in SITES]
            features += len(SITES) * [tuple(map(sum, zip(*sizes, strict=True)))]
            times += len(SITES) * [row["serial_us"]]
        cost, of = Cost.fit(features, times), known_gpu(line)
        assert layers is None or known_gpu(layers) == of, "layers and decode kernels were timed on unlike cards"
        off = np.median([abs(cost.us(*f) / us - 1) for f, us in zip(features, times, strict=True)])
        kinds = " and ".join(sorted({row["kind"] for row in line["rows"]}) + ["layer"] * bool(layers))
        self._note(f"adapters, {kinds}", f"lora_kernels.jsonl, {line['date']} ({of}); fits to {off:.0%} (median)")
        return cost.scaled(of, self.gpu)

    def spared(self, rows: int, rank: float) -> float:
        """us of a site that a decode step spares: few rows and low ranks in one kernel, others on a second stream."""
        few = rows <= FEW_ROWS
        return self._spared[few, few and rank <= LOW_RANK]

    def _read_spared(self, line: dict[str, Any], few: bool, one_kernel: bool) -> float:
        rows = [row for row in line["rows"] if (row["rows"] <= FEW_ROWS) == few]
        way = "one_kernel_us" if one_kernel else "beside_us"
        spared = [row["serial_us"] - row[way] for row in rows if way in row]
        mean = sum(spared) / len(spared)
        where = f"lora_kernels.jsonl, layer, {line['date']} ({known_gpu(line)})"
        what = f"{mean:.1f} us a layer ({min(spared):.1f} to {max(spared):.1f}): mean of {where}"
        kind = "few rows, low ranks" if one_kernel else "few rows" if few else "many rows"
        self._note(f"spared with {kind}", what)
        return mean / len(SITES)

    def _read_others(self) -> None:
        slope, launch = np.polyfit((160, 256, 384), (69, 103, 149), 1)  # us by context, of 256 rows
        self.attention = Cost(float(launch), float(slope) / (256 * 4 * WHOLE_8B.kv_width), 0).scaled("H100", self.gpu)
        self._note("attention", "69, 103, 149 us a layer of 256 rows: docs/log.md, GPU second round (H100)")
        fixed = 1e3 / 32 - 1e6 * WHOLE_8B.small_bytes(256) / BASE_BYTES_PER_S
        self.others = Cost(fixed, 1e6 / BASE_BYTES_PER_S, 0).scaled("H100", self.gpu)
        self._note("all else", "1.0 ms a step of 256 rows: docs/log.md, GPU path of serving (H100)")
        self.small_kernel = fixed / 6
        self._note("one small kernel", f"{self.small_kernel:.1f} us: a sixth of all else's launches", False)
        a_byte = (0.2 * 205e3 / 32 - fixed) / WHOLE_8B.small_bytes(8192)
        self.others_prefill = Cost(fixed, a_byte, 0).scaled("H100", self.gpu)
        self._note("all but products, prefill", "20 % of 205 ms: docs/log.md, GPU second round (H100)")

    def _read_collectives(self) -> None:
        for line in read_lines(self.folder, "tp_collectives"):
            if WIRE[known_gpu(line)] != WIRE[self.gpu]:
                continue
            table: dict[str, tuple[list[float], list[float]]] = {}
            for row in line["rows"]:
                sizes, times = table.setdefault(row["kind"], ([], []))
                sizes.append(row["bytes"])
                times.append(row["us"])
            self._collectives[line["size"]] = table
            self._note(f"collectives of {line['size']}", f"tp_collectives.jsonl, {line['date']} ({line['machine']})")
        if left := [str(size) for size in (2, 4, 8) if size not in self._collectives]:
            where = f"NCCL's own cost model of rings, {WIRE[self.gpu] / 1e9:.0f} GB/s, no NVLink multicast"
            where += "; times what it is off at 2" * (2 in self._collectives)
            self._note(f"collectives of {', '.join(left)}", where, False)

    # Costs ---------------------------------------------------------------------------------------------------------

    def product(self, n_in: int, n_out: int, rows: int) -> float:
        """us of a base linear."""
        flops = 2 * rows * n_in * n_out
        return max(self._gemm.us(1, 2 * n_in * n_out, flops), self._gemm_rate * flops)

    def collective(self, kind: str, nbytes: float, size: int) -> float:
        """us. nbytes: of the sum, or of all that is gathered."""
        if size not in self._collectives:
            off = self.collective(kind, nbytes, 2) / self._modelled(kind, nbytes, 2) if 2 in self._collectives else 1.0
            return off * self._modelled(kind, nbytes, size)
        sizes, times = self._collectives[size][kind]
        if nbytes > sizes[-1]:
            return times[-1] * nbytes / sizes[-1]
        return float(np.exp(np.interp(np.log(nbytes), np.log(sizes), np.log(times))))

    def _modelled(self, kind: str, nbytes: float, size: int) -> float:
        steps = (2 if kind == "all_reduce" else 1) * (size - 1)
        sent = 1e6 * nbytes * steps / size / WIRE[self.gpu]
        return min(first + step * steps + sent / share for first, step, share in RINGS)
