"""Fine-tuning alone on one GPU: random Llama-3.1-8B weights, LoRA on all linears, rows of 1024 without padding.

Each row of the table is one setting: jobs (each its own adapter), samples a pass and job, activations kept or computed
again. tok/s counts tokens trained, forward and backward, optimizer steps included. `--peft` runs the peers' loop
(transformers + PEFT, batch 4) in a process of its own, first, on the same GPU.

    python -m benchmarks.gpu.train [--jobs 1 4] [--samples 8 2] [--rank 8] [--peft path/peft_train_bench.py] [--save]
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import Future
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from benchmarks.common import LLAMA_8B, finish, until_cut
from multigraft.core.config import (
    AdapterConfig,
    CacheConfig,
    EngineConfig,
    ModelConfig,
    SchedulerConfig,
    TrainingConfig,
)
from multigraft.engine.parts import EngineParts, build
from multigraft.engine.trainer import Trainer
from multigraft.training.adapter import AdapterDesign, TrainableAdapter
from multigraft.training.dataset import Dataset
from multigraft.training.job import TrainingJob
from multigraft.training.microbatch import Sample
from multigraft.training.spec import AdapterSpec, Hyperparameters, JobSpec

LENGTH = 1024


def make_jobs(parts: EngineParts, num_jobs: int, rank: int, samples: int, passes: int) -> list[TrainingJob]:
    """samples: of each job and pass, random tokens, every one of them trained, as the peers' loop has it."""
    device, dtype = parts.loaded.device, parts.loaded.dtype
    hyper = Hyperparameters(n_epochs=1, batch_size=samples, learning_rate=2e-5)
    spec = JobSpec(adapter=AdapterSpec(r=rank), hyperparameters=hyper).resolve(samples * passes, LENGTH)
    design = AdapterDesign.new(spec.adapter, parts.sites, base_model=None, max_rank=max(16, rank))
    jobs = []
    for number in range(num_jobs):
        generator = torch.Generator().manual_seed(number)
        data = Dataset()
        for _ in range(samples * passes):
            tokens = tuple(torch.randint(10, 120000, (LENGTH,), generator=generator).tolist())
            data.add((Sample(tokens=tokens, weights=(0.0, *[1.0] * (LENGTH - 1)), prompt_len=1),))
        adapter = TrainableAdapter.new(spec.adapter, design, seed=number, dtype=dtype, device=device)
        jobs.append(TrainingJob(id=str(number), spec=spec, adapter=adapter, train=data, max_tokens=samples * LENGTH))
    return jobs


def run(parts: EngineParts, jobs: Sequence[TrainingJob]) -> float:
    """Seconds until all jobs have ended."""
    trainer: Trainer = parts.trainer
    torch.cuda.synchronize()
    start = time.perf_counter()
    for job in jobs:
        trainer.start(job, 1.0, lambda event: None, Future())
    while trainer.num_jobs:
        work = trainer.work()
        if work is not None:
            trainer.run(work.part(work.forward + work.backward), ridden=False)
    torch.cuda.synchronize()
    return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--settings", nargs="+", default=["1:8:keep", "1:4:keep", "1:8:again", "4:2:keep", "1:2:keep"])
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--passes", type=int, default=6)
    parser.add_argument("--memory-gib", type=float, default=52.0)
    parser.add_argument("--enforce-eager", action="store_true")
    parser.add_argument("--profile", action="store_true", help="print the kernels of the first setting's last pass")
    parser.add_argument("--peft", help="peft_train_bench.py of the peers")
    parser.add_argument("--save", action="store_true")
    args = parser.parse_args()
    rows = []
    if args.peft:
        command = [sys.executable, args.peft, "4", str(args.rank), "all", "nockpt"]
        out = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        peer = json.loads(out.strip().splitlines()[-1])
        rows.append({"setting": "transformers + PEFT, batch 4", "tok_s": peer["tok_s"], "peak_gib": peer["gib"]})
        print(rows[-1], flush=True)
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "config.json").write_text(json.dumps(LLAMA_8B))
        parts = build(
            EngineConfig(
                model=ModelConfig(
                    model=folder,
                    load_format="dummy",
                    device="cuda",
                    max_model_len=2048,
                    enforce_eager=args.enforce_eager,
                ),
                cache=CacheConfig(kv_cache_gib=2.0),
                scheduler=SchedulerConfig(max_num_seqs=2, max_num_batched_tokens=2048),
                adapters=AdapterConfig(max_loras=1),
                training=TrainingConfig(train_memory_gib=args.memory_gib),
            )
        )
    plan = parts.trainer.memory
    plan.most_rows = 16 * LENGTH
    with until_cut():
        for i, setting in enumerate(args.settings):
            num_jobs, num_samples, mode = setting.split(":")
            jobs, samples = int(num_jobs), int(num_samples)
            plan._shrunk = mode == "again"
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()

            run(parts, make_jobs(parts, jobs, args.rank, samples, 2))
            ready = make_jobs(parts, jobs, args.rank, samples, args.passes)
            seconds = run(parts, ready)
            tokens = jobs * samples * args.passes * LENGTH
            kept = mode == "keep" and plan.keeps(jobs * samples * LENGTH) and not plan._shrunk
            row = {
                "setting": setting,
                "tok_s": tokens / seconds,
                "kept": kept,
                "pass_gib": (torch.cuda.max_memory_allocated() - before) / 2**30,
                "planned_gib": sum(a * b for a, b in zip(plan._pass(kept), (1, jobs * samples * LENGTH), strict=True))
                / 2**30,
            }
            rows.append(row)
            print(row, flush=True)
            if args.profile and i == 0:
                with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
                    run(parts, make_jobs(parts, jobs, args.rank, samples, 1))
                print(profile.key_averages().table(sort_by="cuda_time_total", row_limit=40, max_name_column_width=70))
    table = Table("jobs:samples of 1024:activations", "tok/s", "of PEFT", "GiB of a pass (planned)")
    for row in rows:
        share = f"{row['tok_s'] / rows[0]['tok_s']:.2f}" if args.peft else "-"
        memory = (
            f"{row['pass_gib']:.1f} ({row['planned_gib']:.1f})" if "pass_gib" in row else f"{row['peak_gib']} in all"
        )
        table.add_row(row["setting"], f"{row['tok_s']:.0f}", share, memory)
    Console().print(table)
    finish(
        "gpu_train", {"rank": args.rank, "length": LENGTH, "enforce_eager": args.enforce_eager}, rows, save=args.save
    )


if __name__ == "__main__":
    main()
