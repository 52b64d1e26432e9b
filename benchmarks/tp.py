"""Tensor-parallel decoding with adapters in each placement, at matched parameter counts, on random weights.

For each LoRA rank: base, replicated (LoRA), s-lora (LoRA) and block-diagonal (BD-LoRA of as many parameters, as many
blocks as ranks of the group), at each batch size. Block-diagonal, replicated and base share one engine; s-lora has an
engine of its own for each rank, for it pads adapters to the largest rank. --model 70b has as many of the 80 layers as
leave a quarter of a GPU's memory free; the rows say how many.

    python -m benchmarks.tp [--model 8b] [--size 2] [--lora-ranks 16 64 128] [--batches 1 16 64 256] [--save]

Two GPUs, in two calls, of about 6 and 5 minutes. The first engine's start took 67 to 76 s with cold compiler caches, of
the 70B shape 116; a measurement, four batches of one adapter, takes 17 s, of the 70B shape's three batches about 30.

    python -m benchmarks.tp --collectives --save && python -m benchmarks.tp --seconds 420 --save
    python -m benchmarks.tp --model 70b --lora-ranks 16 64 --batches 1 64 256 --adapters 2 --seconds 420 --save

One GPU, a minute or two: python -m benchmarks.gpu.lora_kernels --only tp gemm --save. Then, anywhere, the projection
and its comparison with all of these: python -m benchmarks.tp_model --save.

A line is saved after each measurement, so that a run that is cut off leaves what it has; --placements and --lora-ranks
choose what to go on with. Without a GPU: --model tiny --device cpu.

--collectives times all-reduce and all-gather alone, for tp_model.py: on GPUs as replays of a CUDA graph, for every
power of two of GPUs up to --size.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
import transformers
from rich.console import Console
from rich.table import Table

from benchmarks.common import LLAMA_8B, LLAMA_70B, finish, linear_shapes, write_adapter
from multigraft import Engine, SamplingParams
from multigraft.adapters.block_diagonal import BD_A
from multigraft.core.batch import Batch, Phase
from multigraft.core.config import TrainingConfig
from multigraft.engine.offline import make_config
from multigraft.models.parallel import Group

TINY = {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2, "num_attention_heads": 8}
MODELS = {"8b": LLAMA_8B, "70b": LLAMA_70B, "tiny": LLAMA_8B | TINY | {"head_dim": 16, "vocab_size": 512}}
PROMPT, SHORT, LONG = 32, 8, 72
"""Tokens of a prompt, and of the outputs of the two runs whose difference is LONG - SHORT decode steps."""
REPEATS = 3
PLACEMENTS = ("base", "block-diagonal", "replicated", "s-lora")
COLLECTIVE_BYTES = tuple(2**k for k in range(8, 28))
CALLS = 20
"""Collectives of one timing."""


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


def base_bytes(config: Any) -> int:
    """Of a model's weights in bf16."""
    layer = sum(n_in * n_out for n_in, n_out in linear_shapes(config).values())
    return 2 * (config.num_hidden_layers * layer + 2 * config.vocab_size * config.hidden_size)


def run(engine: Engine, names: list[str | None], vocab: int) -> dict[str, Any]:
    """Throughput of one batch, median times of its prompts and of a decode step, and what the latter exchanges."""
    rng = np.random.default_rng(0)
    walls, prompts, decodes, exchanged = [], [], [], {}
    for repeat in range(REPEATS + 1):  # the first loads the adapters
        for length in (SHORT, LONG):
            ids = rng.integers(10, vocab, (len(names), PROMPT)).tolist()
            sampling = SamplingParams(temperature=1.0, max_tokens=length, ignore_eos=True)
            before = engine.stats()
            engine._engine._core.observer = turns = Turns()
            start = time.perf_counter()
            results = engine.generate(ids, sampling, names)
            wall = time.perf_counter() - start
            assert all(r.error is None for r in results), next(r.error for r in results if r.error)
            exchanged[length] = moved(before, engine.stats())
            if repeat:
                walls += [wall] if length == LONG else []
                prompts.append(sum(turns.prompts))
                decodes += turns.decodes.get(len(names), [])
    calls, nbytes = ((a - b) / (LONG - SHORT) for a, b in zip(exchanged[LONG], exchanged[SHORT], strict=True))
    return {
        "tok_s": len(names) * LONG / min(walls),
        "prompts_ms": 1e3 * statistics.median(prompts),
        "step_ms": 1e3 * statistics.median(decodes),
        "collectives_step": calls,
        "mb_step": nbytes / 1e6,
    }


