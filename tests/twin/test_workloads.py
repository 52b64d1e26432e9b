"""Traces, descriptions and profiles: what is read, and what is refused with which words."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from statistics import mean, pstdev

import pytest

from multigraft.core.errors import CapacityExceeded, InvalidRequest
from multigraft.core.region import Scope
from multigraft.twin.describe import describe, read_workload
from multigraft.twin.profile import Profile
from multigraft.twin.workload import Adapter, Arrival, TrainingJob, Workload, prompt_tokens
from tests.twin.made import PROFILES, poisson

AZURE = "TIMESTAMP,ContextTokens,GeneratedTokens\n"


def write(folder: Path, name: str, text: str) -> Path:
    path = folder / name
    path.write_text(text)
    return path


def test_a_saved_workload_comes_back(tmp_path: Path) -> None:
    adapters = (Adapter(name="a", rank=8, scope=Scope.PREFILL), Adapter(name="b", nbytes=99))
    requests = (Arrival(0.5, "a", 10, 2), Arrival(0.75, None, 600, 1, (7,)))
    workload = Workload(name="w", adapters=adapters, requests=requests, jobs=(TrainingJob(name="j", tokens=5),))
    workload.save(tmp_path / "w.jsonl")
    assert read_workload(tmp_path / "w.jsonl") == workload


def test_azure(tmp_path: Path) -> None:
    rows = "2023-11-16 18:15:46.6805900,374,44\n2023-11-16 18:15:50.9951690,396,109\n"
    workload = read_workload(write(tmp_path, "a.csv", AZURE + rows))
    assert [r[2:4] for r in workload.requests] == [(374, 44), (396, 109)]
    assert [r.time for r in workload.requests] == pytest.approx([0, 4.314579])


def test_mooncake(tmp_path: Path) -> None:
    row = {"timestamp": 27482, "input_length": 6955, "output_length": 52, "hash_ids": [46, 47]}
    workload = read_workload(write(tmp_path, "m.jsonl", json.dumps(row)))
    assert workload.requests == (Arrival(27.482, None, 6955, 52, (46, 47)),)


def test_prompts_agree_as_far_as_their_prefix_ids() -> None:
    a, b = (prompt_tokens(i, Arrival(0, None, 1200, 1, prefix), 300) for i, prefix in enumerate([(1, 2), (1, 3)]))
    assert a[:512] == b[:512] and a[512:520] != b[512:520] and len(a) == len(b) == 1200


def test_description_has_the_rates_it_asks_for(tmp_path: Path) -> None:
    group = {"name": "g", "count": 4, "rank": [8, 64], "scope": "prefill", "rate": 2.0, "zipf": 1.0}
    text = json.dumps({"duration": 500, "seed": 1, "adapters": [group], "base": {"rate": 1.0}, "slo": {"ttft": 2}})
    workload = read_workload(write(tmp_path, "d.json", text))
    counts = {name: sum(r.adapter == name for r in workload.requests) for name in ("g-0", "g-1", "g-3", None)}
    total = 1 + 1 / 2 + 1 / 3 + 1 / 4
    for name, want in (("g-0", 4000 / total), ("g-1", 2000 / total), ("g-3", 1000 / total), (None, 500)):
        assert abs(counts[name] - want) < 5 * math.sqrt(want), name
    assert [a.rank for a in workload.adapters] == [8, 64, 8, 64] and workload.adapters[0].scope is Scope.PREFILL
    assert workload.slo.ttft == 2
    assert read_workload(tmp_path / "d.json") == workload, "the seed settles all"


def test_bursts_have_the_variation_they_ask_for() -> None:
    adapter = {"name": "g", "rate": 5.0, "arrivals": {"gamma": 3.0}, "prompt": {"lognormal": [300, 200]}}
    workload = describe({"duration": 4000, "adapters": [adapter]})
    times = [r.time for r in workload.requests]
    gaps = [b - a for a, b in pairwise(times)]
    assert pstdev(gaps) / mean(gaps) == pytest.approx(3.0, rel=0.1)
    lengths = [r.prompt_len for r in workload.requests]
    assert mean(lengths) == pytest.approx(300, rel=0.05) and pstdev(lengths) == pytest.approx(200, rel=0.1)


def test_servegen_clients_keep_their_skew(tmp_path: Path) -> None:
    for i, rate in enumerate((9.0, 1.0)):
        rows = "".join(f"{600 * w},{rate * (w == 1)},1.0,Gamma,1.0,1.0\n" for w in range(3))
        write(tmp_path, f"chunk-{i}-trace.csv", rows)
    group = {"name": "g", "count": 2, "rate": 1.0, "arrivals": {"servegen": ".", "start": 300}}
    workload = describe({"duration": 900, "adapters": [group]}, folder=tmp_path)
    counts = [sum(r.adapter == f"g-{i}" for r in workload.requests) for i in range(2)]
    assert counts[0] + counts[1] == pytest.approx(1800, abs=200) and counts[0] == pytest.approx(9 * counts[1], rel=0.4)
    assert min(r.time for r in workload.requests) > 300, "the first window, of which 300 s are left, is silent"


def test_a_trace_is_spread_over_adapters(tmp_path: Path) -> None:
    rows = "".join(f"2023-11-16 18:15:{s:02}.0,100,10\n" for s in range(60))
    write(tmp_path, "a.csv", AZURE + rows * 1)
    adapters = [{"name": "hot", "rate": 9}, {"name": "cold", "rate": 1}]
    workload = describe({"trace": "a.csv", "speed": 2, "adapters": adapters}, folder=tmp_path)
    assert len(workload.requests) == 60 and workload.duration == 29.5
    assert sum(r.adapter == "hot" for r in workload.requests) > 40


HEAD = json.dumps({"workload": "w", "adapters": [{"name": "a"}]}) + "\n"
ROW = {"time": 0, "adapter": "a", "prompt_len": 1, "output_len": 1}


@pytest.mark.parametrize(
    ("name", "text", "says"),
    [
        ("t.csv", "TIMESTAMP,ContextTokens\n2023-11-16 18:15:46.68,374\n", "line 1: GeneratedTokens is missing"),
        ("t.csv", AZURE + "2023-11-16 18:15:46.68,-3,4\n", "line 2: ContextTokens is '-3'; it must be a whole number"),
        ("t.csv", AZURE + "yesterday,3,4\n", "TIMESTAMP is 'yesterday'"),
        ("t.csv", AZURE, "has no requests"),
        ("t.jsonl", HEAD + json.dumps(ROW | {"time": -1}), "line 2: time is -1; it must be a number of 0 or more"),
        ("t.jsonl", HEAD + json.dumps(ROW | {"adapter": "nobody"}), "names adapter 'nobody', which the workload does"),
        ("t.jsonl", HEAD + json.dumps({"time": 0}), "line 2: prompt_len, output_len is missing"),
        ("t.jsonl", HEAD + "{", "line 2 is not JSON"),
        ("t.jsonl", '{"a": 1}\n', "neither a workload of ours"),
        ("t.jsonl", '{"timestamp": "x", "input_length": 1, "output_length": 1}', "timestamp is 'x'"),
        (
            "t.jsonl",
            json.dumps({"workload": "w", "adapters": [{"nmae": "a"}]}),
            "has no field 'nmae'; it can have name",
        ),
        (
            "t.jsonl",
            json.dumps({"workload": "w", "adapters": [{"name": "a", "rank": 0}]}),
            "rank 0; it must be at least",
        ),
        ("t.yaml", "duration: 10\nadapters:\n- {rates: 3}\n", "adapters[0] has no 'rates'; it can have arrivals"),
        ("t.yaml", "duration: 10\nadapters: [{rate: fast}]\n", "adapters[0]: rate is 'fast'; it must be a number"),
        ("t.yaml", "duration: 10\nadapters: [{rate: 1, scope: some}]\n", "scope is 'some'"),
        ("t.yaml", "duration: 10\nadapters: [{rate: 1, arrivals: {weird: 2}}]\n", "it must be poisson, {gamma: CV}"),
        ("t.yaml", "duration: 10\nadapters: [{rate: 1, arrivals: {servegen: nowhere}}]\n", "holds no ServeGen clients"),
        (
            "t.yaml",
            "duration: 10\nadapters: [{rate: 1, prompt: {normal: 3}}]\n",
            "it must be a number or one of uniform",
        ),
        ("t.yaml", "adapters: []\n", "needs a duration above 0"),
        ("t.yaml", "- a\n", "The workload must map names to values"),
        ("t.yaml", "a: [\n", "cannot be parsed"),
        ("t.txt", "", "must end in .yaml"),
    ],
)
def test_bad_input_is_named(tmp_path: Path, name: str, text: str, says: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        read_workload(write(tmp_path, name, text))
    assert says in str(caught.value)


def test_profiles(tmp_path: Path) -> None:
    made = PROFILES[0]
    made.save(tmp_path / "p.json")
    assert Profile.load(tmp_path / "p.json") == made
    there = made.differences({"device": "H100"}, {"torch": "2.13"})
    assert there == ["device: none in the profile, H100 here", "torch: None in the profile, 2.13 here"]
    few, many = made.deployment(max_loras=1), made.deployment(max_loras=100)
    assert (few.kv_tokens - many.kv_tokens) * made.memory.kv_token == pytest.approx(99 * 16 * 2**16, rel=0.01)
    with pytest.raises(CapacityExceeded, match="Lower max_loras"):
        made.deployment(max_loras=2000)


@pytest.mark.parametrize(
    ("text", "says"),
    [("{", "not JSON"), ("[]", "multigraft calibrate"), ('{"format": 1}', "incomplete"), (None, "Cannot read")],
)
def test_bad_profiles_are_refused(tmp_path: Path, text: str | None, says: str) -> None:
    path = tmp_path / "p.json"
    if text is not None:
        path.write_text(text)
    with pytest.raises(InvalidRequest, match=says):
        Profile.load(path)


@pytest.mark.parametrize("num_jobs", [0, 1, 4])
def test_a_hundred_adapters_run_a_thousand_times_faster_than_real_time(num_jobs: int) -> None:
    """Of CPU time, on one core; the slack of 2 is for slow machines."""
    import time

    from multigraft.twin.simulate import simulate

    jobs = tuple(TrainingJob(name=f"j{i}", tokens=10**9, microbatch=256, start=10.0 * i) for i in range(num_jobs))
    workload = replace(poisson(100, 0.003, 1200, 0, 1155, 211), jobs=jobs)
    start = time.process_time()
    record = simulate(workload, PROFILES[1], PROFILES[1].deployment(max_loras=32))
    assert record.seconds / (time.process_time() - start) > 500
