"""Offline throughput on the CPU: SmolLM2-135M bf16, 32 requests of 128 prompt and 64 output tokens.

Base model first, then LoRA adapters of rank 8 on all linears, spread evenly over the requests. Prints a table and ends
in one JSON line; --save appends the line to benchmarks/results/serve_cpu.jsonl.

    python -m benchmarks.serve_cpu MODEL_FOLDER [--adapters 0 1 8 16] [--repeats 5] [--compile] [--save]
"""

from __future__ import annotations

import argparse
import resource
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
import transformers
from rich.console import Console
from rich.table import Table

from benchmarks.common import finish, run_offline, write_adapter
from multigraft import Engine


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--adapters", type=int, nargs="+", default=[0, 1, 8, 16])
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--requests", type=int, default=32)
    parser.add_argument("--prompt", type=int, default=128)
    parser.add_argument("--output", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--save", action="store_true")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    config = transformers.AutoConfig.from_pretrained(args.model)
    most = max(args.adapters)
    with tempfile.TemporaryDirectory() as folder:
        for i in range(most):
            write_adapter(Path(folder) / f"a{i}", config, args.rank, seed=i)
        started = time.perf_counter()
        engine = Engine(
            args.model,
            dtype="bfloat16",
            device="cpu",
            max_loras=max(1, most),
            max_lora_rank=max(64, args.rank),
            lora_dir=Path(folder) if most else None,
            enable_prefix_caching=False,
            compile=args.compile,
            kv_cache_gib=1.0,
        )
        start_s = time.perf_counter() - started
        rows = []
        with engine:
            for num in args.adapters:
                names = [f"a{i % num}" if num else None for i in range(args.requests)]
                seconds = run_offline(engine, names, args.prompt, args.output, args.repeats, config.vocab_size)
                tokens = args.requests * args.output
                rows.append(
                    {"adapters": num, "tok_s": tokens / float(np.median(seconds)), "best": tokens / min(seconds)}
                )
    base = rows[0]["tok_s"]
    table = Table("adapters", "out tok/s, median", "best", "share of the first row")
    for row in rows:
        row["share"] = row["tok_s"] / base
        table.add_row(str(row["adapters"]), f"{row['tok_s']:.0f}", f"{row['best']:.0f}", f"{row['share']:.2f}")
    Console().print(table)
    settings = {k: getattr(args, k) for k in ("rank", "requests", "prompt", "output", "repeats", "threads", "compile")}
    memory = {"start_s": round(start_s, 1), "peak_rss_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024}
    finish("serve_cpu", settings | memory, rows, save=args.save)


if __name__ == "__main__":
    main()
