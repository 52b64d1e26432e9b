"""Fine-tuning and serving in one process: one job beside 0, 1 or 4 served adapters at several request rates.

Re-creates Loquetier's protocol on real lengths: prompts, outputs and arrivals of the Azure conversation trace, its
arrivals stretched to the rate; LoRA r=8 on all linears; training samples of the lengths of GSM8K's (no padding, and
none counted). Each rate is run with and without the job. Reported: trained tok/s and their share of the job alone,
decoded tok/s, time to the first token and per token (p50, p99), and how many requests meet the targets (TTFT 1 s and
mean TPOT 100 ms; beside it Loquetier's own measure, a first token within 6 s). `--peft` also trains the same samples
with transformers + PEFT, padded, in the same process, before the engine starts.

    python -m benchmarks.coserve --model random-8b --trace azure_llm_2023_conv.csv --gsm8k gsm8k_train.jsonl --save
    python -m benchmarks.coserve --model SMOLLM2_FOLDER --scale 0.1 --rates 0.5 1 2 --trace … --gsm8k … --peft --save
"""

from __future__ import annotations

import argparse
import asyncio
import csv
import json
import random
import tempfile
import time
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path

import numpy as np
import torch
import transformers
from rich.console import Console
from rich.table import Table

from benchmarks.common import finish, write_adapter
from benchmarks.gpu.serve import LLAMA_8B
from multigraft import SamplingParams
from multigraft.core.config import (
    AdapterConfig,
    CacheConfig,
    EngineConfig,
    ModelConfig,
    SchedulerConfig,
    TrainingConfig,
)
from multigraft.engine.async_engine import AsyncEngine
from multigraft.engine.fine_tuning import EngineTraining
from multigraft.kernels.openmp import release_pool
from multigraft.training.dataset import Dataset
from multigraft.training.engine import off_loop
from multigraft.training.job import Event
from multigraft.training.microbatch import Sample
from multigraft.training.spec import AdapterSpec, Hyperparameters, JobSpec

TTFT_S, TPOT_S, WAIT_S = 1.0, 0.1, 6.0
MAX_LEN = 4096
CHARACTERS_A_TOKEN = 4
WARM_UP_S = 4.0


@dataclass(slots=True)
class Served:
    """One request, as its client saw it."""

    arrival: float
    first: float | None = None
    last: float = 0.0
    num_tokens: int = 0

    @property
    def ttft(self) -> float:
        return (self.first or float("inf")) - self.arrival

    @property
    def tpot(self) -> float:
        return (self.last - self.first) / (self.num_tokens - 1) if self.first and self.num_tokens > 1 else 0.0


@dataclass(slots=True)
class Trained:
    """Tokens of the optimizer steps as they ended."""

    times: list[float] = field(default_factory=list)
    tokens: list[int] = field(default_factory=list)

    def __call__(self, event: Event) -> None:
        if "train_loss" in event.data:
            self.times.append(time.perf_counter())
            self.tokens.append(int(event.data["tokens"]))

    def rate(self, start: float, stop: float) -> float:
        """tok/s between two moments; a step counts for the share of its time that lies between them."""
        total = 0.0
        for before, end, tokens in zip([start, *self.times], self.times, self.tokens, strict=False):
            inside = min(end, stop) - max(before, start)
            total += tokens * max(0.0, inside) / max(end - before, 1e-9)
        return total / (stop - start)


