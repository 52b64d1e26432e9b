"""What benchmarks.coserve and its peer share: requests, samples, and what is reported of them."""

from __future__ import annotations

import csv
import json
import random
import time
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path

import numpy as np

from multigraft.training.dataset import Dataset
from multigraft.training.job import Event
from multigraft.training.microbatch import Sample

TTFT_S, TPOT_S, WAIT_S = 1.0, 0.1, 6.0
MAX_LEN = 4096
CHARACTERS_A_TOKEN = 4


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
        """NaN without a second token."""
        return (self.last - self.first) / (self.num_tokens - 1) if self.first and self.num_tokens > 1 else float("nan")


@dataclass(slots=True)
class Trained:
    """Tokens of the optimizer steps as they ended."""

    times: list[float] = field(default_factory=list)
    tokens: list[int] = field(default_factory=list)

    def __call__(self, event: Event) -> None:
        if "train_loss" in event.data:
            self.add(int(event.data["tokens"]))

    def add(self, tokens: int) -> None:
        """A step has ended."""
        self.times.append(time.perf_counter())
        self.tokens.append(tokens)

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


def summary(served: list[Served], start: float, stop: float) -> dict:
    ttft, tpot = (np.array([getattr(s, name) for s in served]) for name in ("ttft", "tpot"))
    decoded = tpot[~np.isnan(tpot)] if np.isfinite(tpot).any() else np.zeros(1)
    return {
        "requests": len(served),
        "decode_tok_s": sum(s.num_tokens for s in served) / (max(s.last for s in served) - start),
        "ttft_p50_ms": float(np.percentile(ttft, 50) * 1e3),
        "ttft_p99_ms": float(np.percentile(ttft, 99) * 1e3),
        "tpot_p50_ms": float(np.percentile(decoded, 50) * 1e3),
        "tpot_p99_ms": float(np.percentile(decoded, 99) * 1e3),
        "slo": float(((ttft <= TTFT_S) & ~(tpot > TPOT_S)).mean()),
        "wait_6s": float((ttft <= WAIT_S).mean()),
    }
