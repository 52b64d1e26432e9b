"""What arrives at a server: adapters, requests, training jobs, and the latencies that were promised."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from random import Random
from typing import Any, NamedTuple

from multigraft.core.errors import InvalidRequest
from multigraft.core.region import Scope, as_scope


class Arrival(NamedTuple):
    """One request. Its output ends after output_len tokens, whatever they are."""

    time: float
    """Seconds from the workload's start."""
    adapter: str | None
    """None: the base model."""
    prompt_len: int
    output_len: int
    prefix: tuple[int, ...] = ()
    """Ids of the prompt's leading blocks of PREFIX_BLOCK tokens; prompts with the same leading ids share them."""


PREFIX_BLOCK = 512
"""Tokens that one id of Arrival.prefix stands for: Mooncake's unit."""
LEAST_TOKEN = 3
"""Lower ids tend to be special."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Adapter:
    name: str
    rank: int = 16
    scope: Scope = Scope.ALL
    nbytes: int | None = None
    """Bytes on the device; None: as the profile says for the rank."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainingJob:
    """A fine-tuning job that runs beside the requests."""

    name: str
    tokens: int
    """Rows it trains on in all, every epoch counted."""
    microbatch: int = 1024
    """Rows that go through the model together."""
    start: float = 0.0
    rank: int = 16


@dataclass(frozen=True, slots=True, kw_only=True)
class SLO:
    """Promised latencies in seconds; None: not promised. A request attains them if it attains each."""

    ttft: float | None = None
    """From arrival to the first token."""
    itl: float | None = None
    """Mean time between a request's tokens."""


@dataclass(frozen=True, kw_only=True)
class Workload:
    """Checked when made: InvalidRequest names the first thing that is wrong."""

    name: str
    adapters: tuple[Adapter, ...] = ()
    requests: tuple[Arrival, ...] = ()
    """By time."""
    jobs: tuple[TrainingJob, ...] = ()
    slo: SLO = field(default_factory=SLO)

    def __post_init__(self) -> None:
        for name, count in Counter(a.name for a in self.adapters).items():
            _check(count == 1, f"Adapter {name!r} is listed {count} times in workload {self.name!r}.")
        for a in self.adapters:
            _check(a.rank >= 1, f"Adapter {a.name!r} has rank {a.rank}; it must be at least 1.")
            _check(a.nbytes is None or a.nbytes > 0, f"Adapter {a.name!r} has {a.nbytes} bytes; it must be positive.")
        known = {None, *(a.name for a in self.adapters)}
        before = 0.0
        for i, r in enumerate(self.requests):
            where = f"Request {i} of workload {self.name!r}"
            _check(0 <= r.time < math.inf, f"{where} arrives at {r.time} s; times start at 0.")
            _check(r.time >= before, f"{where} arrives at {r.time} s, before the one listed ahead of it ({before} s).")
            _check(r.adapter in known, f"{where} names adapter {r.adapter!r}, which the workload does not list.")
            _check(r.prompt_len >= 1, f"{where} has {r.prompt_len} prompt tokens; at least 1 is needed.")
            _check(r.output_len >= 1, f"{where} has {r.output_len} output tokens; at least 1 is needed.")
            before = r.time
        for job in self.jobs:
            _check(job.tokens >= 1, f"Training job {job.name!r} has {job.tokens} tokens; it must be at least 1.")
            _check(job.microbatch >= 1, f"Training job {job.name!r} has microbatches of {job.microbatch} tokens.")
            _check(job.start >= 0, f"Training job {job.name!r} starts at {job.start} s; times start at 0.")

    @property
    def duration(self) -> float:
        """Seconds from the start to the last arrival."""
        return self.requests[-1].time if self.requests else 0.0

    @property
    def tokens(self) -> int:
        """Prompt and output tokens of all requests."""
        return sum(r.prompt_len + r.output_len for r in self.requests)

    def save(self, path: Path) -> None:
        """As JSON lines: one object with everything but the requests, then one for each request."""
        head = {
            "workload": self.name,
            "adapters": [_short(a) for a in self.adapters],
            "jobs": [_short(j) for j in self.jobs],
            "slo": _short(self.slo),
        }
        with path.open("w") as file:
            file.write(json.dumps(head) + "\n")
            for r in self.requests:
                file.write(json.dumps({k: v for k, v in r._asdict().items() if v not in ((), None)}) + "\n")


def _check(ok: bool, message: str) -> None:
    if not ok:
        raise InvalidRequest(message, param="workload")


def _short(item: Any) -> dict[str, Any]:
    """Fields that are not None, JSON-ready."""
    return {k: v.value if isinstance(v, Scope) else v for k, v in asdict(item).items() if v is not None}


def make(cls: Any, data: object, where: str) -> Any:
    """An Adapter, TrainingJob or SLO from a mapping; InvalidRequest for a wrong field."""
    if not isinstance(data, Mapping):
        raise InvalidRequest(f"{where} must map fields to values, got {data!r:.80}.", param="workload")
    kinds = {f.name: f.type for f in fields(cls)}
    if unknown := [key for key in data if key not in kinds]:
        raise InvalidRequest(f"{where} has no field {unknown[0]!r}; it can have {', '.join(kinds)}.", param="workload")
    values = dict(data)
    for key, value in data.items():
        if key == "scope":
            values[key] = as_scope(value)
        elif "str" in kinds[key]:
            _check(isinstance(value, str), f"{where}: {key} is {value!r}; it must be a text.")
        else:
            values[key] = number(value, f"{where}: {key}", whole="int" in kinds[key])
    try:
        return cls(**values)
    except TypeError as error:  # a required field is missing
        raise InvalidRequest(f"{where} is incomplete: {error}.", param="workload") from None


def number(value: object, what: str, *, whole: bool = False, least: float = 0) -> Any:
    """A finite number of at least `least`, or InvalidRequest. Text is taken too, as csv files bring it."""
    try:
        found = float(value)  # type: ignore[arg-type]
    except (TypeError, ValueError):
        raise InvalidRequest(f"{what} is {value!r}; it must be a number.", param="workload") from None
    kind = "a whole number" if whole else "a number"
    ok = math.isfinite(found) and found >= least and not isinstance(value, bool) and (not whole or found == int(found))
    _check(ok, f"{what} is {value!r}; it must be {kind} of {least:g} or more.")
    return int(found) if whole else found


def prompt_tokens(index: int, arrival: Arrival, vocab: int) -> list[int]:
    """For a real model: random tokens that agree with another request's as far as their prefix ids do."""
    tokens: list[int] = []
    for block in arrival.prefix:
        tokens += Random(f"block {block}").choices(range(LEAST_TOKEN, vocab), k=PREFIX_BLOCK)
    del tokens[arrival.prompt_len :]
    return tokens + Random(index).choices(range(LEAST_TOKEN, vocab), k=arrival.prompt_len - len(tokens))


def by_time(requests: Iterable[Arrival]) -> tuple[Arrival, ...]:
    return tuple(sorted(requests, key=lambda r: r.time))
