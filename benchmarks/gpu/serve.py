"""Offline throughput on one GPU: random Llama-3.1-8B weights, the shapes of the peers' table.

Each row: number of adapters (0: base), requests/s and output tok/s at each prompt/output shape, share of the base.

    python -m benchmarks.gpu.serve --adapters 0 16 64 --shapes 512:128 128:256 [--requests 512] [--rank 8] [--save]
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from pathlib import Path

import torch
import transformers
from rich.console import Console
from rich.table import Table

from benchmarks.common import finish, linear_shapes, run_offline, write_adapter
from multigraft import Engine

LLAMA_8B = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "vocab_size": 128256,
    "max_position_embeddings": 131072,
    "rms_norm_eps": 1e-5,
    "rope_theta": 500000.0,
    "tie_word_embeddings": False,
    "hidden_act": "silu",
    "dtype": "bfloat16",
    "bos_token_id": 128000,
    "eos_token_id": 128001,
    "attention_bias": False,
}
SOURCES = 4
"""Distinct adapters on disk; the others are links to them, as in the peers' script. Each is a copy on the device."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--adapters", type=int, nargs="+", default=[0, 16, 64])
    parser.add_argument("--shapes", nargs="+", default=["512:128", "128:256"])
    parser.add_argument("--requests", type=int, default=512)
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--repeats", type=int, default=1)
    parser.add_argument("--max-num-seqs", type=int, default=256)
    parser.add_argument("--max-num-batched-tokens", type=int, default=8192)
    parser.add_argument("--enforce-eager", action="store_true")
    parser.add_argument("--attention-backend", default="auto")
    parser.add_argument("--save", action="store_true")
    args = parser.parse_args()
    most = max(args.adapters)
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        model = root / "model"
        model.mkdir()
        (model / "config.json").write_text(json.dumps(LLAMA_8B))
        config = transformers.AutoConfig.from_pretrained(model)
        sources = [write_adapter(root / f"source{i}", config, args.rank, seed=i) for i in range(min(most, SOURCES))]
        (root / "adapters").mkdir()
        for i in range(most):
            (root / "adapters" / f"a{i}").symlink_to(sources[i % len(sources)])
        adapter_bytes = (
            sum(args.rank * (a + b) for a, b in linear_shapes(config).values()) * config.num_hidden_layers * 2
        )
        started = time.perf_counter()
        engine = Engine(
            str(model),
            load_format="dummy",
            device="cuda",
            max_model_len=2048,
            max_loras=max(1, most),
            max_cpu_loras=max(1, most),
            max_lora_rank=max(16, args.rank),
            adapter_memory_gib=max(1, most) * (adapter_bytes + 2**20) / 2**30,
            lora_dir=root / "adapters" if most else None,
            enable_prefix_caching=False,
            max_num_seqs=args.max_num_seqs,
            max_num_batched_tokens=args.max_num_batched_tokens,
            enforce_eager=args.enforce_eager,
            attention_backend=args.attention_backend,
        )
        start_s = time.perf_counter() - started
        print(f"started in {start_s:.1f} s, {engine._engine.parts.kv_tokens} KV tokens", flush=True)
        rows = []
        with engine:
            for shape in args.shapes:
                prompt_len, output_len = map(int, shape.split(":"))
                for num in args.adapters:
                    names = [f"a{i % num}" if num else None for i in range(args.requests)]
                    best = min(run_offline(engine, names, prompt_len, output_len, args.repeats, config.vocab_size))
                    row = {"shape": shape, "adapters": num, "req_s": args.requests / best}
                    rows.append(row | {"tok_s": args.requests * output_len / best})
                    print(rows[-1], flush=True)
    table = Table("shape", "adapters", "requests/s", "out tok/s", "share of base")
    for row in rows:
        base = next((r for r in rows if r["shape"] == row["shape"] and not r["adapters"]), None)
        row["share"] = row["tok_s"] / base["tok_s"] if base else None
        share = f"{row['share']:.2f}" if base else "-"
        table.add_row(row["shape"], str(row["adapters"]), f"{row['req_s']:.1f}", f"{row['tok_s']:.0f}", share)
    Console().print(table)
    settings = {k: getattr(args, k) for k in ("requests", "rank", "repeats", "max_num_seqs", "enforce_eager")}
    settings |= {"start_s": round(start_s, 1), "peak_gib": round(torch.cuda.max_memory_allocated() / 2**30, 1)}
    finish("gpu_serve", settings, rows, save=args.save)


if __name__ == "__main__":
    main()
