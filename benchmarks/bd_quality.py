"""BD-LoRA against LoRA at matched parameter counts, and at equal rank: held-out loss after supervised training.

SmolLM2-135M-Instruct learns GSM8K's answers: each run sees --steps batches of --batch samples of the training file,
drawn by its seed, once. Its loss is that of the first --held-out samples of the test file, per answer token. All
linears of all layers are adapted, scale 2, rates falling linearly; the learning rate is the best of --rates for LoRA,
measured with a seed and with test samples of their own, and is then everyone's. A seed decides the samples, their order
and the adapter's start, so that runs of one seed are compared in pairs.

The sizes of SmolLM2's linears (576, 192 and 1,536) allow 2, 4 and 8 blocks in all seven, though its 9 heads mean that
it could not be served over so many ranks, and blocks cut through heads: this is about the method alone. Matched ranks
are the multiples of N nearest to as many parameters.

Each run is saved in --runs as it ends; a call does one, and more until --seconds would be over, and the next call goes
on. The last one draws, and ends in one JSON line.

    python -m benchmarks.bd_quality MODEL_FOLDER --train gsm8k_train.jsonl --test gsm8k_test.jsonl --save
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import statistics
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import transformers
from rich.console import Console
from rich.table import Table

from benchmarks.common import RESULTS, finish
from benchmarks.tp import matched_rank
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
from multigraft.training.data import read
from multigraft.training.dataset import Dataset
from multigraft.training.engine import off_loop
from multigraft.training.job import Event
from multigraft.training.spec import AdapterSpec, Hyperparameters, JobSpec

SWEEP_SEED = 100
NAMES = {"loss": "valid_loss", "accuracy": "valid_mean_token_accuracy", "train_loss": "train_loss"}
"""What is kept of a job's last events."""
SETTINGS = ("steps", "batch", "held_out", "max_length")
"""Runs that differ in one of them are not compared."""


@dataclass(frozen=True)
class Run:
    """nblocks 1: LoRA."""

    nblocks: int
    rank: int
    seed: int
    rate: float

    @property
    def name(self) -> str:
        return "LoRA" if self.nblocks == 1 else f"BD-LoRA, N = {self.nblocks}"

    def spec(self, args: argparse.Namespace) -> JobSpec:
        kind = {} if self.nblocks == 1 else {"method": "bdlora", "nblocks": self.nblocks}
        h = Hyperparameters(
            n_epochs=1,
            batch_size=args.batch,
            learning_rate=self.rate,
            max_length=args.max_length,
            eval_interval=args.steps,
        )
        spec = JobSpec(adapter=AdapterSpec(r=self.rank, **kind), hyperparameters=h, seed=self.seed)
        return spec.resolve(args.steps * args.batch, args.max_length)


