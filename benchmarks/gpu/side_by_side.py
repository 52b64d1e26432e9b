"""Benchmarks side by side on the GPUs of one host, where a machine is lent for minutes.

Each JOB is GPUS:SECONDS:COMMAND, COMMAND being a module of this repository and its arguments. Jobs of the same GPUs run
one after the other, with these GPUs visible and their share of the cores; a job whose GPUs others of more wait for, or
that waits for such, is in their line, too (so "0,1" and then "0" and "1" is in order). Nothing runs for longer than its
SECONDS, nor than --limit: a benchmark that is cut off saves what it has. Output goes to $OUT/NAME.log, NAME being the
job's number and module; a line says when a job ends, and how.

    OUT=/tmp/out python -m benchmarks.gpu.side_by_side --limit 400 \\
        "0,1:120:benchmarks.tp --lora-ranks 16 --save" \\
        "0:200:benchmarks.gpu.serve --runs base lora:8:64 --save" "1:100:benchmarks.gpu.lora_kernels --only few --save"
"""

from __future__ import annotations

import argparse
import os
import shlex
import subprocess
import sys
import threading
import time
from dataclasses import dataclass
from pathlib import Path

from multigraft.core.cores import my_cores


@dataclass(frozen=True)
class Job:
    number: int
    gpus: tuple[int, ...]
    seconds: float
    command: tuple[str, ...]

    @classmethod
    def parse(cls, number: int, text: str) -> Job:
        try:
            gpus, seconds, command = text.split(":", 2)
            job = cls(number, tuple(map(int, gpus.split(","))), float(seconds), tuple(shlex.split(command)))
        except ValueError:
            sys.exit(f"{text!r} is not GPUS:SECONDS:COMMAND, such as 0,1:120:benchmarks.tp --save")
        return job

    @property
    def name(self) -> str:
        return f"{self.number}-{self.command[0].rpartition('.')[2]}"


def run(job: Job, folder: Path, deadline: float, cores: set[int], began: float) -> None:
    """Until it ends or is cut off."""
    limit = min(job.seconds, deadline - time.monotonic())
    if limit < 1:
        print(f"{job.name}: not begun, no time is left", flush=True)
        return
    environment = os.environ | {"CUDA_VISIBLE_DEVICES": ",".join(map(str, job.gpus))}
    with (folder / f"{job.name}.log").open("w") as log:
        process = subprocess.Popen(
            ["timeout", "-k", "10", str(limit), sys.executable, "-m", *job.command],
            env=environment,
            stdout=log,
            stderr=subprocess.STDOUT,
            preexec_fn=lambda: os.sched_setaffinity(0, cores),
        )
        status = process.wait()
    how = {0: "done", 124: "cut off", 137: "killed"}.get(status, f"status {status}")
    print(f"{job.name}: {how} after {time.monotonic() - began:.0f} s", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("jobs", nargs="+", metavar="JOB")
    parser.add_argument("--limit", type=float, default=540.0, help="seconds for all")
    args = parser.parse_args()
    began = time.monotonic()
    jobs = [Job.parse(number, text) for number, text in enumerate(args.jobs)]
    folder = Path(os.environ.get("OUT", "."))
    folder.mkdir(parents=True, exist_ok=True)
    cores = sorted(my_cores())
    share = len(cores) // (1 + max(gpu for job in jobs for gpu in job.gpus))
    ended = [threading.Event() for _ in jobs]

    def start(job: Job) -> None:
        for other in jobs[: job.number]:
            if set(other.gpus) & set(job.gpus):
                ended[other.number].wait()
        mine = {core for gpu in job.gpus for core in cores[gpu * share : (gpu + 1) * share]}
        try:
            run(job, folder, began + args.limit, mine or set(cores), began)
        finally:
            ended[job.number].set()

    threads = [threading.Thread(target=start, args=(job,)) for job in jobs]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


if __name__ == "__main__":
    main()
