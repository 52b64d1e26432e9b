"""Prefill-only adapters against adapters on all tokens: LoRA, LoRA-P, DiReFT, DiReFT-P, and the base model.

For each method, number of adapters and prompt:output shape: output tok/s, share of the base model, time to first
token and time for each further token (medians), the most device slots that requests held at once, and bytes of one
adapter. All requests are sent at once, spread evenly over the adapters, random prompts, temperature 1, EOS ignored.
Short, unmeasured requests bring the adapters into host memory first. Methods on all tokens have a device slot for every
adapter; prefill-only ones share --prefill-slots, in an engine and process of their own, and are compared with the base
model there. Prints a table, draws throughput against the number of adapters (PNG), and ends in one JSON line; --save
appends the line to benchmarks/results/preft.jsonl.

    python -m benchmarks.preft MODEL_FOLDER --adapters 1 16 --requests 32 --shapes 128:64          (CPU)
    python -m benchmarks.preft random-8b --adapters 1 16 64 256 512 --shapes 512:128 128:256 --rank 8 16     (one GPU)

Where a machine is lent for minutes only, run it in pieces (--rank, --methods) and then show them together:

    python -m benchmarks.preft --join 4      table and plot of the last four lines of results/preft.jsonl

Of cases that several lines have, the last one's counts.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import multiprocessing
import os
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import transformers
from rich.console import Console
from rich.table import Table

from benchmarks.common import (
    LLAMA_8B,
    RESULTS,
    finish,
    one_round,
    saved_rows,
    until_cut,
    write_adapter,
    write_direft,
)
from multigraft import AsyncEngine, Scope
from multigraft.core.batch import Batch
from multigraft.engine.offline import make_config

ROWS = "rows.jsonl"
SOURCES = 4
"""Distinct adapters on disk for each method; the others are links. Each is a copy on the device."""


@dataclass(frozen=True)
class Method:
    name: str
    family: str | None
    """Prefix of its adapters' names; None is the base model."""
    scope: Scope | None = None


METHODS = (
    Method("base", None),
    Method("LoRA", "lora", Scope.ALL),
    Method("DiReFT", "direft", Scope.ALL),
    Method("LoRA-P", "lora", Scope.PREFILL),
    Method("DiReFT-P", "direft", Scope.PREFILL),
)


def write_all(root: Path, config: transformers.PretrainedConfig, rank: int, count: int) -> Path:
    """A folder of `count` adapters of each family, lora0, lora1, …, direft0, …"""
    folder = root / f"adapters-{rank}"
    folder.mkdir()
    for family, write in (("lora", write_adapter), ("direft", write_direft)):
        sources = [write(root / f"{family}-{rank}-{i}", config, rank, seed=i) for i in range(min(count, SOURCES))]
        for i in range(count):
            (folder / f"{family}{i}").symlink_to(sources[i % len(sources)])
    return folder


class HeldSlots:
    """The most device slots that the requests of one step held."""

    def __init__(self, engine: AsyncEngine):
        self._most = 0
        runner = engine.parts.runner
        execute = runner.execute

        def counted(batch: Batch, *args: Any, **kwargs: Any) -> Any:
            self._most = max(self._most, len({span.request.slot for span in batch.spans} - {None}))
            return execute(batch, *args, **kwargs)

        runner.execute = counted  # type: ignore[method-assign]

    def take(self) -> int:
        """Since the last call."""
        most, self._most = self._most, 0
        return most


