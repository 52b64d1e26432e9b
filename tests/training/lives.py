"""Processes that fine-tune and are killed. Reads from stdin a list of lives, one after the other:

{"folder": where the store is, "die": [where, n, "before" or "after"] or null}

`where` is "module:name" of something in multigraft.training; the process is killed (-9) at its n-th call. A life begins
with the job that its folder holds or, in an empty one, with a new job. Prints for each life a line of JSON: the signal
that ended it, or what came of the job.
"""

import asyncio
import functools
import importlib
import inspect
import json
import os
import signal
import sys
from pathlib import Path

from multigraft.core.config import TrainingConfig
from multigraft.core.training import FINE_TUNE, JobRequest
from multigraft.training.manager import TrainingManager
from tests.training.plain_engine import PlainEngine

TURNS = ("yes", "no", "maybe so", "who knows")


def die_at(where: str, n: int, when: str) -> None:
    module, _, path = where.partition(":")
    owner = importlib.import_module(f"multigraft.training.{module}")
    *names, last = path.split(".")
    for name in names:
        owner = getattr(owner, name)
    original = getattr(owner, last)
    calls = 0

    def die() -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    def enter() -> bool:
        nonlocal calls
        calls += 1
        if calls == n and when == "before":
            die()
        return calls == n

    @functools.wraps(original)
    def call(*args, **kwargs):
        last = enter()
        result = original(*args, **kwargs)
        return die() if last else result

    @functools.wraps(original)
    async def call_async(*args, **kwargs):
        last = enter()
        result = await original(*args, **kwargs)
        return die() if last else result

    setattr(owner, last, call_async if inspect.iscoroutinefunction(original) else call)


async def live(folder: Path) -> dict:
    engine = PlainEngine()
    manager = await TrainingManager.open(engine, TrainingConfig(), folder)
    jobs = (await manager.jobs()).data
    if jobs:
        [job] = jobs
    else:
        upload = await manager.upload()
        for i in range(6):
            answer = {"role": "assistant", "content": TURNS[i % 4]}
            line = {"messages": [{"role": "user", "content": f"q{i}"}, answer]}
            await upload.write(json.dumps(line).encode() + b"\n")
        file = await upload.finish("data.jsonl", FINE_TUNE)
        job = await manager.create(
            JobRequest(
                model=engine.model_name,
                training_file=file.id,
                validation_file=file.id,
                hyperparameters={
                    "n_epochs": 3, "batch_size": 2, "checkpoint_steps": 2, "eval_interval": 4, "learning_rate": 0.01,
                },
                adapter={"dropout": 0.1},
                seed=5,
            )
        )  # fmt: skip
    while not job.status.final:
        await asyncio.sleep(0.01)
        job = await manager.job(job.id)
    results = [(await manager.file_path(file)).read_text() for file in job.result_files]
    adapter = (await manager.adapter_folder(job.id) / "adapter_model.safetensors").read_bytes()
    ended = {
        "status": job.status.value,
        "results": results,
        "adapter": adapter.hex(),
        "tokens": job.trained_tokens,
        "published": sorted(name.replace(job.id[-8:], "ID") for name in engine.published),
        "events": [event.message for event in (await manager.events(job.id, limit=1000)).data],
        "checkpoints": [c.step for c in (await manager.checkpoints(job.id)).data],
        "files": len(list((folder / "files").iterdir())),
        "states": len(list(folder.glob("jobs/*/checkpoints/*/state"))),
        "partial": len(list(folder.glob("jobs/*/checkpoints/*.partial"))),
    }
    await manager.close()
    return ended


def main() -> None:
    """Forks each life before this process has run anything of torch, so that the imports are paid once."""
    for life in json.load(sys.stdin):
        pid = os.fork()
        if not pid:
            if life["die"]:
                die_at(*life["die"])
            print(json.dumps(asyncio.run(live(Path(life["folder"])))), flush=True)
            os._exit(0)
        _, status = os.waitpid(pid, 0)
        if os.WIFSIGNALED(status):
            print(json.dumps({"signal": os.WTERMSIG(status)}), flush=True)
        assert os.WIFSIGNALED(status) or not os.WEXITSTATUS(status)


main()
