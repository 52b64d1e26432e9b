"""What scheduling costs on the host: CPU microseconds of schedule() + commit() per step, without a model.

Usage: python benchmarks/scheduler_cost.py [--steps N]. Prints a table, and one JSON line at the end.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import time
from collections.abc import Iterator

from multigraft.core.batch import Batch
from multigraft.core.config import SchedulerConfig
from multigraft.core.request import AdapterRef, FinishReason, Request, SamplingParams, Scope
from multigraft.kvcache.pages import PagePool
from multigraft.scheduling.residency import Residency
from multigraft.scheduling.scheduler import Scheduler

ENDLESS = 4096
"""Output length of requests that decode throughout the measurement."""


class Case:
    """A scheduler under a fixed load: requests of num_adapters adapters (0: none), kept at num_waiting waiting."""

    def __init__(
        self,
        *,
        num_seqs: int,
        num_adapters: int = 0,
        slots: int = 16,
        scope: Scope = Scope.ALL,
        num_waiting: int = 0,
        prompt_len: int = 32,
        output_len: int = ENDLESS,
        num_pages: int = 200_000,
    ):
        config = SchedulerConfig(max_num_seqs=num_seqs, max_num_batched_tokens=2048)
        self.scheduler = Scheduler(config, PagePool(num_pages, 16), Residency(slots, slots))
        self.adapters = [AdapterRef(f"adapter-{uid}", uid, 1, scope) for uid in range(1, num_adapters + 1)]
        self.backlog = num_waiting
        self.prompt_len, self.output_len = prompt_len, output_len
        self.num_added = 0
        self.loading: list[int] = []
        for _ in range(num_seqs):
            self.add()
        self.top_up()
        while self.scheduler.num_waiting > num_waiting:
            self.step()

    def add(self) -> None:
        i = self.num_added
        self.num_added += 1
        adapter = self.adapters[i % len(self.adapters)] if self.adapters else None
        prompt = [i % 50_000, *range(self.prompt_len - 1)]
        max_len = self.prompt_len + self.output_len
        self.scheduler.add(Request(str(i), prompt, SamplingParams(), max_len=max_len, adapter=adapter))

    def top_up(self) -> None:
        for _ in range(self.backlog - self.scheduler.num_waiting):
            self.add()

    def step(self) -> tuple[float, Batch]:
        """Seconds of schedule() and commit(), ending requests left out, and what was run."""
        for uid in self.loading:
            self.scheduler.adapter_loaded(uid)
        start = time.thread_time()
        batch = self.scheduler.schedule()
        scheduled = time.thread_time()
        self.loading = [move.ref.uid for move in batch.loads]
        sampled = {span.request.id: 7 for span in batch.spans if span.samples}
        committing = time.thread_time()
        self.scheduler.commit(batch, sampled)
        seconds = scheduled - start + time.thread_time() - committing
        for span in batch.spans:
            if len(span.request.tokens) >= span.request.max_len:
                self.scheduler.finish(span.request, FinishReason.LENGTH)
        self.top_up()
        return seconds, batch


def cases() -> Iterator[tuple[str, Case]]:
    yield "256 decode, no adapter", Case(num_seqs=256)
    yield "256 decode, 16 adapters", Case(num_seqs=256, num_adapters=16)
    yield "256 decode, 256 prefill-scoped adapters", Case(num_seqs=256, num_adapters=256, scope=Scope.PREFILL)
    yield "512 decode, 64 adapters", Case(num_seqs=512, num_adapters=64, slots=64)
    yield "256 decode, 2000 wait, 16 adapters", Case(num_seqs=256, num_adapters=16, num_waiting=2000)
    churn = {"num_seqs": 256, "num_waiting": 2000, "prompt_len": 512, "output_len": 64}
    yield "churn: 512 in, 64 out, 16 adapters", Case(num_adapters=16, **churn)
    yield "churn: 512 in, 64 out, 1000 adapters", Case(num_adapters=1000, **churn)
    yield "churn: 512 in, 64 out, pages for 128", Case(num_adapters=16, num_pages=128 * 36, **churn)


def measure(case: Case, steps: int) -> dict[str, float]:
    timings, spans = [], 0
    for _ in range(steps):
        seconds, batch = case.step()
        timings.append(seconds * 1e6)
        spans += len(batch.spans)
    centiles = statistics.quantiles(timings, n=100)
    values = {"mean": statistics.mean(timings), "p50": centiles[49], "p99": centiles[98], "spans": spans / steps}
    return {name: round(value, 1) for name, value in values.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=1000)
    steps = parser.parse_args().steps
    print(f"{'case':42}{'spans':>8}{'mean us':>10}{'p50':>8}{'p99':>9}")
    results = {}
    for name, case in cases():
        r = results[name] = measure(case, steps)
        print(f"{name:42}{r['spans']:8.0f}{r['mean']:10.0f}{r['p50']:8.0f}{r['p99']:9.0f}", flush=True)
    print(json.dumps({"benchmark": "scheduler_cost", "python": platform.python_version(), "us_per_step": results}))


if __name__ == "__main__":
    main()