async def run_engine(
    args: argparse.Namespace, methods: list[Method], rank: int, slots: int, folder: Path, vocab: int, settings: Any
) -> None:
    """Rows of the methods that one engine serves, base among them, are added to the file ROWS beside the folder."""
    largest = max((path / "adapter_model.safetensors").stat().st_size for path in folder.iterdir())
    engine = await AsyncEngine.start(
        make_config(
            **settings,
            max_loras=slots,
            adapter_memory_gib=slots * (largest + 2**20) / 2**30,
            max_cpu_loras=2 * max(args.adapters),
            max_lora_rank=max(16, rank),
            lora_dir=folder,
            enable_prefix_caching=False,
            max_num_seqs=args.max_num_seqs,
            max_num_batched_tokens=args.max_num_batched_tokens,
            compile=args.compile,
        )
    )
    rng, slots_held = np.random.default_rng(0), HeldSlots(engine)
    for method in methods:
        names = [f"{method.family}{i}" for i in range(max(args.adapters))] if method.family else [None] * args.requests
        began = time.perf_counter()
        await one_round(engine, method.scope, names, rng.integers(10, vocab, (len(names), 8)).tolist(), 4)
        print(f"{method.name}: first use of all adapters took {time.perf_counter() - began:.1f} s", flush=True)
    for shape in args.shapes:
        prompt_len, output_len = map(int, shape.split(":"))
        unmeasured = 1  # a shape's first round, in which caches grow to its size
        for method in methods:
            for num in [0] if method.family is None else args.adapters:
                names = [f"{method.family}{i % num}" if num else None for i in range(args.requests)]
                rounds = []
                slots_held.take()
                for _ in range(args.repeats + unmeasured):
                    prompts = rng.integers(10, vocab, (args.requests, prompt_len)).tolist()
                    rounds.append(await one_round(engine, method.scope, names, prompts, output_len))
                unmeasured = 0
                best = max(rounds[-args.repeats :], key=lambda r: r["tok_s"])
                nbytes = engine.parts.store.resolve(names[0]).nbytes if names[0] else 0
                row = {"shape": shape, "method": method.name, "rank": rank, "adapters": num, "slots_at_hand": slots}
                row |= best | {"slots": slots_held.take(), "adapter_bytes": nbytes}
                print(row, flush=True)
                with (folder.parent / ROWS).open("a") as file:
                    file.write(json.dumps(row) + "\n")
    await engine.shutdown(1.0)


def run_here(*task: Any) -> None:
    asyncio.run(run_engine(*task))


def run_elsewhere(*task: Any) -> None:
    """A process has one engine: the memory of the next one is then free for certain."""
    process = multiprocessing.get_context("spawn").Process(target=run_here, args=task)
    process.start()
    try:
        process.join()
    finally:
        process.kill()  # if it was cut off
    if process.exitcode:
        sys.exit(process.exitcode)