class Study:
    def __init__(self, args: argparse.Namespace):
        self.args = args
        self.file = args.runs
        lines = self.file.read_text().splitlines() if self.file.exists() else []
        self.done: dict[Run, dict[str, Any]] = {}
        self.settings = {k: getattr(args, k) for k in SETTINGS}
        for row in (row for row in map(json.loads, lines) if self.settings.items() <= row.items()):
            self.done[Run(*(row[k] for k in ("nblocks", "rank", "seed", "rate")))] = row

    @property
    def rate(self) -> float | None:
        """The best of LoRA's; None: not known yet."""
        losses = {rate: self.done[run]["loss"] for rate, run in self.sweep.items() if run in self.done}
        return min(losses, key=losses.__getitem__) if len(losses) == len(self.sweep) else None

    @property
    def sweep(self) -> dict[float, Run]:
        return {rate: Run(1, self.args.rank, SWEEP_SEED, rate) for rate in self.args.rates}

    def left(self) -> Iterator[Run]:
        """The sweep, then LoRA, matched ranks and equal ranks, each with all seeds."""
        args, config = self.args, transformers.AutoConfig.from_pretrained(self.args.model)
        yield from (run for run in self.sweep.values() if run not in self.done)
        assert self.rate is not None
        matched = [(n, matched_rank(config, args.rank, n)) for n in args.nblocks]
        for nblocks, rank in ((1, args.rank), *matched, *((n, args.rank) for n in args.equal)):
            runs = [Run(nblocks, rank, seed, self.rate) for seed in args.seeds]
            yield from (run for run in runs if run not in self.done)

    async def go_on(self) -> bool:
        """Whether all is done; else the time is over."""
        args, began, seconds = self.args, time.perf_counter(), 0.0
        left = self.left()
        run = next(left, None)
        if run is None:
            return True
        release_pool()
        engine = await AsyncEngine.start(
            EngineConfig(
                model=ModelConfig(model=str(args.model), max_model_len=2 * args.max_length),
                cache=CacheConfig(kv_cache_gib=0.1),
                scheduler=SchedulerConfig(max_num_seqs=1),
                adapters=AdapterConfig(max_loras=1, max_lora_rank=64, adapter_memory_gib=0.1),
                training=TrainingConfig(train_memory_gib=args.train_memory_gib),
            )
        )
        training = EngineTraining(engine)
        try:
            while run is not None:
                start = time.perf_counter()
                if seconds and start - began + seconds > args.seconds:
                    return False
                await self._train(training, run)
                seconds = time.perf_counter() - start
                print(f"{run.name}, rank {run.rank}, seed {run.seed}: {seconds:.0f} s", flush=True)
                run = next(left, None)
            return True
        finally:
            await engine.shutdown(0)

    async def _train(self, training: EngineTraining, run: Run) -> None:
        args = self.args
        train = self._data(training, args.train, args.steps * args.batch, run.seed)
        valid = self._data(training, args.test, args.held_out, None, args.held_out if run.seed == SWEEP_SEED else 0)
        job = await off_loop(training.build, repr(run), run.spec(args), train, valid, None)
        numbers = (t.numel() for t in job.adapter.tensors.values())
        row = asdict(run) | {"parameters": sum(numbers), "tokens": train.num_tokens} | self.settings

        def note(event: Event) -> None:
            row.update({k: event.data[v] for k, v in NAMES.items() if v in event.data})
            row.setdefault("first_loss", event.data.get("train_loss"))  # of the model as it came

        await asyncio.wrap_future(training.start(job, 1.0, note))
        self.done[run] = row
        with self.file.open("a") as file:
            file.write(json.dumps(row) + "\n")

    def _data(self, training: EngineTraining, path: Path, num: int, seed: int | None, offset: int = 0) -> Dataset:
        """num samples that are short enough: drawn by the seed, or the file's from number `offset` on."""
        lines = path.read_text().splitlines()
        if seed is not None:
            lines = random.Random(seed).sample(lines, len(lines))
        limits = {"max_length": self.args.max_length, "depends_on_prompt": False}
        with tempfile.NamedTemporaryFile("w") as file:
            for row in map(json.loads, lines[: 8 * (offset + num)]):
                file.write(json.dumps({"prompt": row["question"] + "\n", "completion": row["answer"]}) + "\n")
            file.flush()
            data, kept = read(Path(file.name), training.tokenizer, kind="supervised", **limits), Dataset()
        assert len(data) >= offset + num, f"{path} has too few samples of at most {self.args.max_length} tokens"
        for i in range(offset, offset + num):
            kept.add(data[i])
        return kept


def compare(rows: Sequence[dict[str, Any]], args: argparse.Namespace) -> list[dict[str, Any]]:
    """A row for each kind of adapter: means and standard deviations over the seeds, of the loss and of its difference
    to LoRA's of the same seed."""
    kinds: dict[tuple[int, int], dict[int, dict[str, Any]]] = {}
    for row in rows:
        kinds.setdefault((row["nblocks"], row["rank"]), {})[row["seed"]] = row
    lora, table = kinds[1, args.rank], []
    for nblocks, rank in sorted(kinds, key=lambda kind: (kind[0] > 1 and kind[1] == args.rank, kind[0])):
        runs = kinds[nblocks, rank]
        losses = [run["loss"] for run in runs.values()]
        more = [run["loss"] - lora[seed]["loss"] for seed, run in runs.items()]
        table.append(
            {
                "nblocks": nblocks,
                "rank": rank,
                "parameters": runs[args.seeds[0]]["parameters"],
                "loss": statistics.mean(losses),
                "loss_sd": statistics.stdev(losses) if len(losses) > 1 else None,
                "accuracy": statistics.mean(run["accuracy"] for run in runs.values()),
                "more": statistics.mean(more),
                "more_sd": statistics.stdev(more) if len(more) > 1 else None,
                "seeds_lower": sum(m < 0 for m in more),
                "seeds": len(runs),
            }
        )
    return table


