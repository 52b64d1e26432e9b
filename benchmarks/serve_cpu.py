"""Offline throughput on the CPU: SmolLM2-135M bf16, 32 requests of 128 prompt and 64 output tokens.

Base model first, then LoRA adapters of rank 8 on all linears, spread evenly over the requests. Prints a table and ends
in one JSON line; --save appends the line to benchmarks/results/serve_cpu.jsonl.

    python benchmarks/serve_cpu.py MODEL_FOLDER [--adapters 0 1 8 16] [--repeats 5] [--compile]
"""

from __future__ import annotations

import argparse
import datetime
import json
import platform
import resource
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
import transformers
from rich.console import Console
from rich.table import Table
from safetensors.torch import save_file

from multigraft import Engine, SamplingParams

LINEARS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def write_adapter(folder: Path, model_folder: str, rank: int, seed: int) -> None:
    """A PEFT folder with random factors for every linear of a Llama-shaped model."""
    c = transformers.AutoConfig.from_pretrained(model_folder)
    head_dim = getattr(c, "head_dim", None) or c.hidden_size // c.num_attention_heads
    kv, hidden, mlp = c.num_key_value_heads * head_dim, c.hidden_size, c.intermediate_size
    shapes = dict(zip(LINEARS, ((hidden, hidden), (hidden, kv), (hidden, kv), (hidden, hidden)), strict=False))
    shapes |= {"gate_proj": (hidden, mlp), "up_proj": (hidden, mlp), "down_proj": (mlp, hidden)}
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for layer in range(c.num_hidden_layers):
        for name, (n_in, n_out) in shapes.items():
            block = "self_attn" if name[0] in "qkvo" else "mlp"
            key = f"base_model.model.model.layers.{layer}.{block}.{name}"
            a, b = torch.randn(rank, n_in, generator=generator), torch.randn(n_out, rank, generator=generator)
            tensors[f"{key}.lora_A.weight"] = (a * 0.01).bfloat16()
            tensors[f"{key}.lora_B.weight"] = (b * 0.01).bfloat16()
    folder.mkdir(parents=True)
    save_file(tensors, folder / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": rank, "lora_alpha": 2 * rank, "bias": "none"}
    (folder / "adapter_config.json").write_text(json.dumps(config | {"target_modules": list(LINEARS)}))


def measure(engine: Engine, args: argparse.Namespace, num_adapters: int) -> dict[str, float]:
    rng = np.random.default_rng(0)
    names = [f"a{i % num_adapters}" if num_adapters else None for i in range(args.requests)]
    sampling = SamplingParams(temperature=1.0, max_tokens=args.output, ignore_eos=True)
    seconds = []
    for repeat in range(args.repeats + 1):
        prompts = rng.integers(10, engine.tokenizer.vocab_size, (args.requests, args.prompt)).tolist()
        start = time.perf_counter()
        results = engine.generate(prompts, sampling, names)
        elapsed = time.perf_counter() - start
        produced = sum(len(r.completions[0].token_ids) for r in results)
        assert produced == args.requests * args.output, [r.error for r in results if r.error]
        if repeat:  # the first round loads the adapters
            seconds.append(elapsed)
    best, median = min(seconds), float(np.median(seconds))
    tokens = args.requests * args.output
    return {"adapters": num_adapters, "best_tok_s": tokens / best, "median_tok_s": tokens / median}


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
    most = max(args.adapters)
    with tempfile.TemporaryDirectory() as folder:
        for i in range(most):
            write_adapter(Path(folder) / f"a{i}", args.model, args.rank, seed=i)
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
        with engine:
            rows = [measure(engine, args, n) for n in args.adapters]
    base = next((r["median_tok_s"] for r in rows if r["adapters"] == 0), None)
    table = Table("adapters", "out tok/s (median)", "best", "share of base")
    for r in rows:
        r["of_base"] = round(r["median_tok_s"] / base, 3) if base else None
        table.add_row(str(r["adapters"]), f"{r['median_tok_s']:.0f}", f"{r['best_tok_s']:.0f}", str(r["of_base"]))
    Console().print(table)
    record = {
        "benchmark": "serve_cpu",
        "date": datetime.date.today().isoformat(),
        "machine": f"{platform.machine()}, {args.threads} threads",
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        **{k: getattr(args, k) for k in ("rank", "requests", "prompt", "output", "repeats", "compile")},
        "start_s": round(start_s, 1),
        "peak_rss_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024,
        "rows": [{k: round(v, 3) if isinstance(v, float) else v for k, v in r.items()} for r in rows],
    }
    line = json.dumps(record)
    if args.save:
        results = Path(__file__).parent / "results" / "serve_cpu.jsonl"
        results.parent.mkdir(exist_ok=True)
        with results.open("a") as file:
            file.write(line + "\n")
    print(line)


if __name__ == "__main__":
    main()