def joined(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The last of each case, in order."""
    names = [m.name for m in METHODS]
    last = {(r["shape"], r["rank"], names.index(r["method"]), r["adapters"], r["slots_at_hand"]): r for r in rows}
    return [last[case] for case in sorted(last)]


def share_of_base(rows: list[dict[str, Any]]) -> None:
    for row in rows:
        shared = ("shape", "rank", "slots_at_hand")
        base = next(r for r in rows if r["method"] == "base" and all(r[k] == row[k] for k in shared))
        row["share"] = row["tok_s"] / base["tok_s"]


def show(rows: list[dict[str, Any]]) -> None:
    table = Table("shape", "rank", "method", "adapters", "tok/s", "of base", "TTFT s", "TPOT ms", "slots", "MiB each")
    for r in rows:
        table.add_row(
            r["shape"], str(r["rank"]), r["method"], str(r["adapters"]), f"{r['tok_s']:.0f}", f"{r['share']:.2f}",
            f"{r['ttft_s']:.2f}", f"{1e3 * r['tpot_s']:.1f}", str(r["slots"]), f"{r['adapter_bytes'] / 2**20:.2f}",
        )  # fmt: skip
    Console(width=110).print(table)


def plot(rows: list[dict[str, Any]], adapters: list[int], file: Path) -> None:
    """One panel for each shape and rank, one line a method."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    panels = sorted({(r["shape"], r["rank"]) for r in rows})
    figure, axes = pyplot.subplots(1, len(panels), figsize=(5 * len(panels), 4), squeeze=False, layout="constrained")
    for axis, panel in zip(axes[0], panels, strict=True):
        for i, method in enumerate(METHODS):
            mine = [r for r in rows if r["method"] == method.name and (r["shape"], r["rank"]) == panel]
            if method.family is None:
                axis.axhline(mine[0]["tok_s"], color="black", linestyle="--", label="base")
            elif mine:
                style = "-" if method.scope is Scope.PREFILL else ":"
                points = [r["adapters"] for r in mine], [r["tok_s"] for r in mine]
                axis.plot(*points, style, color=f"C{i}", marker="o", label=method.name)
        axis.set(
            xscale="log", xlabel="adapters", ylabel="output tok/s", title=f"prompt:output {panel[0]}, r={panel[1]}"
        )
        axis.set_ylim(bottom=0)
        axis.set_xticks(adapters, [str(n) for n in adapters], minor=False)
        axis.minorticks_off()
        axis.legend()
    file.parent.mkdir(exist_ok=True)
    figure.savefig(file, dpi=150)
    print(f"drew {file}")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "model", nargs="?", help="a folder, or random-8b for random weights of Llama-3.1-8B's shape on a GPU"
    )
    parser.add_argument("--adapters", type=int, nargs="+", default=[1, 16, 64, 256, 512])
    parser.add_argument("--shapes", nargs="+", default=["512:128", "128:256"])
    parser.add_argument("--rank", type=int, nargs="+", default=[8, 16])
    parser.add_argument("--methods", nargs="+", default=[m.name for m in METHODS], choices=[m.name for m in METHODS])
    parser.add_argument("--requests", type=int, default=512)
    parser.add_argument("--prefill-slots", type=int, default=32)
    parser.add_argument("--max-num-seqs", type=int, default=256)
    parser.add_argument("--max-num-batched-tokens", type=int, default=2048)
    parser.add_argument("--repeats", type=int, default=1)
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--plot", type=Path, default=Path(os.environ.get("OUT", RESULTS)) / "preft.png")
    parser.add_argument("--join", type=int, metavar="LINES", help="of results/preft.jsonl, in place of a run")
    parser.add_argument("--save", action="store_true")
    args = parser.parse_args()
    if (args.model is None) == (args.join is None):
        parser.error("a model, or --join")
    return args


def main() -> None:
    args = parse()
    if args.join:
        rows = joined(saved_rows("preft", args.join))
        show(rows)
        plot(rows, sorted({r["adapters"] for r in rows} - {0}), args.plot)
        return
    chosen = [m for m in METHODS if m.name in {"base", *args.methods}]
    with tempfile.TemporaryDirectory() as temporary:
        root = Path(temporary)
        settings: dict[str, Any] = {"model": args.model, "device": "cpu", "dtype": "bfloat16", "kv_cache_gib": 1.0}
        if args.model == "random-8b":
            (root / "model").mkdir()
            (root / "model" / "config.json").write_text(json.dumps(LLAMA_8B))
            settings = {"model": str(root / "model"), "load_format": "dummy", "device": "cuda", "max_model_len": 2048}
        config = transformers.AutoConfig.from_pretrained(settings["model"])
        with until_cut():
            for rank in args.rank:
                folder = write_all(root, config, rank, max(args.adapters))
                for prefill, slots in (
                    (False, max(args.adapters)),
                    (True, min(args.prefill_slots, max(args.adapters))),
                ):
                    methods = [m for m in chosen if m.family is None or (m.scope is Scope.PREFILL) == prefill]
                    if len(methods) > 1:
                        run_elsewhere(args, methods, rank, slots, folder, config.vocab_size, settings)
        rows = [json.loads(line) for line in (root / ROWS).read_text().splitlines()]
    share_of_base(rows)
    show(rows)
    plot(rows, args.adapters, args.plot)
    used = ("model", "requests", "prefill_slots", "max_num_seqs", "max_num_batched_tokens", "repeats", "compile")
    args.model = Path(args.model).name
    finish("preft", {k: getattr(args, k) for k in used}, rows, save=args.save)


if __name__ == "__main__":
    main()
