"""kill -9 wherever something is about to be stored, or just has been: the next process ends with the same losses."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
POINTS = [
    ["store:TrainingStore.add_job", 1, "before"],
    ["store:TrainingStore.add_job", 1, "after"],
    ["store:TrainingStore.update_job", 1, "after"],  # validated
    ["job:TrainingJob.done", 1, "after"],
    ["lifecycle:JobRun._record", 1, "after"],
    ["engine:Snapshot.write", 1, "before"],
    ["state:JobState.save", 2, "after"],
    ["store:move", 2, "after"],  # 1 is the upload: the first checkpoint
    ["store:move", 3, "before"],
    ["store:move", 3, "after"],
    ["store:TrainingStore._drop_states", 2, "before"],
    ["store:TrainingStore.add_checkpoint", 2, "after"],
    ["store:TrainingStore.add_checkpoint", 5, "after"],  # the last
    ["store:TrainingStore.place", 1, "after"],  # the upload
    ["store:TrainingStore.place", 2, "after"],  # the results
    ["store:TrainingStore.drop_state", 1, "before"],
]


def run_lives(lives):
    env = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-m", "tests.training.lives"],
        input=json.dumps(lives), env=env, cwd=ROOT, capture_output=True, text=True, timeout=200,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    return [json.loads(line) for line in done.stdout.splitlines()]


def test_kills(tmp_path):
    lives = [{"folder": str(tmp_path / "whole"), "die": None}]
    for i, point in enumerate(POINTS):
        lives += [{"folder": str(tmp_path / str(i)), "die": die} for die in (point, None)]
    # And one job that is killed again and again.
    again = [["lifecycle:JobRun._record", n, "after"] for n in (4, 3, 2)] + [None]
    lives += [{"folder": str(tmp_path / "again"), "die": die} for die in again]
    whole, *ends = run_lives(lives)
    assert whole["status"] == "succeeded" and whole["results"][0].count("\n") == 10
    assert whole["states"] == whole["partial"] == 0 and whole["files"] == 2
    assert whole["published"][0] == "ft:base:multigraft::ID" and len(whole["published"]) == 6
    assert whole["checkpoints"] == [9, 8, 6, 4, 2]

    same = ("status", "results", "adapter", "tokens", "published", "checkpoints", "states", "partial")
    for life, end in zip(lives[1:], ends, strict=True):
        if life["die"]:
            assert end == {"signal": signal.SIGKILL}, life
            continue
        assert {name: end[name] for name in same} == {name: whole[name] for name in same}, life
        first = life["folder"].endswith("/0")  # killed when its file was stored and it was not
        assert end["files"] == whole["files"] + first
    went_on = [end for end in ends if any("started again" in message for message in end.get("events", ()))]
    assert len(went_on) == len(POINTS) - 3 + 1  # in two there was no job yet, in one it had ended
