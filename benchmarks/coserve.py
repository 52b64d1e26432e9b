"""Fine-tuning and serving in one process: one job beside 0, 1 or 4 served adapters at several request rates.

Re-creates Loquetier's protocol on real lengths: prompts, outputs and arrivals of the Azure conversation trace, its
arrivals stretched to the rate; LoRA r=8 on all linears; training samples of the lengths of GSM8K's (no padding, and
none counted). Each rate is run with and without the job. Reported: trained tok/s and their share of the job alone,
decoded tok/s, both together, time to the first token and per token (p50, p99), and how many requests meet the targets
(TTFT 1 s and mean TPOT 100 ms; beside it Loquetier's own measure, a first token within 6 s). `--peft` does the same
with transformers + PEFT first, in the same process: the same samples, requests and adapters, training and serving in
turn (coserve_peft.py), at `--peft-rates`.

    python -m benchmarks.coserve --model random-8b --trace azure_llm_2023_conv.csv --gsm8k gsm8k_train.jsonl --save
    python -m benchmarks.coserve --model SMOLLM2_FOLDER --scale 0.1 --rates 0.5 1 2 --trace … --gsm8k … --peft --save
"""

from __future__ import annotations

import argparse
import asyncio
import json
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
import transformers
from rich.console import Console
from rich.table import Table

from benchmarks.common import LLAMA_8B, finish, until_cut, write_adapter
from benchmarks.coserve_protocol import MAX_LEN, Served, Trained, azure, gsm8k, stretched, summary
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
from multigraft.scheduling.steptime import StepShape
from multigraft.scheduling.training import with_part
from multigraft.training.dataset import Dataset
from multigraft.training.engine import off_loop
from multigraft.training.spec import AdapterSpec, Hyperparameters, JobSpec

WARM_UP_S = 4.0
SETTINGS = ("model", "scale", "seconds", "drain", "batch_size", "batched_tokens", "train_memory_gib")


class Steps:
    """Where the time of the engine's steps goes, while there is a job: what the step-time model says of the served rows
    alone, and the rest."""

    def __init__(self, engine: AsyncEngine):
        self._share = engine.parts.scheduler.training
        self._seen: list[tuple[StepShape, float]] = []
        clock = engine._core._clock
        self._observe, clock.observe = clock.observe, self.observe

    def observe(self, shape: StepShape, seconds: float) -> None:
        self._seen.append((shape, seconds))
        self._observe(shape, seconds)

    def take(self) -> dict[str, float]:
        """Of the steps since the last call: how many with prompts and with decodes alone, and seconds."""
        seen, self._seen, model = self._seen, [], self._share.model
        served: dict[bool, list[float]] = {True: [], False: []}
        for shape, _ in seen:
            if shape.prefill_rows or shape.decode_rows:
                served[shape.prefill_rows > 0].append(model.predict(with_part(shape, None)) if model else 0.0)
        return {
            "prompt_steps": len(served[True]),
            "prompt_s": sum(served[True]),
            "decode_steps": len(served[False]),
            "decode_s": sum(served[False]),
            "steps_s": sum(seconds for _, seconds in seen),
        }


class Bench:
    def __init__(self, engine: AsyncEngine, args: argparse.Namespace, data: Dataset):
        self.engine = engine
        self.args = args
        self.data = data
        self.training = EngineTraining(engine)
        self.steps = Steps(engine)
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
        """All requests at their times; returns when the last one has ended, or --drain seconds after the last came:
        those still running are cut off and count with what they have."""
        start = time.perf_counter()
        tasks, results = [], []
        for i, (at, prompt_len, output_len) in enumerate(requests):
            await asyncio.sleep(max(0.0, start + at - time.perf_counter()))
            results.append(Served(time.perf_counter()))
            tasks.append(asyncio.create_task(self.one(results[-1], models[i % len(models)], prompt_len, output_len)))
        _, late = await asyncio.wait(tasks, timeout=self.args.drain)
        for task in late:
            task.cancel()
        if failed := [e for e in await asyncio.gather(*tasks, return_exceptions=True) if isinstance(e, Exception)]:
            raise failed[0]
        return results

    async def train(self) -> tuple[Trained, str, asyncio.Future[None]]:
        """A job that will not end by itself; what it trains; and when it has left."""
        h = Hyperparameters(n_epochs=1000, batch_size=self.args.batch_size, learning_rate=2e-5)
        spec = JobSpec(adapter=AdapterSpec(r=8), hyperparameters=h).resolve(len(self.data), self.data.longest)
        name = f"job{next(self._numbers)}"
        job = await off_loop(self.training.build, name, spec, self.data, None, None)
        trained = Trained()
        left = asyncio.wrap_future(self.training.start(job, 1.0, trained))
        return trained, name, left

    async def run(self, rate: float, models: list[str], with_job: bool, trace: list[tuple[float, int, int]]) -> dict:
        seconds = self.args.seconds
        trained, name, left = await self.train() if with_job else (Trained(), "", None)
        if with_job:
            await asyncio.sleep(WARM_UP_S)
        self.steps.take()
        start = time.perf_counter()
        row = {"engine": "multigraft", "rate": rate, "adapters": len(models), "job": with_job}
        if rate:
            served = await self.serve(stretched(trace, rate, seconds, offset=500), models)
            stop = max(s.arrival for s in served)
            row |= summary(served, start, stop)
        else:
            await asyncio.sleep(seconds)
            stop = time.perf_counter()
        if left is not None:
            row |= self.steps.take() | {"all_s": time.perf_counter() - start}
            while not left.done() and (not trained.times or trained.times[-1] < stop):
                await asyncio.sleep(0.05)  # the step in hand counts for its share, too
            row["train_tok_s"] = trained.rate(start, stop)
            self.training.stop(name)
            await left
        return row


