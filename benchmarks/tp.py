"""Tensor-parallel decoding with adapters in each placement, at matched parameter counts: random Llama-3.1-8B weights.

For each LoRA rank: base, replicated (LoRA), s-lora (LoRA) and block-diagonal (BD-LoRA of as many parameters, as many
blocks as ranks of the group), at each batch size. Block-diagonal, replicated and base share one engine; s-lora has an
engine of its own for each rank, for it pads adapters to the largest rank.

    python -m benchmarks.tp [--size 2] [--lora-ranks 16 64 128] [--batches 1 16 64 256] [--save]

--collectives times the model's collectives alone, as replays of a CUDA graph; tp_model.py needs it.
Under --save, lines are appended as engines end, so that a run that is cut off leaves what it has.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
import transformers
from rich.console import Console
from rich.table import Table

from benchmarks.common import LLAMA_8B, finish, linear_shapes, write_adapter
from multigraft import Engine, SamplingParams
from multigraft.adapters.block_diagonal import BD_A

PROMPT, SHORT, LONG = 32, 8, 72
"""Tokens of a prompt, and of the outputs of the two runs whose difference is LONG - SHORT decode steps."""


def parameters(config: Any, rank: int, nblocks: int = 1) -> int:
    """Of an adapter on every linear of every layer."""
    total = 0
    for path, (n_in, n_out) in linear_shapes(config).items():
        by_inputs = path.endswith(BD_A)
        total += rank * (n_in // (nblocks if by_inputs else 1) + n_out // (1 if by_inputs else nblocks))
    return total * config.num_hidden_layers


def matched_rank(config: Any, rank: int, nblocks: int) -> int:
    """The rank, a multiple of nblocks, at which a block-diagonal adapter has about as many parameters as a LoRA."""
    exact = rank * parameters(config, nblocks) / parameters(config, nblocks, nblocks)
    return max(1, round(exact / nblocks)) * nblocks


def run(engine: Engine, names: list[str | None], vocab: int) -> dict[str, Any]:
    """Throughput of one batch, the time of its decode steps, and what a step exchanges."""
    rng = np.random.default_rng(0)
    seconds = {SHORT: [], LONG: []}
    for repeat in range(3):  # the first loads the adapters
        for length in (SHORT, LONG):
            prompts = rng.integers(10, vocab, (len(names), PROMPT)).tolist()
            sampling = SamplingParams(temperature=1.0, max_tokens=length, ignore_eos=True)
            before = engine.stats()
            start = time.perf_counter()
            results = engine.generate(prompts, sampling, names)
            if repeat:
                seconds[length].append(time.perf_counter() - start)
            assert all(r.error is None for r in results), next(r.error for r in results if r.error)
    after = engine.stats()
    steps = after.steps - before.steps
    moved = {k: [(a - b) / steps for a, b in zip(v, before.collectives.get(k, (0, 0)), strict=True)]
             for k, v in after.collectives.items()}  # fmt: skip
    short, long = min(seconds[SHORT]), min(seconds[LONG])
    return {
        "tok_s": len(names) * LONG / long,
        "step_ms": 1e3 * (long - short) / (LONG - SHORT),
        "collectives_step": sum(calls for calls, _ in moved.values()),
        "mb_step": sum(nbytes for _, nbytes in moved.values()) / 1e6,
    }


def check(engine: Engine, name: str | None, vocab: int) -> float:
    """Largest difference between the log-probabilities of generated tokens, from captured decode steps, and of the same
    tokens as a prompt's, from uncaptured ones."""
    rng = np.random.default_rng(1)
    prompts = rng.integers(10, vocab, (4, PROMPT)).tolist()
    sampling = SamplingParams(temperature=0.0, max_tokens=SHORT, ignore_eos=True, logprobs=0)
    results = engine.generate(prompts, sampling, name)
    tokens = [result.completions[0].token_ids for result in results]
    sampling = SamplingParams(temperature=0.0, max_tokens=1, prompt_logprobs=0)
    again = engine.generate([p + t for p, t in zip(prompts, tokens, strict=True)], sampling, name)
    worst = 0.0
    for result, other in zip(results, again, strict=True):
        assert result.error is None and other.error is None, result.error or other.error
        pairs = zip(result.completions[0].logprobs, other.prompt_logprobs[PROMPT:], strict=True)
        worst = max(worst, *(abs(a.token.logprob - b.token.logprob) for a, b in pairs))
    return worst