def show(table: list[dict[str, Any]]) -> None:
    console = Table(
        "adapter", "rank", "parameters", "of LoRA's", "held-out loss", "accuracy", "more than LoRA", "lower"
    )
    for r in table:
        spread = [f" ± {r[k]:.4f}" if r[k] is not None else "" for k in ("loss_sd", "more_sd")]
        name = "LoRA" if r["nblocks"] == 1 else f"BD-LoRA, N = {r['nblocks']}"
        share = f"{r['parameters'] / table[0]['parameters']:.3f}"
        cells = [
            name,
            str(r["rank"]),
            f"{r['parameters']:,}",
            share,
            f"{r['loss']:.4f}{spread[0]}",
            f"{r['accuracy']:.3f}",
        ]
        console.add_row(*cells, f"{r['more']:+.4f}{spread[1]}", f"{r['seeds_lower']} of {r['seeds']}")
    Console(width=120).print(console)


def plot(rows: Sequence[dict[str, Any]], table: list[dict[str, Any]], file: Path) -> None:
    """Held-out losses, the runs of a seed joined, and their mean."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axis = pyplot.subplots(figsize=(8, 4), layout="constrained")
    kinds = [(r["nblocks"], r["rank"]) for r in table]
    names = [
        f"{'LoRA' if n == 1 else f'BD, N={n}'}\nr={r}\n{t['parameters'] / 1e6:.2f} M"
        for (n, r), t in zip(kinds, table, strict=True)
    ]
    for seed in sorted({row["seed"] for row in rows}):
        mine = {(row["nblocks"], row["rank"]): row["loss"] for row in rows if row["seed"] == seed}
        places = [i for i, kind in enumerate(kinds) if kind in mine]
        axis.plot(places, [mine[kinds[i]] for i in places], "o-", alpha=0.5, linewidth=1, label=f"seed {seed}")
    axis.plot(range(len(table)), [r["loss"] for r in table], "k_", markersize=24, label="mean")
    axis.set_xticks(range(len(table)), names)
    axis.set(ylabel="held-out loss per answer token", title="SmolLM2-135M on GSM8K")
    axis.legend()
    file.parent.mkdir(exist_ok=True)
    figure.savefig(file, dpi=120)
    print(f"drew {file}")


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--train", type=Path, required=True)
    parser.add_argument("--test", type=Path, required=True)
    parser.add_argument("--runs", type=Path, default=RESULTS / "bd_quality_runs.jsonl", help="what is done so far")
    parser.add_argument("--nblocks", type=int, nargs="*", default=[2, 8, 4])
    parser.add_argument("--equal", type=int, nargs="*", default=[8, 2, 4], help="blocks of the runs at equal rank")
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--rates", type=float, nargs="+", default=[5e-4, 1e-3, 2e-3, 4e-3])
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--held-out", type=int, default=48)
    parser.add_argument("--max-length", type=int, default=128, help="longer samples are left out")
    parser.add_argument("--seconds", type=float, default=170)
    parser.add_argument("--train-memory-gib", type=float, default=5)
    parser.add_argument("--plot", type=Path, default=Path(os.environ.get("OUT", RESULTS)) / "bd_quality.png")
    parser.add_argument("--save", action="store_true")
    args = parser.parse_args(argv)
    study = Study(args)
    if not asyncio.run(study.go_on()):
        print(f"{len(study.done)} runs are done, more are left")
        return
    rows = [row for run, row in study.done.items() if run.seed != SWEEP_SEED]
    table = compare(rows, args)
    show(table)
    plot(rows, table, args.plot)
    settings = {k: getattr(args, k) for k in ("rank", "seeds", *SETTINGS)}
    settings |= {"model": args.model.name, "learning_rate": study.rate, "summary": table}
    settings["sweep"] = {rate: study.done[run]["loss"] for rate, run in study.sweep.items()}
    finish("bd_quality", settings, rows, save=args.save)


if __name__ == "__main__":
    main()
