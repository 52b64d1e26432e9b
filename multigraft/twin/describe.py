"""Workloads from a description: groups of adapters with rates, ranks, scopes, lengths and arrival processes.

    name: tenants
    duration: 600                       # seconds of arrivals
    seed: 0
    slo: {ttft: 2.0, itl: 0.1}          # seconds
    lengths: azure_llm_2023_conv.csv    # prompt and output lengths, drawn together; or of their own:
    prompt: {lognormal: [1155, 900], max: 4096}
    output: {normal: [200, 50]}
    adapters:
      - name: support                   # support-0 ... support-19
        count: 20
        rank: [8, 16, 64]               # in turn
        scope: prefill
        rate: 0.05                      # requests per second and adapter, on average over the group
        zipf: 1.0                       # skew of the rates inside the group; or all alike
        arrivals: {gamma: 3.0}          # coefficient of variation; or poisson, or {servegen: FOLDER, start: 36000}
    base: {rate: 0.5}                   # requests without adapter
    trace: requests.csv                 # requests of a trace, spread over the adapters by their rates
    speed: 2.0                          # the trace's time runs this much faster
    jobs: [{name: tune, tokens: 100000, microbatch: 1024, start: 60}]

A group may have lengths, prompt and output of its own. Paths are relative to the description.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from math import log, sqrt
from pathlib import Path
from random import Random
from typing import Any

import yaml

from multigraft.core.errors import InvalidRequest
from multigraft.core.region import Scope, as_scope

from .traces import Window, intervals, read_azure, read_jsonl, read_servegen
from .workload import SLO, Adapter, Arrival, TrainingJob, Workload, by_time, make, number

Lengths = Callable[[Random], tuple[int, int]]
"""Draws a prompt and an output length."""

TOP = {"name", "duration", "seed", "slo", "lengths", "prompt", "output", "adapters", "base", "trace", "speed", "jobs"}
GROUP = {"name", "count", "rank", "scope", "rate", "zipf", "arrivals", "lengths", "prompt", "output"}
SHAPES = ("uniform", "normal", "lognormal")
MAX_LEN = 1_000_000


def read_workload(path: Path) -> Workload:
    """A description (.yaml, .yml, .json), our own or Mooncake's trace (.jsonl), or Azure's (.csv)."""
    if path.suffix == ".jsonl":
        return read_jsonl(path)
    if path.suffix == ".csv":
        return read_azure(path)
    if path.suffix not in (".yaml", ".yml", ".json"):
        raise InvalidRequest(f"{path} is no workload: it must end in .yaml, .json, .jsonl or .csv.", param="workload")
    try:
        text = path.read_text()
        data = json.loads(text) if path.suffix == ".json" else yaml.safe_load(text)
    except OSError as error:
        raise InvalidRequest(f"Cannot read the workload {path}: {error.strerror}.", param="workload") from None
    except (ValueError, yaml.YAMLError) as error:
        raise InvalidRequest(f"{path} cannot be parsed: {' '.join(str(error).split())}.", param="workload") from None
    return describe(data, folder=path.parent, name=path.stem)


def describe(data: object, *, folder: Path = Path(), name: str = "workload") -> Workload:
    """The workload that a description, parsed already, stands for. The same seed gives the same requests."""
    top = _mapping(data, "The workload", TOP)
    seed = number(top.get("seed", 0), "seed", whole=True)
    trace = _trace(top, folder)
    duration = number(top["duration"], "duration") if "duration" in top else trace[-1].time if trace else 0.0
    if duration <= 0:
        raise InvalidRequest("The workload needs a duration above 0, in seconds, or a trace.", param="workload")
    sources: list[_Source] = []
    for i, group in enumerate(_list(top, "adapters")):
        sources += _group(_mapping(group, f"adapters[{i}]", GROUP), f"adapters[{i}]", top, folder, duration)
    if "base" in top:
        base = _mapping(top["base"], "base", GROUP - {"name", "count", "rank", "scope"})
        sources += _group(base, "base", top, folder, duration, base=True)
    if trace:
        requests = list(_spread(trace, sources, duration, Random(seed)))
    else:
        # Each adapter draws from a stream of its own, so that adding one leaves the others' requests as they were.
        requests = [r for i, s in enumerate(sources) for r in s.requests(duration, Random(f"{seed}/{i}"))]
    return Workload(
        name=str(top.get("name", name)),
        adapters=tuple(s.adapter for s in sources if s.adapter is not None),
        requests=by_time(requests),
        jobs=tuple(make(TrainingJob, job, f"jobs[{i}]") for i, job in enumerate(_list(top, "jobs"))),
        slo=make(SLO, top.get("slo", {}), "slo"),
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class _Source:
    """One adapter's requests, or the base model's."""

    adapter: Adapter | None
    rate: float
    windows: Sequence[Window]
    """Rates and arrival patterns from each window's start on, the first at 0; scaled to `rate` already."""
    lengths: Lengths

    def requests(self, duration: float, rng: Random) -> Iterator[Arrival]:
        name = self.adapter.name if self.adapter else None
        ends = [*(w.start for w in self.windows[1:]), duration]
        for window, end in zip(self.windows, ends, strict=True):
            if window.rate <= 0:
                continue
            time = window.start
            for gap in intervals(rng, window.rate, window.pattern, window.shape):
                time += gap
                if time >= min(end, duration):
                    break
                yield Arrival(time, name, *self.lengths(rng))


