"""The manager over its store: failures that stay with their job, restarts, memory, names, trackers."""

import asyncio
import errno
import json
import sys
import types
from contextlib import asynccontextmanager

import pytest
from safetensors import SafetensorError

from multigraft.core.config import TrainingConfig
from multigraft.core.errors import InvalidRequest, StorageFull
from multigraft.core.training import FINE_TUNE, JobRequest, JobStatus, WandbRun
from multigraft.training import lifecycle, store
from multigraft.training.manager import TrainingManager, training_folder
from multigraft.training.pace import Pace
from tests.training.plain_engine import PlainEngine

pytestmark = pytest.mark.anyio


@pytest.fixture
def anyio_backend():
    return "asyncio"


@pytest.fixture
def engine():
    engine = PlainEngine()
    yield engine
    engine.close()


@asynccontextmanager
async def opened(engine, folder, **config):
    manager = await TrainingManager.open(engine, TrainingConfig(**config), folder)
    try:
        yield manager
    finally:
        await manager.close()


async def add_file(manager, n=8):
    upload = await manager.upload()
    for i in range(n):
        messages = [{"role": "user", "content": f"q{i}"}, {"role": "assistant", "content": "yes" * (i % 3 + 1)}]
        await upload.write(json.dumps({"messages": messages}).encode() + b"\n")
    return await upload.finish("data.jsonl", FINE_TUNE)


async def create(manager, file, wandb=None, seed=1, **hyperparameters):
    values = {"n_epochs": 2, "batch_size": 4} | hyperparameters
    request = JobRequest(model="org/base", training_file=file.id, hyperparameters=values, seed=seed, wandb=wandb)
    return await manager.create(request)


async def until(manager, job, *statuses):
    async with asyncio.timeout(30):
        while True:
            got = await manager.job(job.id)
            if got.status in statuses:
                return got
            assert not got.status.final, got
            await asyncio.sleep(0.005)


async def messages(manager, job):
    return [e.message for e in (await manager.events(job.id, limit=1000)).data]


async def test_a_diverging_job_fails_alone(engine, tmp_path):
    async with opened(engine, tmp_path) as manager:
        file = await add_file(manager)
        engine.delay = 0.005
        bad, good = await create(manager, file), await create(manager, file)
        engine.diverge_at[bad.id] = 2
        bad = await until(manager, bad, JobStatus.FAILED)
        assert bad.error.code == "job_failed" and "diverged" in bad.error.message and bad.step == 2
        await until(manager, good, JobStatus.SUCCEEDED)
        assert manager.stats().jobs == {JobStatus.FAILED: 1, JobStatus.SUCCEEDED: 1}
        # What it had reached is still there.
        [checkpoint] = (await manager.checkpoints(bad.id)).data
        assert (await manager.adapter_folder(bad.id, checkpoint.id)).is_dir()


@pytest.mark.parametrize("by_hand", [False, True])
async def test_a_data_file_removed_meanwhile(engine, tmp_path, by_hand):
    engine.delay = 0.02
    async with opened(engine, tmp_path, max_training_jobs=1) as manager:
        kept, removed = await add_file(manager), await add_file(manager)
        first, second = await create(manager, kept), await create(manager, removed)
        await until(manager, second, JobStatus.QUEUED)
        if by_hand:
            (await manager.file_path(removed.id)).unlink()
        else:
            await manager.delete_file(removed.id)
        second = await until(manager, second, JobStatus.FAILED)
        assert removed.id in second.error.message and second.error.param == "training_file"
        await until(manager, first, JobStatus.SUCCEEDED)


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, "No space left on device"),
        SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)"),
    ],
)
async def test_a_full_disk_at_a_checkpoint(engine, tmp_path, monkeypatch, error):
    async with opened(engine, tmp_path) as manager:
        file = await add_file(manager)
        move, full = store.move, []

        def full_for_one(source, target):
            if full and full[0].id in str(target):
                raise error
            move(source, target)

        monkeypatch.setattr(store, "move", full_for_one)
        engine.delay = 0.005
        bad, good = await create(manager, file), await create(manager, file)
        full.append(bad)
        bad = await until(manager, bad, JobStatus.FAILED)
        assert bad.error.code == "storage_full" and "No space left" in bad.error.message
        assert not list(tmp_path.glob(f"jobs/{bad.id}/checkpoints/*"))
        await until(manager, good, JobStatus.SUCCEEDED)
        assert not engine.running


async def test_a_full_database(engine, tmp_path, monkeypatch):
    """The job stops; that it has failed is stored as soon as there is room."""
    monkeypatch.setattr(lifecycle, "RETRY_SECONDS", 0.02)
    async with opened(engine, tmp_path) as manager:
        file = await add_file(manager)
        engine.delay = 0.005
        job = await create(manager, file, n_epochs=300)
        await until(manager, job, JobStatus.RUNNING)
        db, refused = manager._store._db, []
        [pages] = db.execute("PRAGMA page_count").fetchone()
        db.execute(f"PRAGMA max_page_count = {pages}")
        update_job = manager._store.update_job

        def update_while_there_is_room(*args, **columns):
            if not engine.running and len(refused) < 3:  # what the failed step needed may be enough for the failure
                refused.append(columns)
                raise StorageFull("full")
            update_job(*args, **columns)

        monkeypatch.setattr(manager._store, "update_job", update_while_there_is_room)
        job = await until(manager, job, JobStatus.FAILED)
        assert "database or disk is full" in job.error.message and len(refused) == 3
        db.execute(f"PRAGMA max_page_count = {pages + 1000}")
        await until(manager, await create(manager, file), JobStatus.SUCCEEDED)


