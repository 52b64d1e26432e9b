"""The projection of tensor-parallel placements: a run of it, and that it reads measurements by itself."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("matplotlib")

from benchmarks import tp_model
from benchmarks.common import RESULTS
from benchmarks.tp_parts import SITES, WHOLE_8B, Cost, Parts

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
    base, other = measured(results)
    assert base["error"] == pytest.approx(0) and other["error"] == pytest.approx(-0.5)
    assert other["added_predicted_ms"] == pytest.approx(step.ms("s-lora", 16) - step.ms())
    assert other["of_base"] == pytest.approx(step.ms() / step.ms("s-lora", 16) / 2)


def measured(folder: Path) -> list[dict[str, Any]]:
    return [r for r in tp_model.validate(folder) if r["source"].startswith("tp.jsonl")]


def test_a_base_slower_than_adapted_steps_is_not_compared_with(results: Path) -> None:
    def write_run(base: float, adapted: float) -> None:
        for placement, rank, ms in (("base", None, base), ("replicated", 16, adapted)):
            row = {"placement": placement, "rank": rank, "batch": 64, "step_ms": ms}
            write(results, "tp", model="8b", size=2, layers=32, adapters=4, rows=[row])

    write_run(6.0, 5.0)
    base, adapted = measured(results)
    assert base["disturbed"] and adapted["disturbed"]
    assert adapted["of_base"] == pytest.approx(4.48 / 5.0)  # docs/log.md's, as there is no other
    write_run(4.5, 5.4)
    write_run(4.0, 5.2)
    rows = [r for r in measured(results) if r["placement"] != "base"]
    assert [r["disturbed"] for r in rows] == [True, False, False]
    assert [r["of_base"] for r in rows] == pytest.approx([4.0 / 5.0, 4.5 / 5.4, 4.0 / 5.2])
    assert len({r["source"] for r in rows}) == 3


def test_decode_steps_spare_what_is_not_waited_for(results: Path) -> None:
    parts = Parts("H200", results)
    step = tp_model.Step(parts=parts, config=tp_model.config_of("8b"), size=2, rows=16, adapters=4)
    waiting, layers = replace(step, beside=False), step.config.num_hidden_layers
    for placement in ("block-diagonal", "replicated"):
        spared = waiting.times(placement, 16)["adapters"] - step.times(placement, 16)["adapters"]
        assert spared == pytest.approx(layers * 4 * parts.spared(16, 16)) and spared > 0
    high = waiting.times("replicated", 64)["adapters"] - step.times("replicated", 64)["adapters"]
    assert high == pytest.approx(layers * 4 * parts.spared(16, 64)) and 0 < high < spared
    assert waiting.times("s-lora", 16) == step.times("s-lora", 16)
    prompts = replace(step, rows=4096, prompt=32)
    assert replace(prompts, beside=False).times("replicated", 16) == prompts.times("replicated", 16)


def test_measured_collectives_take_the_place_of_the_model(results: Path) -> None:
    modelled = Parts("H200", results)
    rows = [{"kind": "all_reduce", "bytes": 2**k, "us": 10.0 * 2 ** (k - 10)} for k in (10, 12)]
    write(results, "tp_collectives", size=2, rows=rows)
    parts = Parts("H200", results)
    assert parts.collective("all_reduce", 2**11, 2) == pytest.approx(20)
    assert parts.collective("all_reduce", 2**13, 2) == pytest.approx(80)
    assert parts.collective("all_reduce", 2**8, 2) == pytest.approx(10)
    off = 20 / modelled.collective("all_reduce", 2**11, 2)
    assert parts.collective("all_reduce", 2**11, 8) == pytest.approx(off * modelled.collective("all_reduce", 2**11, 8))
    assert [measured for what, _, measured in parts.sources if what.startswith("collectives")] == [True, False]


def test_measured_kernels_take_the_place_of_the_log(results: Path) -> None:
    true = Cost(3.0, 4e-7, 2e-9)
    rows = []
    for site, num_ranks, num_rows in (("qkv", 1, 16), ("o", 2, 64), ("down", 8, 256), ("gate_up", 2, 2)):
        n_in, outs = tp_model.Layer(WHOLE_8B.config, num_ranks).site(site)
        for rank in (16, 64):
            sizes = tp_model.lora_sizes(n_in, outs, rank, rank, 4, num_rows)
            row = {"kind": "tp", "site": site, "num_ranks": num_ranks, "rows": num_rows, "adapters": 4, "rank": rank}
            rows.append(row | {"us": true.us(*sizes)})
    product = Cost(0.0, 3e-7, 1e-9)
    for num_rows, adapters, spared in (
        (2, 1, {"beside_us": 2.0, "one_kernel_us": 8.0}),
        (64, 4, {"beside_us": 4.0}),
    ):
        sites = [(s, WHOLE_8B.site(s)) for s in SITES]
        at = (16, 16, adapters, num_rows)
        serial = sum(true.us(*tp_model.lora_sizes(*site, *at, in_swiglu=s == "gate_up")) for s, site in sites)
        weights = sum(n_in * sum(outs) for _, (n_in, outs) in sites)
        base = product.us(0, 2 * weights + 6 * num_rows * 14336, 2 * num_rows * weights)
        base += Parts("H200", results).small_kernel
        row = {"kind": "layer", "rows": num_rows, "adapters": adapters, "rank": 16, "base_us": base}
        rows.append(row | {"serial_us": serial} | {way: serial - us for way, us in spared.items()})
    write(results, "lora_kernels", rows=rows)
    parts = Parts("H200", results)
    assert parts.adapters == pytest.approx(true)
    found = [4 * parts.spared(rows, rank) for rows, rank in ((2, 16), (2, 17), (64, 16), (64, 64))]
    assert found == pytest.approx([8.0, 2.0, 4.0, 4.0])
    assert parts.product(4096, 4096, 16) == pytest.approx(product.us(0, 2 * 4096**2, 32 * 4096**2))
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
