"""Readers of recorded workloads: our own JSON lines, Azure's csv, Mooncake's JSON lines, ServeGen's clients.

Each raises InvalidRequest with the file and the line for what it cannot read.
"""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path
from random import Random
from typing import Any, NamedTuple

from multigraft.core.errors import InvalidRequest

from .workload import SLO, Adapter, Arrival, TrainingJob, Workload, by_time, make, number

AZURE = ("TIMESTAMP", "ContextTokens", "GeneratedTokens")
MOONCAKE = ("timestamp", "input_length", "output_length")


def read_jsonl(path: Path) -> Workload:
    """Ours, as Workload.save writes it, or Mooncake's, told apart by the first line."""
    rows = _json_lines(path)
    where, head = next(rows, (str(path), {}))
    if all(key in head for key in MOONCAKE):
        return Workload(name=path.stem, requests=by_time([_mooncake(where, head), *(_mooncake(*row) for row in rows)]))
    if "workload" not in head:
        raise InvalidRequest(
            f"{where} begins neither a workload of ours (an object with 'workload' and 'adapters') nor a Mooncake "
            f"trace ({', '.join(MOONCAKE)})."
        )
    return Workload(
        name=str(head["workload"]),
        adapters=tuple(make(Adapter, a, f"{where}: an adapter") for a in head.get("adapters", ())),
        jobs=tuple(make(TrainingJob, j, f"{where}: a training job") for j in head.get("jobs", ())),
        slo=make(SLO, head.get("slo", {}), f"{where}: slo"),
        requests=by_time(_ours(*row) for row in rows),
    )


def _ours(where: str, row: dict[str, Any]) -> Arrival:
    _require(where, row, ("time", "prompt_len", "output_len"))
    prefix = row.get("prefix", [])
    return Arrival(
        number(row["time"], f"{where}: time"),
        row.get("adapter"),
        number(row["prompt_len"], f"{where}: prompt_len", whole=True, least=1),
        number(row["output_len"], f"{where}: output_len", whole=True, least=1),
        tuple(number(i, f"{where}: prefix", whole=True) for i in prefix),
    )


def _mooncake(where: str, row: dict[str, Any]) -> Arrival:
    """timestamp in milliseconds; hash_ids of blocks of 512 tokens."""
    _require(where, row, MOONCAKE)
    return Arrival(
        number(row["timestamp"], f"{where}: timestamp") / 1e3,
        None,
        number(row["input_length"], f"{where}: input_length", whole=True, least=1),
        max(1, number(row["output_length"], f"{where}: output_length", whole=True)),
        tuple(number(i, f"{where}: hash_ids", whole=True) for i in row.get("hash_ids", [])),
    )


def read_azure(path: Path) -> Workload:
    """Azure's LLM inference traces of 2023 and 2024: times become seconds from the first request."""
    with _open(path) as file:
        rows = csv.DictReader(file)
        _require(f"{path}, line 1", dict.fromkeys(rows.fieldnames or ()), AZURE)
        found = []
        for row in rows:
            where = f"{path}, line {rows.line_num}"
            try:
                # Seven digits of a second's fraction: more than Python 3.11 reads.
                time = datetime.fromisoformat((row["TIMESTAMP"] or "").split("+")[0][:26])
            except ValueError:
                raise InvalidRequest(
                    f"{where}: TIMESTAMP is {row['TIMESTAMP']!r}; it must be a date and time."
                ) from None
            prompt, output = (number(row[c], f"{where}: {c}", whole=True) for c in AZURE[1:])
            found.append((time, max(1, prompt), max(1, output)))
    if not found:
        raise InvalidRequest(f"{path} has no requests.")
    start = min(time for time, *_ in found)
    arrivals = (Arrival((time - start).total_seconds(), None, p, o) for time, p, o in found)
    return Workload(name=path.stem, requests=by_time(arrivals))


class Window(NamedTuple):
    """ServeGen's statistics of one client in a stretch of time."""

    start: float
    rate: float
    """Requests per second."""
    cv: float
    """Coefficient of variation of the times between requests."""
    pattern: str
    """Gamma or Weibull; exponential when empty."""
    shape: float


def read_servegen(path: Path) -> list[Window]:
    """One client's file (chunk-*-trace.csv), which has no header."""
    windows = []
    with _open(path) as file:
        for line, row in enumerate(csv.reader(file), 1):
            where = f"{path}, line {line}"
            if len(row) != 6:
                raise InvalidRequest(f"{where} has {len(row)} columns; a ServeGen client has 6.")
            start, rate, cv, shape = (number(row[i] or 0, f"{where}, column {i + 1}") for i in (0, 1, 2, 4))
            if row[3] not in ("", "Gamma", "Weibull", "Exponential"):
                raise InvalidRequest(
                    f"{where}: the arrival pattern is {row[3]!r}; known are Gamma, Weibull, Exponential."
                )
            windows.append(Window(start, rate, cv, row[3], shape))
    if len(windows) < 2:
        raise InvalidRequest(f"{path} has {len(windows)} windows of time; at least 2 are needed.")
    return windows


def intervals(rng: Random, rate: float, pattern: str = "", shape: float = 1.0) -> Iterator[float]:
    """Times between requests of a renewal process of this mean rate; shape: of the Gamma or Weibull distribution."""
    assert rate > 0
    while True:
        if pattern == "Gamma" and shape > 0:
            yield rng.gammavariate(shape, 1 / (rate * shape))
        elif pattern == "Weibull" and shape > 0:
            yield rng.weibullvariate(1 / (rate * math.gamma(1 + 1 / shape)), shape)
        else:
            yield rng.expovariate(rate)


def _open(path: Path) -> Any:
    try:
        return path.open(newline="", encoding="utf-8-sig")
    except OSError as error:
        raise InvalidRequest(f"Cannot read {path}: {error.strerror}.") from None


def _json_lines(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    with _open(path) as file:
        for line, text in enumerate(file, 1):
            if not text.strip():
                continue
            where = f"{path}, line {line}"
            try:
                row = json.loads(text)
            except ValueError as error:
                raise InvalidRequest(f"{where} is not JSON: {error}.") from None
            if not isinstance(row, dict):
                raise InvalidRequest(f"{where} must be an object, got {text.strip():.60}.")
            yield where, row


def _require(where: str, row: dict[str, Any], columns: tuple[str, ...]) -> None:
    if missing := [c for c in columns if c not in row]:
        raise InvalidRequest(f"{where}: {', '.join(missing)} is missing; found {', '.join(row) or 'nothing'}.")