async def test_a_full_disk_at_an_upload(engine, tmp_path, monkeypatch):
    def full(handle):
        raise OSError(errno.ENOSPC, "No space left on device")

    async with opened(engine, tmp_path) as manager:
        upload = await manager.upload()
        monkeypatch.setattr(store.os, "fsync", full)
        with pytest.raises(StorageFull):
            await upload.finish("a", FINE_TUNE)
        await upload.discard()
        assert list((tmp_path / "uploads").iterdir()) == []


async def test_a_restart_goes_on(engine, tmp_path):
    """Running, queued and paused jobs; the losses are those of jobs that were not interrupted."""
    hyperparameters = {"n_epochs": 5, "checkpoint_steps": 100}
    async with opened(engine, tmp_path / "whole") as manager:
        whole = await until(
            manager, await create(manager, await add_file(manager), **hyperparameters), JobStatus.SUCCEEDED
        )
        table = (await manager.file_path(whole.result_files[0])).read_text()

    engine.delay = 0.01
    async with opened(engine, tmp_path / "cut", max_training_jobs=1) as manager:
        file = await add_file(manager)
        jobs = [await create(manager, file, **hyperparameters) for _ in range(3)]
        assert (await manager.pause(jobs[2].id)).status is JobStatus.PAUSED
        while (await until(manager, jobs[0], JobStatus.RUNNING)).step < 3:
            await asyncio.sleep(0.005)
    assert not engine.running
    engine.delay = 0
    async with opened(engine, tmp_path / "cut") as manager:
        for job in jobs[:2]:
            job = await until(manager, job, JobStatus.SUCCEEDED)
            assert (await manager.file_path(job.result_files[0])).read_text() == table
            assert job.trained_tokens == whole.trained_tokens
        assert (await manager.job(jobs[2].id)).status is JobStatus.PAUSED
        await manager.resume(jobs[2].id)
        await until(manager, jobs[2], JobStatus.SUCCEEDED)

    engine.published.clear()
    async with opened(engine, tmp_path / "cut") as manager:
        names = {(await manager.job(job.id)).fine_tuned_model for job in jobs}
        assert names <= set(engine.published) and len(names) == 3
        assert all((folder / "adapter_config.json").is_file() for folder in engine.published.values())
        assert manager.stats().jobs == {JobStatus.SUCCEEDED: 3}


async def test_an_engine_that_dies(engine, tmp_path):
    engine.delay = 0.01
    async with opened(engine, tmp_path) as manager:
        job = await create(manager, await add_file(manager), n_epochs=5, checkpoint_steps=2)
        while not (await manager.checkpoints(job.id)).data:
            await asyncio.sleep(0.005)
        await asyncio.to_thread(engine.close)
        await asyncio.sleep(0.1)
        assert (await manager.job(job.id)).status is JobStatus.RUNNING
    other = PlainEngine()
    async with opened(other, tmp_path) as manager:
        assert (await until(manager, job, JobStatus.SUCCEEDED)).step == 10
    other.close()


async def test_what_no_process_may_share(engine, tmp_path):
    async with opened(engine, tmp_path):
        with pytest.raises(InvalidRequest, match="--data-dir"):
            await TrainingManager.open(engine, TrainingConfig(), tmp_path)
    async with opened(engine, tmp_path):
        pass
    assert training_folder(tmp_path, "org/base").parent == tmp_path / "training"
    assert training_folder(tmp_path, "org/base") != training_folder(tmp_path, "base")


async def test_jobs_wait_for_memory_and_can_be_stopped_there(engine, tmp_path):
    engine.room, engine.delay = 1, 0.01
    async with opened(engine, tmp_path) as manager:
        file = await add_file(manager)
        jobs = [await create(manager, file) for _ in range(3)]
        await until(manager, jobs[0], JobStatus.RUNNING)
        await until(manager, jobs[1], JobStatus.QUEUED)
        assert (await manager.cancel(jobs[1].id)).status is JobStatus.CANCELLED
        for job in (jobs[0], jobs[2]):
            await until(manager, job, JobStatus.SUCCEEDED)
        assert engine.most_running == 1


async def test_cancel_at_once(engine, tmp_path):
    async with opened(engine, tmp_path) as manager:
        file = await add_file(manager, 300)
        job = await create(manager, file)
        assert (await manager.cancel(job.id)).status is JobStatus.CANCELLED
        assert (await manager.job(job.id)).status is JobStatus.CANCELLED
        assert (await messages(manager, job))[0] == "The job is cancelled"