def azure(path: Path, scale: float) -> list[tuple[float, int, int]]:
    """(seconds from the start, prompt tokens, output tokens), as traced, lengths times scale and within MAX_LEN."""
    rows = []
    with path.open() as file:
        for row in csv.DictReader(file):
            at = datetime.fromisoformat(row["TIMESTAMP"][:26]).timestamp()
            prompt, output = (max(1, int(int(row[k]) * scale)) for k in ("ContextTokens", "GeneratedTokens"))
            rows.append((at, min(prompt, int(MAX_LEN * 0.75)), min(output, MAX_LEN // 4)))
    first = rows[0][0]
    return [(at - first, p, o) for at, p, o in rows]


def stretched(
    trace: list[tuple[float, int, int]], rate: float, seconds: float, offset: int
) -> list[tuple[float, int, int]]:
    """Consecutive requests of the trace from number `offset` on, their arrivals stretched to `rate` a second."""
    num = max(2, round(rate * seconds))
    part = trace[offset : offset + num]
    span = part[-1][0] - part[0][0] or 1.0
    return [((at - part[0][0]) / span * seconds * (num - 1) / num, p, o) for at, p, o in part]


def gsm8k(path: Path, vocab: int) -> Dataset:
    """Samples of random tokens, as long as the questions and answers: the answers are trained."""
    rng = random.Random(0)
    data = Dataset()
    with path.open() as file:
        for line in file:
            row = json.loads(line)
            prompt, answer = (max(2, len(row[k]) // CHARACTERS_A_TOKEN) for k in ("question", "answer"))
            tokens = tuple(rng.randrange(10, vocab) for _ in range(prompt + answer))
            data.add((Sample(tokens=tokens, weights=(0.0,) * prompt + (1.0,) * answer, prompt_len=prompt),))
    return data


class Bench:
    def __init__(self, engine: AsyncEngine, args: argparse.Namespace, data: Dataset):
        self.engine = engine
        self.args = args
        self.data = data
        self.training = EngineTraining(engine)
        self.vocab = engine.parts.vocab_size
        self.rng = np.random.default_rng(0)
        self._numbers = iter(range(10**6))

    async def one(self, served: Served, model: str | None, prompt_len: int, output_len: int) -> None:
        prompt = self.rng.integers(10, self.vocab, prompt_len).tolist()
        sampling = SamplingParams(temperature=1.0, max_tokens=output_len, ignore_eos=True)
        async for output in self.engine.generate(prompt, sampling, model=model):
            now = time.perf_counter()
            served.first = served.first or now
            served.last = now
            served.num_tokens += len(output.token_ids)

    async def serve(self, requests: list[tuple[float, int, int]], models: list[str]) -> list[Served]:
        """All requests at their times; returns when the last one has ended."""
        start = time.perf_counter()
        tasks, results = [], []
        for i, (at, prompt_len, output_len) in enumerate(requests):
            await asyncio.sleep(max(0.0, start + at - time.perf_counter()))
            results.append(Served(time.perf_counter()))
            tasks.append(asyncio.create_task(self.one(results[-1], models[i % len(models)], prompt_len, output_len)))
        await asyncio.gather(*tasks)
        return results

    async def train(self) -> tuple[Trained, str, asyncio.Future[None]]:
        """A job that will not end by itself; what it trains; and when it has left."""
        h = Hyperparameters(n_epochs=1000, batch_size=self.args.batch_size, learning_rate=2e-5, max_length=1024)
        spec = JobSpec(adapter=AdapterSpec(r=8), hyperparameters=h).resolve(len(self.data))
        name = f"job{next(self._numbers)}"
        job = await off_loop(self.training.build, name, spec, self.data, None)
        trained = Trained()
        left = asyncio.wrap_future(self.training.start(job, 1.0, trained))
        return trained, name, left

    async def run(self, rate: float, models: list[str], with_job: bool, trace: list[tuple[float, int, int]]) -> dict:
        seconds = self.args.seconds
        trained, name, left = await self.train() if with_job else (Trained(), "", None)
        if with_job:
            await asyncio.sleep(WARM_UP_S)
        start = time.perf_counter()
        row = {"rate": rate, "adapters": len(models), "job": with_job}
        if rate:
            served = await self.serve(stretched(trace, rate, seconds, offset=500), models)
            stop = max(s.arrival for s in served)
            row |= summary(served, start, stop)
        else:
            await asyncio.sleep(seconds)
            stop = time.perf_counter()
        if left is not None:
            row["train_tok_s"] = trained.rate(start, stop)
            self.training.stop(name)
            await left
        return row


def summary(served: list[Served], start: float, stop: float) -> dict:
    ttft, tpot = (np.array([getattr(s, name) for s in served]) for name in ("ttft", "tpot"))
    return {
        "requests": len(served),
        "decode_tok_s": sum(s.num_tokens for s in served) / (max(s.last for s in served) - start),
        "ttft_p50_ms": float(np.percentile(ttft, 50) * 1e3),
        "ttft_p99_ms": float(np.percentile(ttft, 99) * 1e3),
        "tpot_p50_ms": float(np.percentile(tpot, 50) * 1e3),
        "tpot_p99_ms": float(np.percentile(tpot, 99) * 1e3),
        "slo": float(((ttft <= TTFT_S) & (tpot <= TPOT_S)).mean()),
        "wait_6s": float((ttft <= WAIT_S).mean()),
    }


def peft_training(model_path: str, data: Dataset, device: str, batch: int, seconds: float) -> float:
    """tok/s without padding of a plain loop: transformers, PEFT, padded batches, the losses of the answers."""
    from peft import LoraConfig, get_peft_model

    model = transformers.AutoModelForCausalLM.from_pretrained(model_path, dtype=torch.bfloat16).to(device)
    model = get_peft_model(model, LoraConfig(r=8, lora_alpha=16, target_modules="all-linear")).train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=2e-5)
    done, start, i = 0, time.perf_counter(), 0
    while time.perf_counter() - start < seconds:
        samples = [data[(i + k) % len(data)][0] for k in range(batch)]
        i += batch
        longest = max(len(s.tokens) for s in samples)
        ids, labels, mask = (torch.full((batch, longest), v, device=device) for v in (0, -100, 0))
        for row, s in enumerate(samples):
            n = len(s.tokens)
            ids[row, :n] = torch.tensor(s.tokens)
            mask[row, :n] = 1
            labels[row, s.prompt_len : n] = torch.tensor(s.tokens[s.prompt_len :])
        with torch.autocast(device, torch.bfloat16):
            model(input_ids=ids, attention_mask=mask, labels=labels).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if i == batch:
            start = time.perf_counter()  # the first step warms up
        else:
            done += sum(len(s.tokens) for s in samples)
    return done / (time.perf_counter() - start)


async def measure(args: argparse.Namespace, folder: Path) -> list[dict]:
    on_gpu = torch.cuda.is_available()
    model = args.model
    if model == "random-8b":
        model = str(folder / "model")
        Path(model).mkdir()
        (Path(model) / "config.json").write_text(json.dumps(LLAMA_8B))
    config = transformers.AutoConfig.from_pretrained(model)
    sources = [write_adapter(folder / f"a{i}", config, 8, seed=i) for i in range(max(args.adapters))]
    trace = azure(args.trace, args.scale)
    data = gsm8k(args.gsm8k, config.vocab_size)
    rows: list[dict] = []
    if args.peft:
        peer = peft_training(model, data, "cuda" if on_gpu else "cpu", args.peft_batch, args.seconds)
        rows.append({"rate": 0.0, "adapters": 0, "job": "transformers + PEFT", "train_tok_s": peer})
        print(rows[-1], flush=True)
    release_pool()  # this thread's, which would compete with the engine's for the cores
    engine = await AsyncEngine.start(
        EngineConfig(
            model=ModelConfig(
                model=model, load_format="dummy" if args.model == "random-8b" else "auto", max_model_len=MAX_LEN
            ),
            cache=CacheConfig(enable_prefix_caching=False),
            scheduler=SchedulerConfig(max_num_seqs=128 if on_gpu else 32, max_num_batched_tokens=args.batched_tokens),
            adapters=AdapterConfig(max_loras=max(args.adapters)),
            training=TrainingConfig(train_memory_gib=args.train_memory_gib),
        )
    )
    for source in sources:
        await engine.load_adapter(source.name, str(source))
    bench = Bench(engine, args, data)
    await bench.serve([(0.1 * i, 64, 8) for i in range(8)], [s.name for s in sources])
    both = (True,) if args.with_job_only else (False, True)
    plan = [(0.0, 1, True)] + [(r, n, job) for n in args.adapters for r in args.rates for job in both]
    for rate, num, with_job in plan:
        rows.append(await bench.run(rate, [s.name for s in sources[:num]], with_job, trace))
        print(rows[-1], flush=True)
    await engine.shutdown(0)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="folder, or random-8b")
    parser.add_argument("--trace", type=Path, required=True, help="Azure conversation trace")
    parser.add_argument("--gsm8k", type=Path, required=True)
    parser.add_argument("--rates", type=float, nargs="+", default=[1, 3, 5, 10])
    parser.add_argument("--adapters", type=int, nargs="+", default=[4])
    parser.add_argument("--seconds", type=float, default=20)
    parser.add_argument("--scale", type=float, default=1.0, help="of the trace's lengths")
    parser.add_argument("--batch-size", type=int, default=64, help="samples of an optimizer step")
    parser.add_argument("--batched-tokens", type=int, default=2048)
    parser.add_argument("--train-memory-gib", type=float)
    parser.add_argument("--with-job-only", action="store_true", help="leave the runs without the job out")
    parser.add_argument("--peft", action="store_true")
    parser.add_argument("--peft-batch", type=int, default=8)
    parser.add_argument("--save", action="store_true")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        rows = asyncio.run(measure(args, Path(folder)))
    alone = next(r["train_tok_s"] for r in rows if r["job"] is True and not r["rate"])
    names = ("adapters", "req/s", "job", "trained tok/s", "of alone", "decoded tok/s", "TTFT p50/p99", "TPOT p50/p99")
    table = Table(*names, "in SLO", "in 6 s")
    for r in rows:
        trained = r.get("train_tok_s")
        cells = [str(r["adapters"]), f"{r['rate']:g}", str(r["job"])]
        cells += [f"{trained:.0f}", f"{trained / alone:.2f}"] if trained else ["-", "-"]
        if r["rate"]:
            cells.append(f"{r['decode_tok_s']:.0f}")
            cells += [f"{r[f'{n}_p50_ms']:.0f} / {r[f'{n}_p99_ms']:.0f} ms" for n in ("ttft", "tpot")]
            cells += [f"{r['slo']:.1%}", f"{r['wait_6s']:.1%}"]
        table.add_row(*cells)
    Console(width=150).print(table)
    settings = {k: getattr(args, k) for k in ("model", "scale", "seconds", "batch_size", "batched_tokens")}
    settings["model"] = Path(args.model).name
    finish("coserve", settings, rows, save=args.save)


if __name__ == "__main__":
    main()
