"""What a record says about a deployment: the same numbers for the twin and for a measured server."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from itertools import pairwise
from pathlib import Path

from multigraft.core.errors import InvalidRequest

from .record import Record, Served
from .workload import SLO

STARVED = 0.9
"""An adapter, or the whole, starves when less than this share of its arriving tokens is served."""
JUDGED = 0.9
"""Share of the workload's duration whose arrivals count for starvation: later ones had no time to be served."""


@dataclass(frozen=True, slots=True)
class Quantiles:
    """Of a latency in seconds; NaN-free: all 0 when nothing was measured."""

    mean: float = 0.0
    p50: float = 0.0
    p90: float = 0.0
    p99: float = 0.0
    max: float = 0.0

    @classmethod
    def of(cls, values: Iterable[float], counts: Iterable[int] | None = None) -> Quantiles:
        """counts: how often each value occurs; once by default."""
        pairs = sorted(zip(values, counts, strict=True)) if counts is not None else [(v, 1) for v in sorted(values)]
        total = sum(n for _, n in pairs)
        if not total:
            return cls()
        wanted, seen = (0.5, 0.9, 0.99), 0
        found: list[float] = []
        for value, n in pairs:
            seen += n
            while len(found) < len(wanted) and seen >= wanted[len(found)] * total:
                found.append(value)
        p50, p90, p99 = found
        return cls(sum(v * n for v, n in pairs) / total, p50, p90, p99, pairs[-1][0])


