"""Throughput on one GPU: random Llama-3.1-8B weights, the shapes of the peers' table, many mixes of adapters.

One engine serves all runs. A run is METHOD:RANK:ADAPTERS[:zipf], or base: METHOD is lora or direft, with -p for
prefill-only ones; its requests, all sent at once, are spread evenly over the adapters, or by Zipf's law. mixed:ADAPTERS
has LoRA ranks from 8 to 128 in turn. Short, unmeasured requests bring a run's adapters to the device first, as far as
--slots allow, and in any case into host memory. A line for each run: output tok/s, share of the base model's, medians
of the time to the first token and of each further one, slots in use at the end, bytes of one adapter. --profile serves
some of the runs once more, unmeasured, in the last shape, and lists the kernels of two windows, one of prompts and one
of decoding.

    python -m benchmarks.gpu.serve --runs base lora:8:64 lora:8:512 lora:8:512:zipf mixed:64 --slots 512 --save
    python -m benchmarks.gpu.serve --runs base lora-p:8:512 direft-p:8:512 lora:8:1000:zipf --slots 32 --save
"""

from __future__ import annotations

import argparse
import asyncio
import json
import tempfile
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from rich.console import Console
from rich.table import Table

from benchmarks.common import LLAMA_8B, finish, linear_shapes, one_round, until_cut, write_adapter, write_direft
from benchmarks.gpu.profile import kernels
from multigraft import AsyncEngine, Scope
from multigraft.core.config import TrainingConfig
from multigraft.engine.offline import make_config

SOURCES = 4
"""Distinct adapters on disk of each kind; the others are links to them, as in the peers' script. Each is a copy on the
device."""
MIXED_RANKS = (8, 16, 24, 32, 64, 128)
DECODE_AFTER_S = 3.0
"""Of the first window's report, by when 256 prompts are through."""


@dataclass(frozen=True)
class Run:
    method: str
    rank: int
    """Of the largest adapter."""
    num: int
    zipf: bool = False

    @classmethod
    def parse(cls, text: str) -> Run:
        method, *numbers = text.split(":")
        zipf = numbers[-1:] == ["zipf"]
        counts = [int(n) for n in numbers[: len(numbers) - zipf]]
        if method == "base" and not counts:
            return cls("base", 0, 0)
        if method == "mixed" and len(counts) == 1:
            return cls("mixed", max(MIXED_RANKS), counts[0], zipf)
        if method.removesuffix("-p") in ("lora", "direft") and len(counts) == 2:
            return cls(method, *counts, zipf)
        raise argparse.ArgumentTypeError(f"{text!r} is not base, mixed:ADAPTERS or METHOD:RANK:ADAPTERS[:zipf]")

    @property
    def scope(self) -> Scope | None:
        return None if self.method == "base" else Scope.PREFILL if self.method.endswith("-p") else Scope.ALL

    @property
    def family(self) -> str:
        return f"{self.method.removesuffix('-p')}{self.rank}-"

    def ranks(self) -> list[int]:
        """Of the distinct adapters on disk."""
        return list(MIXED_RANKS) if self.method == "mixed" else [self.rank] * min(SOURCES, self.num)

    def names(self, requests: int, rng: np.random.Generator) -> list[str | None]:
        """Of each request."""
        if not self.num:
            return [None] * requests
        if not self.zipf:
            return [f"{self.family}{i % self.num}" for i in range(requests)]
        odds = 1 / np.arange(1, self.num + 1)
        return [f"{self.family}{i}" for i in rng.choice(self.num, requests, p=odds / odds.sum())]


def write_families(root: Path, config: transformers.PretrainedConfig, runs: list[Run]) -> Path:
    """The folder of all runs' adapters."""
    folder = root / "adapters"
    folder.mkdir()
    sources: dict[tuple[str, int, int], Path] = {}
    for run in runs:
        write = write_direft if run.family.startswith("direft") else write_adapter
        distinct = []
        for seed, rank in enumerate(run.ranks()):
            key = write.__name__, rank, seed
            if key not in sources:
                sources[key] = write(root / f"source{len(sources)}", config, rank, seed=seed)
            distinct.append(sources[key])
        for i in range(run.num):
            link = folder / f"{run.family}{i}"
            if not link.exists():
                link.symlink_to(distinct[i % len(distinct)])
    return folder


def slot_bytes(run: Run, slots: int, config: transformers.PretrainedConfig) -> int:
    """Device memory of as many adapters as a run has in slots at once."""
    n = min(run.num, slots)
    if run.family.startswith("direft"):
        return n * (2 * run.rank * config.hidden_size + run.rank + 1024) * config.num_hidden_layers * 2
    each = run.ranks()
    a_rank = sum(a + b for a, b in linear_shapes(config).values()) * config.num_hidden_layers * 2
    return sum(each[i % len(each)] * a_rank + 2**20 for i in range(n))