async def measure(args: argparse.Namespace, folder: Path, rows: list[dict]) -> None:
    """Adds to the rows as they are measured."""
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
    if args.peft:
        from benchmarks.coserve_peft import measure_peer

        rows += measure_peer(
            model,
            sources,
            data,
            trace,
            batch=args.peft_batch,
            seconds=args.peft_seconds or args.seconds,
            rates=args.peft_rates or args.rates,
            num_adapters=args.adapters,
        )
    began = time.perf_counter()
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
    print(f"started in {time.perf_counter() - began:.1f} s, {engine.parts.kv_tokens} tokens of KV", flush=True)
    bench = Bench(engine, args, data)
    await bench.serve([(0.1 * i, 64, 8) for i in range(8)], [s.name for s in sources])
    both = (True,) if args.with_job_only else (False, True)
    plan = [(0.0, 1, True)] + [(r, n, job) for n in args.adapters for r in args.rates for job in both]
    for rate, num, with_job in plan:
        rows.append(await bench.run(rate, [s.name for s in sources[:num]], with_job, trace))
        print(rows[-1], flush=True)
    await engine.shutdown(0)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="folder, or random-8b")
    parser.add_argument("--trace", type=Path, required=True, help="Azure conversation trace")
    parser.add_argument("--gsm8k", type=Path, required=True)
    parser.add_argument("--rates", type=float, nargs="+", default=[1, 3, 5, 10])
    parser.add_argument("--adapters", type=int, nargs="+", default=[4])
    parser.add_argument("--seconds", type=float, default=20)
    parser.add_argument("--drain", type=float, default=120, help="seconds that the last requests get")
    parser.add_argument("--scale", type=float, default=1.0, help="of the trace's lengths")
    parser.add_argument("--batch-size", type=int, default=64, help="samples of an optimizer step")
    parser.add_argument("--batched-tokens", type=int, default=2048)
    parser.add_argument("--train-memory-gib", type=float)
    parser.add_argument("--with-job-only", action="store_true", help="leave the runs without the job out")
    parser.add_argument("--peft", action="store_true")
    parser.add_argument("--peft-batch", type=int, default=8, help="samples of its training steps")
    parser.add_argument("--peft-seconds", type=float, help="of each of its rows; default: --seconds")
    parser.add_argument("--peft-rates", type=float, nargs="+", help="default: --rates")
    parser.add_argument("--save", action="store_true")
    args = parser.parse_args()
    rows: list[dict] = []
    with tempfile.TemporaryDirectory() as folder, until_cut():
        asyncio.run(measure(args, Path(folder), rows))
    alone = {r["engine"]: r["train_tok_s"] for r in rows if r["job"] and not r["rate"]}
    names = ("engine", "adapters", "req/s", "job", "trained tok/s", "of alone", "decoded tok/s", "both")
    table = Table(*names, "TTFT p50/p99", "TPOT p50/p99", "in SLO", "in 6 s")
    for r in rows:
        trained, decoded = r.get("train_tok_s", 0.0), r.get("decode_tok_s", 0.0)
        cells = [r["engine"], str(r["adapters"]), f"{r['rate']:g}", "yes" if r["job"] else "no"]
        cells += [f"{trained:.0f}", f"{trained / alone[r['engine']]:.2f}"] if r["job"] else ["-", "-"]
        cells += [f"{decoded:.0f}" if r["rate"] else "-", f"{trained + decoded:.0f}"]
        if r["rate"]:
            cells += [f"{r[f'{n}_p50_ms']:.0f} / {r[f'{n}_p99_ms']:.0f} ms" for n in ("ttft", "tpot")]
            cells += [f"{r['slo']:.1%}", f"{r['wait_6s']:.1%}"]
        table.add_row(*cells)
    Console(width=170).print(table)
    settings = {k: getattr(args, k) for k in SETTINGS}
    settings["model"] = Path(args.model).name
    finish("coserve", settings, rows, save=args.save)


if __name__ == "__main__":
    main()
