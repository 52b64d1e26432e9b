"""`multigraft train` in process and against a server on a socket; the jobs are real ones on a tiny model."""

import asyncio
import contextlib
import json
import sys
import threading
import types
from pathlib import Path

import pytest
from typer.main import get_command
from typer.testing import CliRunner

from multigraft.cli.main import app
from multigraft.core.config import EngineConfig, ModelConfig, ServerConfig
from multigraft.core.training import JobRequest
from multigraft.server import serve
from multigraft.training.manager import TrainingManager
from tests.server.fake_engine import FakeEngine
from tests.training.plain_engine import PlainEngine


@pytest.fixture
def data(tmp_path):
    path = tmp_path / "data.jsonl"
    lines = [
        {"messages": [{"role": "user", "content": f"q{i}"}, {"role": "assistant", "content": "yes"}]} for i in range(8)
    ]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


class TrainingEngine(FakeEngine):
    """FakeEngine that trains, with what it was started with."""

    @classmethod
    async def start(cls, config):
        engine = cls()
        engine.config = config
        started.append(engine)
        return engine

    async def open_training(self):
        self.plain = PlainEngine()
        self.plain.model_name = self.model_name
        self.training = await TrainingManager.open(self.plain, self.config.training, self.config.data_dir)

    async def shutdown(self, grace_s):
        await self.training.close()
        self.plain.close()
        await super().shutdown(grace_s)


started: list[TrainingEngine] = []


@pytest.fixture
def train(monkeypatch):
    started.clear()
    monkeypatch.setitem(
        sys.modules, "multigraft.engine.async_engine", types.SimpleNamespace(AsyncEngine=TrainingEngine)
    )
    monkeypatch.setattr("multigraft.cli.progress.POLL_SECONDS", 0.02)

    def call(*arguments):
        return CliRunner().invoke(app, ["train", *map(str, arguments)], env={"COLUMNS": "200"})

    return call


@pytest.fixture
def server(tmp_path):
    """The URL of one on a thread."""
    ready, loop = threading.Event(), asyncio.new_event_loop()
    urls = []

    async def run():
        engine = await TrainingEngine.start(EngineConfig(model=ModelConfig(model="m"), data_dir=tmp_path / "server"))
        await engine.open_training()
        config = ServerConfig(port=0, api_key=("secret",))
        await serve(engine, config, on_ready=lambda url: (urls.append(url), ready.set()))

    def main():
        task = loop.create_task(run())
        stop.append(lambda: loop.call_soon_threadsafe(task.cancel))
        with contextlib.suppress(asyncio.CancelledError):
            loop.run_until_complete(task)

    stop = []
    thread = threading.Thread(target=main)
    thread.start()
    assert ready.wait(20)
    yield urls[0]
    stop[0]()
    thread.join()


ARGUMENTS = (
    "--n-epochs", 2, "--batch-size", 4, "--adapter-method", "rslora", "--r", 4, "--target-modules", "q_proj",
    "--target-modules", "v_proj", "--layers", 0, "--scope", "prefill", "--seed", 3, "--suffix", "s", "--weight", 2,
    "--set", "schedule=cosine", "--set", "warmup-steps=1",
)  # fmt: skip


def test_in_process(train, data, tmp_path):
    arguments = (*ARGUMENTS, "--validation", data, "--output", tmp_path / "out", "--data-dir", tmp_path / "state")
    result = train("base", data, *arguments, "--train-memory-gib", 1.5, "--dtype", "float32")
    assert result.exit_code == 0, result.output
    for words in ("Step 4/4: training loss=", "validation loss=", "Trained: ft:base:multigraft:s:", " tok/s"):
        assert words in result.output
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert (config["r"], config["use_rslora"], config["adapter_scope"]) == (4, True, "prefill")
    assert (sorted(config["target_modules"]), config["layers_to_transform"]) == (["q_proj", "v_proj"], [0])
    assert (tmp_path / "out" / "adapter_model.safetensors").is_file()
    [engine] = started
    assert engine.shutdowns and engine.config.training.train_memory_gib == 1.5
    assert engine.config.model.dtype == "float32"
    assert list(engine.plain.weights.values()) == [2.0]