def _group(
    group: Mapping[str, Any], where: str, top: Mapping[str, Any], folder: Path, duration: float, *, base: bool = False
) -> list[_Source]:
    count = number(group.get("count", 1), f"{where}: count", whole=True, least=1)
    rate = number(group.get("rate", 0), f"{where}: rate")
    lengths = _lengths({**{k: top[k] for k in ("lengths", "prompt", "output") if k in top}, **group}, where, folder)
    windows = _arrivals(group.get("arrivals", "poisson"), where, folder, count, duration)
    skew = number(group.get("zipf", 0), f"{where}: zipf")
    weights = [i**-skew * _mean_rate(w, duration) for i, w in enumerate(windows, 1)]
    total = sum(weights)
    if not total:
        raise InvalidRequest(
            f"{where}: the ServeGen clients send nothing in these {duration:g} s; choose another start."
        )
    ranks = group.get("rank", 16)
    ranks = ranks if isinstance(ranks, list) and ranks else [ranks]
    scope = as_scope(group.get("scope"), f"{where}: scope") or Scope.ALL
    name = str(group.get("name", "adapter"))
    sources = []
    for i in range(count):
        factor = rate * count / total * (i + 1) ** -skew
        rank = number(ranks[i % len(ranks)], f"{where}: rank", whole=True, least=1)
        label = name if "count" not in group else f"{name}-{i}"
        sources.append(
            _Source(
                adapter=None if base else Adapter(name=label, rank=rank, scope=scope),
                rate=rate * count / total * weights[i],
                windows=[w._replace(rate=w.rate * factor) for w in windows[i]],
                lengths=lengths,
            )
        )
    return sources


