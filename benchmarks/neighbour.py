"""Decoding on the CPU beside a process that keeps one core busy, by threads: what waiting for all of them costs.

Four answers of 16 tokens, the second of two runs, in a process of its own for each setting. CPU time over wall time
tells how many cores the process had.

    python -m benchmarks.neighbour MODEL_FOLDER [--save]
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks.common import finish
from multigraft import Engine, SamplingParams

ALL = str(os.cpu_count() or 1)
SETTINGS = {
    "as the others leave": {},
    "all": {"OMP_NUM_THREADS": ALL},
    "one": {"OMP_NUM_THREADS": "1"},
    "all, passive": {"OMP_NUM_THREADS": ALL, "OMP_WAIT_POLICY": "passive"},
    "all, 1,000 spins": {"OMP_NUM_THREADS": ALL, "GOMP_SPINCOUNT": "1000"},
}
"""Environments of the measured process. Without a number the engine chooses by itself (engine.neighbours)."""


def measure(model: str) -> dict[str, float]:
    sampling = SamplingParams(temperature=0.0, max_tokens=16, ignore_eos=True)
    with Engine(model, max_loras=0) as engine:
        for _ in range(2):
            wall, cpu = time.perf_counter(), time.process_time()
            engine.generate(["Hello there"] * 4, sampling)
            wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    return {"seconds": wall, "cores": cpu / wall}


def spin() -> None:
    while True:
        pass


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--one", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--save", action="store_true")
    args = parser.parse_args()
    if args.one:
        print(json.dumps(measure(str(args.model))))
        return
    rows: list[dict[str, Any]] = []
    for busy in (False, True):
        neighbour = multiprocessing.Process(target=spin, daemon=True)
        if busy:
            neighbour.start()
        for name, env in SETTINGS.items():
            command = [sys.executable, "-m", "benchmarks.neighbour", str(args.model), "--one"]
            done = subprocess.run(command, env=os.environ | env, stdout=subprocess.PIPE, text=True, check=True)
            rows.append({"threads": name, "neighbour": busy} | json.loads(done.stdout.splitlines()[-1]))
        if busy:
            neighbour.terminate()
    table = Table("threads", "alone", "cores", "beside a busy process", "cores")
    for alone, beside in zip(rows[: len(SETTINGS)], rows[len(SETTINGS) :], strict=True):
        cells = [f"{r[k]:.2f}" for r in (alone, beside) for k in ("seconds", "cores")]
        table.add_row(alone["threads"], *cells)
    Console().print(table)
    finish("neighbour", {"cores": os.cpu_count()}, rows, save=args.save)


if __name__ == "__main__":
    main()
