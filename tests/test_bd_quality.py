"""A small run of the study of BD-LoRA's quality, in two calls."""

from __future__ import annotations

import json
import statistics
from pathlib import Path

import pytest

pytest.importorskip("matplotlib")

from benchmarks import bd_quality
from tests.tiny import build_checkpoint


def test_a_study_goes_on_where_it_was_cut_off(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = build_checkpoint(tmp_path / "model", "llama")
    for name in ("train", "test"):
        rows = [{"question": f"What is {i} and {i} in {name}?", "answer": f"It is {2 * i}."} for i in range(8)]
        (tmp_path / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    sizes = {"steps": "2", "batch": "2", "held-out": "2", "rank": "4", "nblocks": "2", "equal": "2", "rates": "0.01"}
    flags = [text for name, value in sizes.items() for text in (f"--{name}", value)]
    files = [
        "--train",
        str(tmp_path / "train"),
        "--test",
        str(tmp_path / "test"),
        "--runs",
        str(tmp_path / "runs.jsonl"),
    ]
    command = [str(model), *files, *flags, "--seeds", "0", "1", "--plot", str(tmp_path / "plot.png")]
    done = tmp_path / "runs.jsonl"

    bd_quality.main([*command, "--seconds", "0"])
    assert "more are left" in capsys.readouterr().out
    assert [json.loads(line)["nblocks"] for line in done.read_text().splitlines()] == [1]  # the learning rate's
    bd_quality.main(command)
    record = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert len(done.read_text().splitlines()) == 1 + 2 * 3 and (tmp_path / "plot.png").exists()

    lora, matched, equal = record["summary"]
    assert (lora["nblocks"], matched["nblocks"], equal["nblocks"]) == (1, 2, 2)
    assert equal["rank"] == lora["rank"] < matched["rank"]
    assert equal["parameters"] < matched["parameters"] and abs(matched["parameters"] / lora["parameters"] - 1) < 0.2
    for row in record["summary"]:
        runs = [r for r in record["rows"] if (r["nblocks"], r["rank"]) == (row["nblocks"], row["rank"])]
        base = {r["seed"]: r["loss"] for r in record["rows"] if r["nblocks"] == 1}
        assert row["loss"] == pytest.approx(statistics.mean(r["loss"] for r in runs), abs=1e-4)
        assert row["more"] == pytest.approx(statistics.mean(r["loss"] - base[r["seed"]] for r in runs), abs=1e-4)
    assert len({r["loss"] for r in record["rows"]}) == 6  # no two runs are the same