async def measure(args: argparse.Namespace, root: Path, settings: dict[str, Any], rows: list[dict[str, Any]]) -> None:
    """Adds to the rows as they are measured, and to settings how many seconds the engine's start took."""
    model = root / "model"
    model.mkdir()
    (model / "config.json").write_text(json.dumps(LLAMA_8B))
    config = transformers.AutoConfig.from_pretrained(model)
    began = time.perf_counter()
    folder = write_families(root, config, args.runs)
    print(f"wrote the adapters in {time.perf_counter() - began:.1f} s", flush=True)
    began = time.perf_counter()
    engine = await AsyncEngine.start(
        replace(
            make_config(
                str(model),
                load_format="dummy",
                device="cuda",
                max_model_len=2048,
                max_loras=args.slots,
                max_cpu_loras=args.host_adapters,
                max_lora_rank=max(16, *(run.rank for run in args.runs)),
                adapter_memory_gib=max(slot_bytes(run, args.slots, config) for run in args.runs) / 2**30 + 0.1,
                lora_dir=folder,
                enable_prefix_caching=False,
                max_num_seqs=args.max_num_seqs,
                max_num_batched_tokens=args.max_num_batched_tokens,
                enforce_eager=args.enforce_eager,
                attention_backend=args.attention_backend,
            ),
            training=TrainingConfig() if args.training else TrainingConfig(max_training_jobs=0),
        ),
        progress=lambda text: print(f"  {time.perf_counter() - began:.1f} s: {text}", flush=True),
    )
    settings["start_s"] = round(time.perf_counter() - began, 1)
    print(f"started in {settings['start_s']} s, {engine.parts.kv_tokens} KV tokens", flush=True)
    rng = np.random.default_rng(0)
    for shape in args.shapes:
        unmeasured = 1  # a shape's first round, in which caches grow to its size
        prompt_len, output_len = map(int, shape.split(":"))
        for run in args.runs:
            if time.perf_counter() - began > args.seconds:
                print(f"{shape} {run}: left out, --seconds are over", flush=True)
                continue
            names = run.names(args.requests, rng)
            began_first = time.perf_counter()
            first = sorted({n for n in names if n}) or [None]
            await one_round(engine, run.scope, first, rng.integers(10, config.vocab_size, (len(first), 8)).tolist(), 4)
            first_s = time.perf_counter() - began_first
            rounds = []
            for _ in range(args.repeats + unmeasured):
                prompts = rng.integers(10, config.vocab_size, (args.requests, prompt_len)).tolist()
                rounds.append(await one_round(engine, run.scope, names, prompts, output_len))
            unmeasured = 0
            nbytes = engine.parts.store.resolve(names[0]).nbytes if names[0] else 0
            row = {"shape": shape, "method": run.method, "rank": run.rank, "adapters": run.num, "zipf": run.zipf}
            row |= {"slots_at_hand": args.slots} | max(rounds[-args.repeats :], key=lambda r: r["tok_s"])
            rows.append(row | {"slots": engine.stats().slots_used, "adapter_bytes": nbytes, "first_use_s": first_s})
            base = next((r["tok_s"] for r in rows if r["shape"] == shape and r["method"] == "base"), None)
            if base:
                rows[-1]["share"] = rows[-1]["tok_s"] / base
            print({k: round(v, 3) if isinstance(v, float) else v for k, v in rows[-1].items()}, flush=True)
    for run in args.profile:
        print(f"{shape} {run}:")
        prompts = rng.integers(10, config.vocab_size, (args.requests, prompt_len)).tolist()
        names = run.names(args.requests, rng)
        serving = asyncio.create_task(one_round(engine, run.scope, names, prompts, output_len))
        row = next((r for r in reversed(rows) if Run(r["method"], r["rank"], r["adapters"], r["zipf"]) == run), {})
        for window, start in (("prefill", 0.3), ("decode", DECODE_AFTER_S)):
            if report := await kernels(serving, start, 0.4):
                row[f"{window}_kernels"] = report
                print(f"  {window}: {report['kernel_ms']:.0f} ms of kernels in {report['window_s']} s")
                for k in report["kernels"]:
                    print(f"    {k['ms']:8.2f} ms {k['calls']:6d} x {k['kernel']}", flush=True)
        await serving
    await engine.shutdown(1.0)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=Run.parse, nargs="+", default=["base", "lora:8:16", "lora:8:64"])
    parser.add_argument("--shapes", nargs="+", default=["512:128", "128:256"], help="prompt:output tokens")
    parser.add_argument("--slots", type=int, default=64)
    parser.add_argument("--host-adapters", type=int, default=64, help="kept in host memory")
    parser.add_argument("--requests", type=int, default=512)
    parser.add_argument("--repeats", type=int, default=1)
    parser.add_argument("--max-num-seqs", type=int, default=256)
    parser.add_argument("--max-num-batched-tokens", type=int, default=8192)
    parser.add_argument("--enforce-eager", action="store_true")
    parser.add_argument("--attention-backend", default="auto")
    parser.add_argument("--training", action="store_true", help="keep room for fine-tuning, as a server does")
    parser.add_argument("--seconds", type=float, default=1e9, help="from the start on, begin no run after so many")
    parser.add_argument("--profile", type=Run.parse, nargs="*", default=[], help="some of --runs: list their kernels")
    parser.add_argument("--save", action="store_true")
    args = parser.parse_args()
    args.runs = [Run.parse(run) if isinstance(run, str) else run for run in args.runs]
    used = ("requests", "repeats", "max_num_seqs", "max_num_batched_tokens", "enforce_eager", "host_adapters")
    settings = {k: getattr(args, k) for k in used}
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder, until_cut():
        asyncio.run(measure(args, Path(folder), settings, rows))
    table = Table("shape", "method", "rank", "adapters", "tok/s", "of base", "TTFT s", "TPOT ms", "slots", "MiB each")
    for r in rows:
        table.add_row(
            r["shape"], r["method"], str(r["rank"]), f"{r['adapters']}{' zipf' if r['zipf'] else ''}",
            f"{r['tok_s']:.0f}", f"{r['share']:.3f}" if "share" in r else "-", f"{r['ttft_s']:.2f}",
            f"{1e3 * r['tpot_s']:.1f}", f"{r['slots']} of {r['slots_at_hand']}", f"{r['adapter_bytes'] / 2**20:.1f}",
        )  # fmt: skip
    Console(width=120).print(table)
    settings["peak_gib"] = round(torch.cuda.max_memory_allocated() / 2**30, 1)
    finish("gpu_serve", settings, rows, save=args.save)


if __name__ == "__main__":
    main()