async def test_old_checkpoints_go(engine, tmp_path):
    """The newest two stay, the best, and one that a request used when its turn to go came."""
    async with opened(engine, tmp_path, keep_checkpoints=2) as manager:
        train, valid = await add_file(manager), await add_file(manager, 3)
        request = JobRequest(
            model="org/base",
            training_file=train.id,
            validation_file=valid.id,
            hyperparameters={"n_epochs": 4, "batch_size": 4, "learning_rate": 1.0, "schedule": "constant"}
            | {"checkpoint_steps": 1, "eval_interval": 1},
            seed=1,
        )
        engine.delay = 0.01
        job = await manager.create(request)
        while not (found := (await manager.checkpoints(job.id)).data):
            await asyncio.sleep(0.002)
        engine.in_use.add(found[-1].model)
        job = await until(manager, job, JobStatus.SUCCEEDED)
        events = (await manager.events(job.id, limit=1000)).data
        losses = {e.data["step"]: e.data["valid_loss"] for e in events if e.data and "valid_loss" in e.data}
        best = min(losses, key=losses.get)
        steps = {c.step for c in (await manager.checkpoints(job.id)).data}
        assert steps == {found[-1].step, best, 7, 8} and len(losses) == 8
        folders = {int(path.name) for path in tmp_path.glob("jobs/*/checkpoints/*")}
        assert folders == steps
        assert set(engine.published) == {job.fine_tuned_model} | {
            f"{job.fine_tuned_model}:ckpt-step-{s}" for s in steps
        }
        gone = [e.message for e in events if "removed" in e.message]
        assert len(gone) == 8 - len(steps) and all("newest 2 and the best are kept" in text for text in gone)
        step = next(e.data for e in events if e.data and "train_loss" in e.data)
        assert {"grad_norm", "learning_rate", "tokens", "step_seconds", "train_mean_token_accuracy"} <= set(step)
        assert 0 < step["budget_granted"] <= 1


async def test_commands_at_the_same_time(engine, tmp_path):
    engine.delay = 0.01
    async with opened(engine, tmp_path) as manager:
        job = await create(manager, await add_file(manager), n_epochs=50)
        await until(manager, job, JobStatus.RUNNING)
        results = await asyncio.gather(*(manager.cancel(job.id) for _ in range(3)), return_exceptions=True)
        assert sorted(isinstance(r, InvalidRequest) for r in results) == [False, True, True]
        assert (await messages(manager, job)).count("The job is cancelled") == 1


def test_pace_by_hand():
    times = iter((0.0, 2.0, 6.0))
    pace = Pace(3.0, clock=lambda: next(times))
    assert pace.seconds_for(5) is None
    assert pace.observe(1, 10, 3.5) == {"step_seconds": 2.0, "tokens_per_second": 5.0, "budget_granted": 0.25}
    assert pace.seconds_for(5) == 10.0
    assert pace.observe(4, 40, 9.5) == {"step_seconds": 1.0, "tokens_per_second": 10.0, "budget_granted": 1.0}
    assert pace.seconds_for(10) == pytest.approx(19.0)


class FakeRun:
    def __init__(self, fail_at=None):
        self.logged, self.finished, self.fail_at = [], False, fail_at

    def log(self, metrics, step):
        if step == self.fail_at:
            raise ConnectionError("wandb is away")
        self.logged.append((step, metrics))

    def finish(self):
        self.finished = True


@pytest.mark.parametrize("fail_at", [None, 2])
async def test_trackers(engine, tmp_path, monkeypatch, fail_at):
    run, scalars = FakeRun(fail_at), []

    class SummaryWriter:
        def __init__(self, folder):
            self.folder = folder

        def add_scalar(self, name, value, step):
            scalars.append((self.folder, name, step))

        def close(self):
            pass

    settings = {}
    wandb = types.SimpleNamespace(init=lambda **kwargs: settings.update(kwargs) or run, __spec__="there")
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    monkeypatch.setitem(sys.modules, "tensorboard", types.SimpleNamespace(__spec__="there"))
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", types.SimpleNamespace(SummaryWriter=SummaryWriter))
    async with opened(engine, tmp_path) as manager:
        job = await create(manager, await add_file(manager), wandb=WandbRun(project="p", tags=("t",)))
        await until(manager, job, JobStatus.SUCCEEDED)
        assert (settings["project"], settings["name"], settings["tags"]) == ("p", job.id, ["t"])
        warnings = [m for m in await messages(manager, job) if "no longer sent" in m]
    if fail_at is None:
        assert [step for step, _ in run.logged] == [1, 2, 3, 4] and run.finished and not warnings
        assert {name for _, name, _ in scalars} >= {"train_loss", "learning_rate"}
        assert {folder for folder, _, _ in scalars} == {str(tmp_path / "jobs" / job.id / "tensorboard")}
    else:
        assert [step for step, _ in run.logged] == [1]
        assert len(warnings) == 1 and "wandb is away" in warnings[0]


async def test_wandb_that_is_not_installed(engine, tmp_path, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    async with opened(engine, tmp_path) as manager:
        with pytest.raises(InvalidRequest, match="pip install wandb"):
            await create(manager, await add_file(manager), wandb=WandbRun(project="p"))
