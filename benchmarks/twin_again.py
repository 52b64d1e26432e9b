"""The twin of today against measurements that were kept: how a change of its models would have done on a GPU run.

A folder has what twin_accuracy --keep left: profile.json, points.jsonl.gz (what the profile was fit to) and
measured.json (its results). Simulates the same workloads three times: with the profile as it was; with the
step-time model of today fit to the same points; and with reads that share the memory besides (--read-sharing), which
those profiles were made too early for. Errors are relative to the measurement. No model and no GPU needed.

    python -m benchmarks.twin_again benchmarks/results/twin_h200/a benchmarks/results/twin_h200/b
        --data DATA_FOLDER --read-sharing 0.35 [--save]
"""

from __future__ import annotations

import argparse
import gzip
import json
import statistics
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks.common import finish
from benchmarks.twin_accuracy import GOALS, Slowness, capacity_of, deployment, workloads
from multigraft.calibration.speed import calm
from multigraft.core.config import EngineConfig, TrainingConfig
from multigraft.engine.offline import make_config
from multigraft.scheduling.steptime import StepShape, StepTimeModel
from multigraft.twin.compare import value
from multigraft.twin.profile import Profile
from multigraft.twin.report import report
from multigraft.twin.simulate import simulate

SECONDS, MICROBATCH = 6.0, 1024
"""Of the runs that were kept, the second where a line does not say; the engine's flags are in `as_measured`."""


def as_measured() -> EngineConfig:
    config = make_config(
        "random-8b",
        device="cpu",
        kv_cache_gib=8,
        adapter_memory_gib=6,
        max_loras=32,
        max_num_seqs=256,
        max_num_batched_tokens=2048,
    )
    return replace(config, training=TrainingConfig(train_memory_gib=8))


def fit_again(points: Path) -> StepTimeModel:
    """As calibrate fits it: to the points during which the machine was not disturbed."""
    with gzip.open(points, "rt") as file:
        found = [json.loads(line) for line in file]
    steps = [
        step
        for point, counted in zip(found, calm([tuple(point["probe"]) for point in found]), strict=True)
        for step in point["steps"]
        if counted
    ]
    seconds = [step.pop("seconds") for step in steps]
    return StepTimeModel.fit([StepShape(**step) for step in steps], seconds)


def rows_of(folder: Path, data: Path | None, read_sharing: float) -> Iterator[dict[str, Any]]:
    config, then = as_measured(), Profile.load(folder / "profile.json")
    measured = json.loads((folder / "measured.json").read_text())
    microbatch = measured.get("microbatch", MICROBATCH)
    today = replace(then, steps=fit_again(folder / "points.jsonl.gz"))
    twins = {"then": then, "today": today}
    if read_sharing:
        twins["shared reads"] = replace(today, loads=replace(today.loads, read_sharing=read_sharing))
    capacity = measured.get("capacity") or capacity_of(then, config)
    named = {w.name: w for w in workloads(SECONDS, capacity, data, microbatch)}
    for was in measured["rows"]:
        workload = named[was["workload"]]
        if len(workload.requests) != was["requests"]:
            raise SystemExit(f"{workload.name} has {len(workload.requests)} requests, measured were {was['requests']}")
        sizes = {a.rank: then.adapter_bytes(a.rank) for a in workload.adapters}
        workload = replace(workload, adapters=tuple(replace(a, nbytes=sizes[a.rank]) for a in workload.adapters))
        slowness = Slowness(was.get("slowness_decodes", 1.0), was.get("slowness_prompts", 1.0))
        for name, profile in twins.items():
            profile = replace(profile, steps=slowness.of(profile.steps))
            again = report(simulate(workload, profile, deployment(profile, config)))
            errors = {f"{goal}_error": value(again, goal) / was[goal] - 1 for goal in GOALS if goal in was}
            yield {"run": folder.name, "workload": workload.name, "twin": name, **errors}


def show(rows: list[dict[str, Any]]) -> None:
    table = Table("run", "workload", "twin", *GOALS)
    for row in rows:
        errors = (row.get(f"{goal}_error") for goal in GOALS)
        table.add_row(row["run"], row["workload"], row["twin"], *("" if e is None else f"{e:+.1%}" for e in errors))
    for name in dict.fromkeys(row["twin"] for row in rows):
        for title, of in (("mean", statistics.mean), ("worst", max)):
            keys = [f"{goal}_error" for goal in GOALS]
            mine = [[abs(row[key]) for row in rows if row["twin"] == name and key in row] for key in keys]
            table.add_row("all", title, name, *(f"{of(errors):.1%}" if errors else "" for errors in mine))
    Console(width=110).print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", type=Path, nargs="+")
    parser.add_argument("--data", type=Path, help="holds servegen-m-small, as it did when they were measured")
    parser.add_argument("--read-sharing", type=float, default=0.0, help="see twin.profile.LoadTimes")
    parser.add_argument("--save", action="store_true")
    args = parser.parse_args()
    rows = [row for folder in args.folders for row in rows_of(folder, args.data, args.read_sharing)]
    show(rows)
    finish("twin_again", {"read_sharing": args.read_sharing}, rows, save=args.save)


if __name__ == "__main__":
    main()