def test_on_a_server(train, server, data, tmp_path):
    arguments = (*ARGUMENTS, "--server", server, "--api-key", "secret")
    result = train("base", data, *arguments, "--validation", data, "--output", tmp_path / "out")
    assert result.exit_code == 0, result.output
    assert "Step 4/4: training loss=" in result.output
    assert json.loads((tmp_path / "out" / "adapter_config.json").read_text())["r"] == 4
    assert (tmp_path / "out" / "adapter_model.safetensors").is_file()
    [engine] = started  # the server's
    [name] = [n for n in engine.plain.published if "ckpt" not in n]
    job = next(iter(engine.plain.weights))
    assert name == f"ft:base:multigraft:s:{job[-8:]}" and f"Trained: {name}" in result.output
    again = train("base", "--follow", job, "--server", server + "/v1", "--api-key", "secret")
    assert again.exit_code == 0 and "Step 4/4" in again.output
    more = train("base", data, "--start", name, "--n-epochs", 1, "--server", server, "--api-key", "secret")
    assert more.exit_code == 0 and "Trained: ft:base:multigraft::" in more.output
    refused = train("base", data, "--start", name, "--r", 8, "--server", server, "--api-key", "secret")
    assert refused.exit_code == 2 and "goes on from has 4" in refused.output


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--n-epochs", 0], "n_epochs is 0; it must be an integer from 1 to 1000"),
        (["--set", "schedule"], "--set schedule: it must be as name=value."),
        (["--set", "colour=red"], "there is no such setting"),
        (["--follow", "ftjob-1"], "either DATA, for a new job, or --follow JOB"),
        (["--validation", "none.jsonl"], "Cannot read none.jsonl: No such file"),
        (["--output", "."], "is there already"),
        (["--server", "http://127.0.0.1:9"], "Cannot reach http://127.0.0.1:9"),
    ],
)
def test_a_users_mistake_is_one_line(train, data, tmp_path, arguments, words):
    result = train("base", data, "--data-dir", tmp_path / "state", *arguments)
    assert result.exit_code == 2
    assert result.output.startswith("Error: ") and words in result.output and result.output.count("\n") == 1


def test_a_servers_refusals_are_its_words(train, server, data):
    for key, words in (("wrong", "A valid API key is needed"), ("secret", "n_epochs is 0; it must be")):
        result = train("base", data, "--n-epochs", 0, "--server", server, "--api-key", key)
        assert result.exit_code == 2 and words in result.output


def test_a_job_that_fails(train, tmp_path):
    bad = tmp_path / "bad.jsonl"
    bad.write_text('{"messages": []}\n')
    result = train("base", bad, "--data-dir", tmp_path / "state")
    assert result.exit_code == 1
    assert "Line 1: messages must be a list of messages" in result.output


def test_a_job_of_an_earlier_process_goes_on(train, data, tmp_path):
    async def leave_unfinished():
        engine = await TrainingEngine.start(EngineConfig(model=ModelConfig(model="m"), data_dir=tmp_path / "state"))
        await engine.open_training()
        engine.plain.delay = 0.02
        upload = await engine.training.upload()
        await upload.write(data.read_bytes())
        file = await upload.finish("data.jsonl", "fine-tune")
        job = await engine.training.create(
            JobRequest(model="base", training_file=file.id, hyperparameters={"n_epochs": 20, "batch_size": 4})
        )
        while (await engine.training.job(job.id)).step < 2:
            await asyncio.sleep(0.01)
        await engine.shutdown(0)
        return job.id

    job_id = asyncio.run(leave_unfinished())
    result = train("base", "--follow", job_id, "--data-dir", tmp_path / "state")
    assert result.exit_code == 0, result.output
    assert "goes on from its last checkpoint" in result.output and "Step 40/40" in result.output


def test_frozen_flags():
    params = get_command(app).commands["train"].params
    lines = [f"{' '.join([*p.opts, *p.secondary_opts])} = {p.default}" for p in params if "--help" not in p.opts]
    assert lines == (Path(__file__).parent / "train_flags.txt").read_text().splitlines()