def _arrivals(value: object, where: str, folder: Path, count: int, duration: float) -> list[list[Window]]:
    """For each of `count` adapters its windows, the rates of a poisson or gamma process 1."""
    kind, rest = value, {}
    if isinstance(value, dict) and value:
        kind, rest = next(iter(value)), value
    if kind == "poisson":
        return [[Window(0.0, 1.0, 1.0, "", 1.0)]] * count
    if kind == "gamma":
        cv = number(rest.get("gamma"), f"{where}: the coefficient of variation of gamma", least=1e-3)
        return [[Window(0.0, 1.0, cv, "Gamma", cv**-2)]] * count
    if kind != "servegen":
        raise InvalidRequest(
            f"{where}: arrivals is {value!r}; it must be poisson, {{gamma: CV}} or {{servegen: FOLDER}}."
        )
    source = folder / str(rest["servegen"])
    files = sorted(source.glob("chunk-*-trace.csv"), key=lambda p: (len(p.name), p.name))
    clients = [windows for windows in map(read_servegen, files) if any(w.rate for w in windows)]
    if not clients:
        raise InvalidRequest(f"{where}: {source} holds no ServeGen clients (chunk-*-trace.csv) that send anything.")
    start = number(rest.get("start", 0), f"{where}: start")
    # More adapters than clients: further adapters are the same clients, later.
    return [_cut(clients[i % len(clients)], start + i // len(clients) * duration, duration) for i in range(count)]


def _cut(windows: Sequence[Window], start: float, duration: float) -> list[Window]:
    """A client's windows of [start, start + duration), moved to time 0; behind its end comes its beginning again."""
    width = windows[1].start - windows[0].start
    first, found = int(start // width), []
    for i in range(first, int((start + duration) // width) + 1):
        found.append(windows[i % len(windows)]._replace(start=max(0.0, i * width - start)))
    return found


def _mean_rate(windows: Sequence[Window], duration: float) -> float:
    ends = [*(w.start for w in windows[1:]), duration]
    return sum(w.rate * max(0.0, min(end, duration) - w.start) for w, end in zip(windows, ends, strict=True)) / duration


def _lengths(fields: Mapping[str, Any], where: str, folder: Path) -> Lengths:
    if "lengths" in fields:
        rows = [(r.prompt_len, r.output_len) for r in read_workload(folder / str(fields["lengths"])).requests]
        return lambda rng: rng.choice(rows)
    prompt = _length(fields.get("prompt", 512), f"{where}: prompt")
    output = _length(fields.get("output", 128), f"{where}: output")
    return lambda rng: (prompt(rng), output(rng))


def _length(value: object, where: str) -> Callable[[Random], int]:
    """A number, or {uniform: [low, high]}, {normal: [mean, std]}, {lognormal: [mean, std]}, with min and max."""
    if not isinstance(value, Mapping):
        fixed = number(value, where, whole=True, least=1)
        return lambda rng: fixed
    fields = _mapping(value, where, {*SHAPES, "min", "max"})
    shape = next((s for s in SHAPES if s in fields), None)
    pair = fields[shape] if shape else None
    if not isinstance(pair, list) or len(pair) != 2:
        raise InvalidRequest(f"{where} is {dict(value)!r}; it must be a number or one of {', '.join(SHAPES)}: [a, b].")
    a, b = (number(x, where) for x in pair)
    least = number(fields.get("min", 1), f"{where}: min", whole=True, least=1)
    most = number(fields.get("max", MAX_LEN), f"{where}: max", whole=True, least=least)
    if shape == "lognormal":
        if not a:
            raise InvalidRequest(f"{where}: the mean of a lognormal length must be above 0.")
        sigma = sqrt(log(1 + (b / a) ** 2))
        mu = log(a) - sigma**2 / 2
        return lambda rng: min(most, max(least, round(rng.lognormvariate(mu, sigma))))
    draw = Random.uniform if shape == "uniform" else Random.normalvariate
    return lambda rng: min(most, max(least, round(draw(rng, a, b))))


def _trace(top: Mapping[str, Any], folder: Path) -> list[Arrival]:
    if "trace" not in top:
        return []
    speed = number(top.get("speed", 1), "speed", least=1e-6)
    return [r._replace(time=r.time / speed) for r in read_workload(folder / str(top["trace"])).requests]


def _spread(trace: list[Arrival], sources: Sequence[_Source], duration: float, rng: Random) -> Iterator[Arrival]:
    """The trace's requests, each given to an adapter with a probability in proportion to its rate."""
    rates = list(accumulate(s.rate or 0.0 for s in sources))
    if not rates or not rates[-1]:
        raise InvalidRequest("A trace is spread over the adapters by their rates; give adapters (or base) with rates.")
    names = [s.adapter.name if s.adapter else None for s in sources]
    for r in trace:
        if r.time <= duration:
            yield r._replace(adapter=rng.choices(names, cum_weights=rates)[0])


def _mapping(data: object, where: str, known: set[str]) -> Mapping[str, Any]:
    if not isinstance(data, Mapping):
        raise InvalidRequest(f"{where} must map names to values, got {data!r:.80}.", param="workload")
    if unknown := [key for key in data if key not in known]:
        raise InvalidRequest(f"{where} has no {unknown[0]!r}; it can have {', '.join(sorted(known))}.")
    return data


def _list(top: Mapping[str, Any], key: str) -> list[Any]:
    value = top.get(key, [])
    if not isinstance(value, list):
        raise InvalidRequest(f"{key} must be a list, got {value!r:.80}.", param="workload")
    return value