class Turns:
    """Engine's observer: the seconds of its turns, each with the spans of the step whose results it took in. Where the
    GPU is what is waited for, turns take what steps take."""

    def __init__(self) -> None:
        self.prompts: list[float] = []
        self.decodes: dict[int, list[float]] = {}
        """By the number of rows."""

    def scheduled(self, batch: Batch) -> None:
        pass

    def ran(self, batch: Batch, seconds: float) -> None:
        if any(span.phase is Phase.PREFILL for span in batch.spans):
            self.prompts.append(seconds)
        else:
            self.decodes.setdefault(len(batch.spans), []).append(seconds)


def moved(before: Any, after: Any) -> tuple[int, int]:
    """(collectives, their bytes) between two EngineStats."""
    pairs = [(v, before.collectives.get(k, (0, 0))) for k, v in after.collectives.items()]
    return sum(a[0] - b[0] for a, b in pairs), sum(a[1] - b[1] for a, b in pairs)


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
        self.began = time.perf_counter()
        (root / "model").mkdir()
        shape = dict(MODELS[args.model])
        self.whole_layers = shape["num_hidden_layers"]
        shape["num_hidden_layers"] = self.layers = args.layers or self._layers_that_fit(shape)
        (root / "model" / "config.json").write_text(json.dumps(shape))
        self.config = transformers.AutoConfig.from_pretrained(root / "model")
        self.matched = {rank: matched_rank(self.config, rank, args.size) for rank in args.lora_ranks}
        self.rows: list[dict[str, Any]] = []

    def _layers_that_fit(self, shape: dict[str, Any]) -> int:
        if self.args.device != "cuda":
            return self.whole_layers
        room = 0.75 * self.args.size * torch.cuda.get_device_properties(0).total_memory
        none, one = (base_bytes(transformers.LlamaConfig(**shape | {"num_hidden_layers": n})) for n in (0, 1))
        return min(self.whole_layers, int((room - none) / (one - none)))

    def write(self, source: str, rank: int, nblocks: int = 1) -> Path:
        folder = self.root / source
        return folder if folder.exists() else write_adapter(folder, self.config, rank, seed=rank, nblocks=nblocks)

    def engine(self, sharding: str, sources: dict[str, Path], max_rank: int) -> Engine:
        args, config = self.args, self.config
        folder = self.root / f"adapters-{sharding}-{max_rank}"
        folder.mkdir()
        for name, source in sources.items():
            for i in range(args.adapters):
                (folder / f"{name}-{i}").symlink_to(source)
        start = time.perf_counter()
        settings = make_config(
            str(self.root / "model"),
            load_format="dummy",
            device=args.device,
            tensor_parallel_size=args.size,
            lora_sharding=sharding,
            max_model_len=512,
            kv_cache_gib=self._kv_gib(),
            max_loras=args.adapters,
            max_cpu_loras=max(1, len(sources)) * args.adapters,
            max_lora_rank=max_rank,
            adapter_memory_gib=args.adapters * (2 * parameters(config, max(args.lora_ranks)) + 2**24) / 2**30,
            lora_dir=folder,
            enable_prefix_caching=False,
            max_num_seqs=max(args.batches),
            max_num_batched_tokens=max(args.batches) * PROMPT,
        )
        engine = Engine(replace(settings, training=TrainingConfig(max_training_jobs=0)))
        print(f"{sharding}, ranks up to {max_rank}: started in {time.perf_counter() - start:.1f} s", flush=True)
        return engine

    def _kv_gib(self) -> float:
        """Of a rank, twice what the largest batch needs."""
        heads = max(1, self.config.num_key_value_heads // self.args.size)
        tokens = max(self.args.batches) * (PROMPT + LONG)
        return 2 * tokens * heads * self.config.head_dim * 4 * self.layers / 2**30 + 0.1

    def measure(self, engine: Engine, placement: str, rank: int | None, source: str | None) -> None:
        """A row for each batch, saved as one line."""
        args, vocab, rows = self.args, self.config.vocab_size, []
        for batch in args.batches:
            if time.perf_counter() - self.began > args.seconds:
                print(f"{placement}, rank {rank}, batch {batch}: left out, --seconds are over", flush=True)
                break
            names = [f"{source}-{i % args.adapters}" if source else None for i in range(batch)]
            row = {"placement": placement, "rank": rank, "batch": batch, **run(engine, names, vocab)}
            if not rows:
                row["check"] = check(engine, names[0], vocab)
            rows.append(row)
            print({k: round(v, 3) if isinstance(v, float) else v for k, v in row.items()}, flush=True)
        if rows:
            settings = {k: getattr(args, k) for k in ("model", "size", "adapters")} | {"layers": self.layers}
            settings |= {"layers_of_whole": self.whole_layers, "prompt": PROMPT, "matched": self.matched}
            finish("tp", settings, rows, save=args.save)
        self.rows += rows


def serve(args: argparse.Namespace, root: Path) -> list[dict[str, Any]]:
    bench = Bench(args, root)
    kinds = {"block-diagonal": "bd", "replicated": "lora"}
    shared = [p for p in PLACEMENTS[:-1] if p in args.placements]
    sources = {}
    for placement in shared[shared[:1] == ["base"] :]:
        for rank in args.lora_ranks:
            of = (bench.matched[rank], args.size) if placement == "block-diagonal" else (rank, 1)
            sources[f"{kinds[placement]}{rank}"] = bench.write(f"{kinds[placement]}{rank}", *of)
    if shared:
        with bench.engine("block-diagonal", sources, max(bench.matched.values())) as engine:
            if "base" in shared:
                bench.measure(engine, "base", None, None)
            for rank in args.lora_ranks:
                for placement in (p for p in shared if p != "base"):
                    bench.measure(engine, placement, rank, f"{kinds[placement]}{rank}")
    for rank in args.lora_ranks if "s-lora" in args.placements else ():
        if time.perf_counter() - bench.began < args.seconds:
            with bench.engine("s-lora", {f"lora{rank}": bench.write(f"lora{rank}", rank)}, rank) as engine:
                bench.measure(engine, "s-lora", rank, f"lora{rank}")
    return bench.rows


def show(rows: list[dict[str, Any]]) -> None:
    table = Table("placement", "rank", "batch", "tok/s", "prompts ms", "step ms", "of base", "collectives", "MB a step")
    base = {row["batch"]: row["step_ms"] for row in rows if row["placement"] == "base"}
    for row in sorted(rows, key=lambda row: (row["batch"], row["rank"] or 0)):
        share = f"{base[row['batch']] / row['step_ms']:.3f}" if row["batch"] in base else "-"
        cells = (f"{row['tok_s']:.0f}", f"{row['prompts_ms']:.1f}", f"{row['step_ms']:.3f}", share)
        exchanged = (f"{row['collectives_step']:.0f}", f"{row['mb_step']:.2f}")
        table.add_row(row["placement"], str(row["rank"] or "-"), str(row["batch"]), *cells, *exchanged)
    Console(width=120).print(table)


def time_collectives(rank: int, size: int, folder: str, args: argparse.Namespace) -> None:
    """Microseconds of one collective, of CALLS in a row, by bytes of its result, as the engine's Group does it."""
    on_gpu = args.device == "cuda"
    if on_gpu:
        torch.cuda.set_device(rank)
    store = dist.FileStore(f"{folder}/store-{size}", size)
    backend, patience = "nccl" if on_gpu else "gloo", timedelta(seconds=60)
    dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=patience)
    group, rows = Group(), []
    for kind in ("all_reduce", "all_gather"):
        for nbytes in args.collective_bytes:
            parts = size if kind == "all_gather" else 1
            x = torch.zeros(1, max(1, nbytes // 2 // parts), dtype=torch.bfloat16, device=args.device)
            call = partial(group.all_reduce_ if kind == "all_reduce" else group.all_gather, x)
            us = replay_us(call) if on_gpu else plain_us(call)
            rows.append({"kind": kind, "bytes": nbytes, "us": us})
    if rank == 0:
        finish("tp_collectives", {"size": size, "device": args.device}, rows, save=args.save)
    dist.destroy_process_group()


def replay_us(call: Callable[[], object]) -> float:
    call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):
        for _ in range(CALLS):
            call()
    times = []
    for _ in range(20):
        events = [torch.cuda.Event(enable_timing=True) for _ in range(2)]
        events[0].record()
        graph.replay()
        events[1].record()
        torch.cuda.synchronize()
        times.append(events[0].elapsed_time(events[1]) / CALLS * 1e3)
    return float(np.median(times))


def plain_us(call: Callable[[], object]) -> float:
    times = []
    for _ in range(3):
        start = time.perf_counter()
        for _ in range(CALLS):
            call()
        times.append((time.perf_counter() - start) / CALLS * 1e6)
    return min(times)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=MODELS, default="8b")
    parser.add_argument("--size", type=int, default=2, help="GPUs")
    parser.add_argument("--placements", nargs="+", choices=PLACEMENTS, default=list(PLACEMENTS))
    parser.add_argument("--lora-ranks", type=int, nargs="+", default=[16, 64, 128])
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 16, 64, 256])
    parser.add_argument("--adapters", type=int, default=4)
    parser.add_argument("--layers", type=int, help="default: as many as fit, at most all")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--seconds", type=float, default=1e9, help="from the start on, begin nothing after so many")
    parser.add_argument("--collectives", action="store_true")
    parser.add_argument("--collective-bytes", type=int, nargs="+", default=COLLECTIVE_BYTES)
    parser.add_argument("--save", action="store_true")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        if args.collectives:
            for size in (2**k for k in range(1, args.size.bit_length())):
                torch.multiprocessing.spawn(time_collectives, (size, folder, args), nprocs=size)
        else:
            show(serve(args, Path(folder)))


if __name__ == "__main__":
    main()