@dataclass(frozen=True, slots=True, kw_only=True)
class AdapterReport:
    name: str
    """"base" for requests without adapter."""
    requests: int
    served: float
    """Share of the tokens that arrived, prompts and outputs, that were served in the workload's duration."""
    starved: bool
    ttft: float
    """Mean; 0 when there was no token."""
    attained: float
    """Share of the requests that met the SLO."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Resources:
    """What only the server itself can tell."""

    loads: int
    load_seconds: float
    """Mean, from the decision to load until the adapter could be used."""
    slots: int
    slots_used: float
    """Mean over time, like the next two."""
    kv_usage: float
    running: float
    waiting: float
    kv_usage_max: float
    running_max: int
    waiting_max: int
    preemptions: int
    steps: int
    series: dict[str, list[float]]
    """time, running, waiting, kv_usage, slots_used: what the plots show."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    """Times in seconds, rates per second."""

    workload: str
    source: str
    """twin or measured."""
    duration: float
    """Until the last arrival."""
    drained: float
    """Until all requests had ended."""
    requests: int
    completed: int
    failed: int
    arriving: float
    """Tokens that arrived each second, prompts and outputs."""
    throughput: float
    """Tokens served each second of the duration: prompts whose first token came, and output tokens."""
    output_throughput: float
    """Output tokens alone, each second until all had ended."""
    request_throughput: float
    """Requests completed, each second until all had ended."""
    ttft: Quantiles
    itl: Quantiles
    e2e: Quantiles
    queueing: Quantiles
    """From arrival to the first step with the request in it."""
    starved: bool
    """Whether less than STARVED of what arrived in the first nine tenths was served by the last arrival."""
    starved_adapters: int
    fairness: float
    """Jain's index of the adapters' served shares: 1 when all are served alike, 1/n when one alone is."""
    attained: float
    """Share of the requests that met the SLO."""
    train_throughput: float
    """Trained tokens each second."""
    adapters: tuple[AdapterReport, ...]
    resources: Resources | None
    gaps: dict[str, list[float]] = field(default_factory=dict)
    """Cumulative distribution of ttft, itl and e2e, at each hundredth, for the plots."""

    def save(self, path: Path) -> None:
        path.write_text(json.dumps(asdict(self), indent=1) + "\n")

    @classmethod
    def load(cls, path: Path) -> Report:
        """InvalidRequest for a file that is no report."""
        try:
            data = json.loads(path.read_text())
            for name in ("ttft", "itl", "e2e", "queueing"):
                data[name] = Quantiles(**data[name])
            data["adapters"] = tuple(AdapterReport(**a) for a in data["adapters"])
            data["resources"] = Resources(**data["resources"]) if data["resources"] else None
            return cls(**data)
        except OSError as error:
            raise InvalidRequest(f"Cannot read the report {path}: {error.strerror}.") from None
        except (ValueError, TypeError, KeyError) as error:
            raise InvalidRequest(f"{path} is not a report of `multigraft twin` or `replay`: {error!r}.") from None


def report(record: Record, source: str = "twin") -> Report:
    workload, served = record.workload, record.served
    duration, drained = max(workload.duration, 1e-9), max(record.seconds, 1e-9)
    done = [s for s in served if s.complete]
    ttft = [s.first - s.request.time for s in served if s.first is not None]
    e2e = [s.last - s.request.time for s in done if s.last is not None]
    queueing = [s.started - s.request.time for s in served if s.started is not None]
    by_adapter: dict[str | None, list[Served]] = {}
    for s in served:
        by_adapter.setdefault(s.request.adapter, []).append(s)
    adapters = [_adapter(name, group, duration, workload.slo) for name, group in sorted(by_adapter.items(), key=str)]
    judged = [s for s in served if s.request.time <= JUDGED * duration]
    return Report(
        workload=workload.name,
        source=source,
        duration=duration,
        drained=drained,
        requests=len(served),
        completed=len(done),
        failed=sum(s.error is not None for s in served),
        arriving=workload.tokens / duration,
        throughput=sum(_tokens_by(s, duration) for s in served) / duration,
        output_throughput=sum(s.num_tokens for s in served) / drained,
        request_throughput=len(done) / drained,
        ttft=Quantiles.of(ttft),
        itl=Quantiles.of(record.gaps, record.gap_counts),
        e2e=Quantiles.of(e2e),
        queueing=Quantiles.of(queueing),
        starved=_share(judged, duration) < STARVED,
        starved_adapters=sum(a.starved for a in adapters),
        fairness=_jain([a.served for a in adapters]),
        attained=_attained(served, workload.slo),
        train_throughput=record.train_tokens / drained,
        adapters=tuple(adapters),
        resources=_resources(record),
        gaps={"ttft": _curve(ttft), "itl": _curve(record.gaps, record.gap_counts), "e2e": _curve(e2e)},
    )


def _adapter(name: str | None, served: Sequence[Served], duration: float, slo: SLO) -> AdapterReport:
    judged = [s for s in served if s.request.time <= JUDGED * duration]
    share = _share(judged, duration)
    ttft = [s.first - s.request.time for s in served if s.first is not None]
    return AdapterReport(
        name=name or "base",
        requests=len(served),
        served=share,
        starved=share < STARVED,
        ttft=sum(ttft) / max(1, len(ttft)),
        attained=_attained(served, slo),
    )


def _tokens_by(s: Served, time: float) -> float:
    """Prompt and output tokens served by then; tokens between the first and the last came evenly."""
    if s.first is None or s.first > time:
        return 0.0
    tokens = s.request.prompt_len + s.num_tokens
    if s.last is None or s.last <= time or s.last == s.first:
        return tokens
    return s.request.prompt_len + 1 + (s.num_tokens - 1) * (time - s.first) / (s.last - s.first)


def _share(served: Sequence[Served], time: float) -> float:
    arrived = sum(s.request.prompt_len + s.request.output_len for s in served)
    return sum(_tokens_by(s, time) for s in served) / arrived if arrived else 1.0


def _attained(served: Sequence[Served], slo: SLO) -> float:
    met = 0
    for s in served:
        if not s.complete or s.first is None or s.last is None:
            continue
        itl = (s.last - s.first) / max(1, s.num_tokens - 1)
        met += s.first - s.request.time <= (slo.ttft or math.inf) and itl <= (slo.itl or math.inf)
    return met / len(served) if served else 1.0


def _jain(shares: Sequence[float]) -> float:
    """Jain, Chiu, Hawe: A quantitative measure of fairness (1984)."""
    squares = sum(x * x for x in shares)
    return sum(shares) ** 2 / (len(shares) * squares) if squares else 1.0


def _curve(values: Sequence[float], counts: Sequence[int] | None = None) -> list[float]:
    """The 0th, 1st, ... 100th hundredth of the values; empty when there are none."""
    pairs = sorted(zip(values, counts if counts is not None else [1] * len(values), strict=True))
    total, seen = sum(n for _, n in pairs), 0
    found: list[float] = []
    for value, n in pairs:
        seen += n
        while len(found) <= 100 and seen >= max(1, len(found) / 100 * total):
            found.append(value)
    return found


def _resources(record: Record) -> Resources | None:
    samples = record.samples
    if not samples or record.loads is None:
        return None
    ends = [*(b.time for _, b in pairwise(samples)), record.seconds]
    weights = [max(0.0, end - s.time) for s, end in zip(samples, ends, strict=True)]
    total = sum(weights) or 1.0

    def mean(values: Iterable[float]) -> float:
        return sum(v * w for v, w in zip(values, weights, strict=True)) / total

    return Resources(
        loads=len(record.loads),
        load_seconds=sum(load.seconds for load in record.loads) / max(1, len(record.loads)),
        slots=record.max_loras or 0,
        slots_used=mean(s.slots_used for s in samples),
        kv_usage=mean(s.kv_usage for s in samples),
        running=mean(s.running for s in samples),
        waiting=mean(s.waiting for s in samples),
        kv_usage_max=max(s.kv_usage for s in samples),
        running_max=max(s.running for s in samples),
        waiting_max=max(s.waiting for s in samples),
        preemptions=record.preemptions or 0,
        steps=record.steps or 0,
        series={name: [round(getattr(s, name), 4) for s in samples] for name in samples[0]._fields},
    )