class Bench:
    def __init__(self, args: argparse.Namespace, root: Path):
        self.args, self.root = args, root
        (root / "model").mkdir()
        (root / "model" / "config.json").write_text(json.dumps(LLAMA_8B | {"num_hidden_layers": args.layers}))
        self.config = transformers.AutoConfig.from_pretrained(root / "model")
        self.rows: list[dict[str, Any]] = []

    def engine(self, sharding: str, sources: dict[str, Path], max_rank: int) -> Engine:
        bytes_each = 2 * parameters(self.config, max_rank) + 2**24
        folder = self.root / f"adapters-{sharding}-{max_rank}"
        folder.mkdir()
        for name, source in sources.items():
            for i in range(self.args.adapters):
                (folder / f"{name}-{i}").symlink_to(source)
        start = time.perf_counter()
        engine = Engine(
            str(self.root / "model"),
            load_format="dummy",
            device=self.args.device,
            tensor_parallel_size=self.args.size,
            lora_sharding=sharding,
            max_model_len=512,
            kv_cache_gib=8 if self.args.device == "cuda" else 0.5,
            max_loras=self.args.adapters,
            max_cpu_loras=len(sources) * self.args.adapters,
            max_lora_rank=max_rank,
            adapter_memory_gib=self.args.adapters * bytes_each / 2**30,
            lora_dir=folder,
            enable_prefix_caching=False,
            max_num_seqs=max(self.args.batches),
            max_num_batched_tokens=8192,
        )
        print(f"{sharding}, ranks up to {max_rank}: started in {time.perf_counter() - start:.1f} s", flush=True)
        return engine

    def measure(self, engine: Engine, placement: str, rank: int | None, source: str | None) -> None:
        for batch in self.args.batches:
            names = [f"{source}-{i % self.args.adapters}" if source else None for i in range(batch)]
            row = {"placement": placement, "rank": rank, "batch": batch, **run(engine, names, self.config.vocab_size)}
            if batch == self.args.batches[0]:
                row["check"] = check(engine, names[0], self.config.vocab_size)
            self.rows.append(row)
            print({k: round(v, 3) if isinstance(v, float) else v for k, v in row.items()}, flush=True)

    def save(self, name: str) -> None:
        settings = {k: getattr(self.args, k) for k in ("size", "layers", "adapters")} | {"part": name}
        settings |= {"matched": {r: matched_rank(self.config, r, self.args.size) for r in self.args.lora_ranks}}
        finish("tp", settings, self.rows, save=self.args.save)


def serve(args: argparse.Namespace, root: Path) -> list[dict[str, Any]]:
    bench = Bench(args, root)
    dense = {r: write_adapter(root / f"lora{r}", bench.config, r, seed=r) for r in args.lora_ranks}
    matched = {r: matched_rank(bench.config, r, args.size) for r in args.lora_ranks}
    blocks = {r: write_adapter(root / f"bd{r}", bench.config, m, seed=r, nblocks=args.size) for r, m in matched.items()}
    sources = {f"lora{r}": path for r, path in dense.items()} | {f"bd{r}": path for r, path in blocks.items()}
    rows = []
    with bench.engine("block-diagonal", sources, max(matched.values())) as engine:
        bench.measure(engine, "base", None, None)
        for rank in args.lora_ranks:
            bench.measure(engine, "block-diagonal", rank, f"bd{rank}")
            bench.measure(engine, "replicated", rank, f"lora{rank}")
    bench.save("together")
    for rank in args.lora_ranks if args.s_lora_ranks is None else args.s_lora_ranks:
        rows, bench.rows = rows + bench.rows, []
        with bench.engine("s-lora", {f"lora{rank}": dense[rank]}, rank) as engine:
            bench.measure(engine, "s-lora", rank, f"lora{rank}")
        bench.save(f"s-lora {rank}")
    return rows + bench.rows


def show(rows: list[dict[str, Any]]) -> None:
    table = Table("placement", "rank", "batch", "tok/s", "step ms", "of base", "collectives", "MB a step")
    base = {row["batch"]: row["step_ms"] for row in rows if row["placement"] == "base"}
    for row in sorted(rows, key=lambda row: (row["batch"], row["rank"] or 0)):
        share = f"{base[row['batch']] / row['step_ms']:.3f}" if row["batch"] in base else "-"
        cells = (f"{row['tok_s']:.0f}", f"{row['step_ms']:.3f}", share)
        moved = (f"{row['collectives_step']:.0f}", f"{row['mb_step']:.2f}")
        table.add_row(row["placement"], str(row["rank"] or "-"), str(row["batch"]), *cells, *moved)
    Console(width=110).print(table)


def time_collectives(rank: int, size: int, port: int, args: argparse.Namespace) -> None:
    """Microseconds of one collective, of 20 in a CUDA graph, by bytes of its result."""
    torch.cuda.set_device(rank)
    store = dist.TCPStore("127.0.0.1", port, size, is_master=rank == 0)
    dist.init_process_group("nccl", store=store, rank=rank, world_size=size)
    rows = []
    for kind in ("all_reduce", "all_gather"):
        for nbytes in (2**k for k in range(12, 24)):
            x = torch.zeros(nbytes // 2 // (size if kind == "all_gather" else 1), dtype=torch.bfloat16, device="cuda")
            out = x.new_empty(nbytes // 2)

            def call(kind: str = kind, x: torch.Tensor = x, out: torch.Tensor = out) -> None:
                dist.all_reduce(x) if kind == "all_reduce" else dist.all_gather_into_tensor(out, x)

            call()
            torch.cuda.synchronize()
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, capture_error_mode="thread_local"):
                for _ in range(20):
                    call()
            times = []
            for _ in range(20):
                events = [torch.cuda.Event(enable_timing=True) for _ in range(2)]
                events[0].record()
                graph.replay()
                events[1].record()
                torch.cuda.synchronize()
                times.append(events[0].elapsed_time(events[1]) / 20 * 1e3)
            rows.append({"kind": kind, "bytes": nbytes, "us": float(np.median(times))})
    if rank == 0:
        finish("tp_collectives", {"size": size}, rows, save=args.save)
    dist.destroy_process_group()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", type=int, default=2)
    parser.add_argument("--lora-ranks", type=int, nargs="+", default=[16, 64, 128])
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 16, 64, 256])
    parser.add_argument("--adapters", type=int, default=4)
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--s-lora-ranks", type=int, nargs="*", help="default: all of --lora-ranks")
    parser.add_argument("--collectives", action="store_true")
    parser.add_argument("--save", action="store_true")
    args = parser.parse_args()
    if args.collectives:
        torch.multiprocessing.spawn(time_collectives, (args.size, 29531, args), nprocs=args.size)
        return
    with tempfile.TemporaryDirectory() as folder:
        show(serve(args, Path(folder)))


if __name__ == "__main__":
    main()
