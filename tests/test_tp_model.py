"""The projection of tensor-parallel placements: a run of it, and that it reads measurements by itself."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

pytest.importorskip("matplotlib")

from benchmarks import tp_model
from benchmarks.common import RESULTS
from benchmarks.tp_parts import WHOLE_8B, Cost, Parts

GPU = {"machine": "NVIDIA H200", "date": "2026-01-01"}
RUN = ["--models", "8b", "--sizes", "2", "8", "--lora-ranks", "16", "--batches", "1", "256"]


@pytest.fixture
def results(tmp_path: Path) -> Path:
    shutil.copy(RESULTS / "lora_kernels.jsonl", tmp_path)
    return tmp_path


def write(folder: Path, name: str, **line: object) -> None:
    with (folder / f"{name}.jsonl").open("a") as file:
        file.write(json.dumps(GPU | line) + "\n")


def test_a_run_ends_in_one_line_of_json(results: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tp_model.main([*RUN, "--results", str(results), "--plot", str(results / "plot.png")])
    record = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert (results / "plot.png").exists()
    assert [(r["gpus"], r["batch"]) for r in record["rows"]] == [(n, b) for n in (2, 8) for b in (1, 256, "prefill")]
    for row in record["rows"]:
        assert 0 < row["s-lora"] < 1 and 0 < row["replicated"] <= row["block-diagonal"] < 1
    assert {check["placement"] for check in record["checks"]} == {"base", "block-diagonal", "replicated"}


def test_measured_rows_are_compared_with(results: Path) -> None:
    """What the model itself says, as a measurement, is off by nothing; twice as much by half."""
    parts = Parts("H200", results)
    step = tp_model.Step(parts=parts, config=tp_model.config_of("8b"), size=2, rows=64, adapters=4)
    rows = [
        {"placement": "base", "rank": None, "batch": 64, "step_ms": step.ms()},
        {"placement": "s-lora", "rank": 16, "batch": 64, "step_ms": 2 * step.ms("s-lora", 16)},
    ]
    write(results, "tp", model="8b", size=2, layers=32, adapters=4, rows=rows)
    write(results, "tp", machine="CPU x86_64", rows=[])
    base, other = (r for r in tp_model.validate(results) if r["source"].startswith("tp.jsonl"))
    assert base["error"] == pytest.approx(0) and other["error"] == pytest.approx(-0.5)
    assert other["added_predicted_ms"] == pytest.approx(step.ms("s-lora", 16) - step.ms())


def test_measured_collectives_take_the_place_of_the_model(results: Path) -> None:
    modelled = Parts("H200", results)
    rows = [{"kind": "all_reduce", "bytes": 2**k, "us": 10.0 * 2 ** (k - 10)} for k in (10, 12)]
    write(results, "tp_collectives", size=2, rows=rows)
    parts = Parts("H200", results)
    assert parts.collective("all_reduce", 2**11, 2) == pytest.approx(20)
    assert parts.collective("all_reduce", 2**13, 2) == pytest.approx(80)
    assert parts.collective("all_reduce", 2**8, 2) == pytest.approx(10)
    assert parts.collective("all_reduce", 2**11, 8) == modelled.collective("all_reduce", 2**11, 8)
    assert [measured for what, _, measured in parts.sources if what.startswith("collectives")] == [True, False]


def test_measured_kernels_take_the_place_of_the_log(results: Path) -> None:
    true = Cost(3.0, 4e-7, 2e-9)
    rows = []
    for site, num_ranks, num_rows in (("qkv", 1, 16), ("o", 2, 64), ("down", 8, 256), ("gate_up", 2, 2)):
        n_in, outs = tp_model.Layer(WHOLE_8B.config, num_ranks).site(site)
        for rank in (16, 64):
            sizes = tp_model.lora_sizes(n_in, outs, rank, rank, 4, num_rows)
            row = {"kind": "tp", "site": site, "num_ranks": num_ranks, "rows": num_rows, "adapters": 4, "rank": rank}
            rows.append(row | {"block_m": 4, "us": true.us(2, *sizes)})
    write(results, "lora_kernels", rows=rows)
    assert Parts("H200", results).adapters == pytest.approx(true)
    assert Parts("H100", results).adapters.byte == pytest.approx(4e-7 * 4.8 / 3.35)


def test_block_diagonal_exchanges_nothing_and_reads_a_share(results: Path) -> None:
    parts = Parts("H200", results)
    step = tp_model.Step(parts=parts, config=tp_model.config_of("70b"), size=8, rows=256, adapters=4)
    times = {placement: step.times(placement, 64) for placement in ("base", "block-diagonal", "replicated", "s-lora")}
    for placement in ("block-diagonal", "replicated"):
        assert times[placement]["exchanges"] == 0
        assert {k: times[placement][k] for k in times["base"]} == times["base"]
    assert times["s-lora"]["exchanges"] > 0
    assert times["block-diagonal"]["adapters"] < times["replicated"]["adapters"]
