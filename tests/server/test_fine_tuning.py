"""/v1/files and /v1/fine_tuning through the real openai client: real jobs on a tiny model beside a scripted engine."""

import asyncio
import csv
import io
import json
import shutil
import zipfile

import httpx
import openai as openai_sdk
import peft
import pytest
import torch

from multigraft.core.config import ServerConfig, TrainingConfig
from multigraft.server import create_app
from multigraft.training.manager import TrainingManager
from tests.tiny import tiny_model
from tests.training.plain_engine import PlainEngine

pytestmark = pytest.mark.anyio


def chats(n, answer="yes"):
    lines = [
        {"messages": [{"role": "user", "content": f"q{i}"}, {"role": "assistant", "content": answer}]} for i in range(n)
    ]
    return "".join(json.dumps(line) + "\n" for line in lines).encode()


@pytest.fixture
async def training(engine, tmp_path, anyio_backend):
    plain = PlainEngine(publish=engine.load_adapter)
    plain.model_name = engine.model_name
    manager = engine.training = await TrainingManager.open(plain, TrainingConfig(max_training_jobs=2), tmp_path)
    manager.plain = plain
    yield manager
    await manager.close()
    plain.close()


@pytest.fixture
async def http(training, engine, anyio_backend):
    transport = httpx.ASGITransport(create_app(engine, ServerConfig()), raise_app_exceptions=False)
    async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
        yield client


async def upload(openai, content, name="data.jsonl"):
    return await openai.files.create(file=(name, content), purpose="fine-tune")


async def until(openai, job, *statuses):
    async with asyncio.timeout(30):
        while True:
            got = await openai.fine_tuning.jobs.retrieve(job.id)
            if got.status in statuses:
                return got
            assert got.status not in ("failed", "succeeded", "cancelled"), got
            await asyncio.sleep(0.01)


JSON = {"Content-Type": "application/json"}
SMALL = {"n_epochs": 2, "batch_size": 4}
SUPERVISED = {"type": "supervised", "supervised": {"hyperparameters": SMALL}}


async def create(openai, file, *, model="base", **fields):
    hyperparameters = SMALL | fields.pop("hyperparameters", {})
    method = {"type": "supervised", "supervised": {"hyperparameters": hyperparameters}}
    job = await openai.fine_tuning.jobs.create(model=model, training_file=file.id, method=method, **fields)
    return strictly(job)


def strictly(shown):
    """What the client takes as it comes, checked against its own types."""
    return type(shown).model_validate(shown.to_dict(mode="json"))


async def test_files(openai):
    one = await upload(openai, chats(3), "a.jsonl")
    two = await upload(openai, chats(5), "b é.jsonl")
    assert (one.object, one.bytes, one.filename, one.purpose) == ("file", len(chats(3)), "a.jsonl", "fine-tune")
    assert (await openai.files.retrieve(two.id)).filename == "b é.jsonl"
    assert (await openai.files.content(one.id)).read() == chats(3)
    assert [f.id async for f in openai.files.list()] == [two.id, one.id]
    assert [f.id async for f in openai.files.list(order="asc", limit=1)] == [one.id, two.id]
    assert [f.id async for f in openai.files.list(purpose="fine-tune-results")] == []
    assert (await openai.files.delete(one.id)).deleted
    with pytest.raises(openai_sdk.NotFoundError):
        await openai.files.retrieve(one.id)


async def test_a_job_from_data_to_served_model(openai, http, engine):
    train, valid = await upload(openai, chats(8)), await upload(openai, chats(3))
    job = await create(
        openai,
        train,
        validation_file=valid.id,
        suffix="my-style",
        seed=7,
        metadata={"team": "a"},
        hyperparameters={"n_epochs": 3, "checkpoint_steps": 4, "eval_interval": 3, "learning_rate": 0.01},
        extra_body={"adapter": {"method": "rslora", "r": 4}, "weight": 2.0},
    )
    assert (job.object, job.status, job.model, job.seed) == ("fine_tuning.job", "validating_files", "base", 7)
    assert job.fine_tuned_model is None and job.finished_at is None and job.error is None
    done = strictly(await until(openai, job, "succeeded"))
    assert done.fine_tuned_model == f"ft:base:multigraft:my-style:{job.id[-8:]}"
    assert done.metadata == {"team": "a"} and done.validation_file == valid.id
    assert done.hyperparameters.n_epochs == 3 and done.hyperparameters.batch_size == 4
    assert done.method.supervised.hyperparameters.learning_rate_multiplier == 1.0  # "auto" is written into the job
    assert done.method.supervised.hyperparameters.max_length == done.trained_tokens // (3 * 8)  # all are alike
    assert done.adapter["method"] == "rslora" and done.adapter["alpha"] == 16 and "positions" not in done.adapter
    assert done.finished_at >= done.created_at

    # Served under its name at once, and listed; so are its checkpoints.
    assert (await openai.models.retrieve(done.fine_tuned_model)).parent == "base"
    assert (await openai.completions.create(model=done.fine_tuned_model, prompt="a")).model == done.fine_tuned_model
    checkpoints = [strictly(c) async for c in openai.fine_tuning.jobs.checkpoints.list(job.id, limit=1)]
    assert [c.step_number for c in checkpoints] == [6, 4]
    assert checkpoints[0].fine_tuning_job_id == job.id
    assert checkpoints[0].metrics.full_valid_loss == checkpoints[0].metrics.valid_loss > 0
    assert (await openai.models.retrieve(checkpoints[1].fine_tuned_model_checkpoint)).parent == "base"

    events = [strictly(e) async for e in openai.fine_tuning.jobs.list_events(job.id, limit=3)]
    assert events[0].message == "The job has successfully completed" and events[0].type == "message"
    assert events[-1].message == f"Created fine-tuning job: {job.id}"
    losses = [e.data["train_loss"] for e in events if e.type == "metrics" and "train_loss" in e.data][::-1]
    assert len(losses) == 6 and losses[-1] < losses[0]
    assert any(e.message.startswith("Step 6/6: training loss=") for e in events)

    [results] = done.result_files
    assert (await openai.files.retrieve(results)).purpose == "fine-tune-results"
    table = list(csv.DictReader(io.StringIO((await openai.files.content(results)).text)))
    assert list(table[0]) == ["step", "train_loss", "train_accuracy", "valid_loss", "valid_mean_token_accuracy"]
    assert [float(row["train_loss"]) for row in table] == losses
    assert [row["step"] for row in table if row["valid_loss"]] == ["3", "6"]

    metrics = (await http.get("/metrics")).text
    assert 'multigraft:training_jobs{model_name="base",state="succeeded"} 1.0' in metrics
    assert f'multigraft:training_tokens_total{{model_name="base"}} {done.trained_tokens}.0' in metrics
    assert 'multigraft:training_steps_total{model_name="base"} 6.0' in metrics
    assert 'multigraft:training_granted_seconds_total{model_name="base"} ' in metrics


async def test_the_adapter_downloads_as_a_folder_for_peft(openai, http, training, tmp_path):
    job = await create(openai, await upload(openai, chats(4)), hyperparameters={"learning_rate": 0.01})
    early = await http.get(f"/v1/fine_tuning/jobs/{job.id}/adapter")
    assert early.status_code == 400 and "once it has succeeded" in early.json()["error"]["message"]
    done = await until(openai, job, "succeeded")
    reply = await http.get(f"/v1/fine_tuning/jobs/{job.id}/adapter")
    assert reply.status_code == 200, reply.text
    with zipfile.ZipFile(io.BytesIO(reply.content)) as archive:
        archive.extractall(tmp_path / "out")
    model = peft.PeftModel.from_pretrained(tiny_model("llama")[0], tmp_path / "out" / job.id)
    ids = torch.tensor([[5, 6, 7]])
    with torch.no_grad():
        adapted = model(ids).logits
        with model.disable_adapter():
            assert (model(ids).logits - adapted).abs().max() > 1e-3
    checkpoint = (await openai.fine_tuning.jobs.checkpoints.list(job.id)).data[0]
    other = await http.get(f"/v1/fine_tuning/jobs/{job.id}/checkpoints/{checkpoint.id}/adapter")
    assert zipfile.ZipFile(io.BytesIO(other.content)).namelist() == [
        f"{checkpoint.id}/adapter_config.json",
        f"{checkpoint.id}/adapter_model.safetensors",
    ]
    assert training.plain.published[done.fine_tuned_model].is_dir()


async def test_cancel(openai, http, training):
    training.plain.delay = 0.02
    file = await upload(openai, chats(8))
    job = await create(openai, file, hyperparameters={"n_epochs": 100})
    while (await until(openai, job, "running")).step < 2:
        await asyncio.sleep(0.01)
    metrics = (await http.get("/metrics")).text
    for name in ("loss", "token_accuracy", "grad_norm", "learning_rate", "step_seconds", "tokens_per_second"):
        assert f'multigraft:training_{name}{{job="{job.id}",model_name="base"}}' in metrics
    assert 'multigraft:training_jobs{model_name="base",state="running"} 1.0' in metrics
    cancelled = await openai.fine_tuning.jobs.cancel(job.id)
    assert cancelled.status == "cancelled" and cancelled.finished_at
    assert not training.plain.running
    for call in (openai.fine_tuning.jobs.cancel, openai.fine_tuning.jobs.pause, openai.fine_tuning.jobs.resume):
        with pytest.raises(openai_sdk.BadRequestError, match="already cancelled"):
            await call(job.id)


async def test_pause_and_resume(openai, training):
    """A paused job ends with the losses of one that was not."""
    file = await upload(openai, chats(8))
    fields = {"seed": 3, "hyperparameters": {"n_epochs": 4, "checkpoint_steps": 100}}
    whole = await until(openai, await create(openai, file, **fields), "succeeded")

    training.plain.delay = 0.02
    job = await create(openai, file, **fields)
    while (running := await until(openai, job, "running")).step < 3:
        await asyncio.sleep(0.01)
    assert running.estimated_finish is not None
    paused = await openai.fine_tuning.jobs.pause(job.id)
    assert paused.status == "paused" and paused.estimated_finish is None and 3 <= paused.step < 8
    assert not training.plain.running
    [checkpoint] = (await openai.fine_tuning.jobs.checkpoints.list(job.id)).data
    assert checkpoint.step_number == paused.step
    with pytest.raises(openai_sdk.BadRequestError, match="already paused"):
        await openai.fine_tuning.jobs.pause(job.id)
    training.plain.delay = 0
    assert (await openai.fine_tuning.jobs.resume(job.id)).status == "queued"
    done = await until(openai, job, "succeeded")
    tables = [(await openai.files.content(j.result_files[0])).text for j in (whole, done)]
    assert tables[0] == tables[1] and tables[0].count("\n") == 9
    assert done.trained_tokens == whole.trained_tokens


async def test_jobs_share_a_limit_and_are_listed(openai, training):
    training.plain.delay = 0.01
    file = await upload(openai, chats(8))
    jobs = [await create(openai, file, metadata={"n": str(i)}, extra_body={"weight": i + 1.0}) for i in range(4)]
    listed = [j.id async for j in openai.fine_tuning.jobs.list(limit=3)]
    assert listed == [j.id for j in jobs[::-1]]
    assert [j.id async for j in openai.fine_tuning.jobs.list(metadata={"n": "2"})] == [jobs[2].id]
    page = await openai.fine_tuning.jobs.list(limit=2, after=jobs[3].id)
    assert [j.id for j in page.data] == [jobs[2].id, jobs[1].id] and page.has_more
    for job in jobs:
        await until(openai, job, "succeeded")
    assert training.plain.most_running == 2
    assert [training.plain.weights[j.id] for j in jobs] == [1.0, 2.0, 3.0, 4.0]
    assert len({j.fine_tuned_model for j in (await openai.fine_tuning.jobs.list()).data}) == 4


async def test_a_job_goes_on_from_what_another_trained(openai, training, tmp_path):
    """`model` may be a trained adapter or a checkpoint, as OpenAI's may."""
    file = await upload(openai, chats(4))
    fields = {"validation_file": file.id, "hyperparameters": {"n_epochs": 4, "learning_rate": 0.01}}
    adapter = {"method": "loreft", "r": 2, "layers": [1]}
    first = await until(openai, await create(openai, file, **fields, extra_body={"adapter": adapter}), "succeeded")
    [checkpoint] = (await openai.fine_tuning.jobs.checkpoints.list(first.id)).data[:1]

    training.plain.delay = 0.02
    again = await create(openai, file, model=first.fine_tuned_model, suffix="more", **fields)
    assert again.model == first.fine_tuned_model and again.adapter == first.adapter
    while (await until(openai, again, "running")).step < 2:
        await asyncio.sleep(0.01)
    await openai.fine_tuning.jobs.pause(again.id)
    await openai.fine_tuning.jobs.resume(again.id)
    training.plain.delay = 0
    done = await until(openai, again, "succeeded")
    assert done.fine_tuned_model == f"ft:base:multigraft:more:{again.id[-8:]}"
    _, *steps = (await openai.files.content(done.result_files[0])).text.splitlines()
    # A step here sees all of the data: the first has the loss with which the other job ended.
    assert len(steps) == 4 and float(steps[0].split(",")[1]) == pytest.approx(checkpoint.metrics.valid_loss, rel=1e-6)
    assert float(steps[3].split(",")[3]) < checkpoint.metrics.valid_loss
    assert not list(tmp_path.glob("jobs/*/start"))

    name = checkpoint.fine_tuned_model_checkpoint
    await until(openai, await create(openai, file, model=name, extra_body={"adapter": {"r": 2}}), "succeeded")
    with pytest.raises(openai_sdk.BadRequestError, match="r is 4, but the adapter that the job goes on from has 2"):
        await create(openai, file, model=name, extra_body={"adapter": {"r": 4}})
    shutil.rmtree(tmp_path / "jobs" / first.id)
    with pytest.raises(openai_sdk.NotFoundError, match="has been removed from the disk"):
        await create(openai, file, model=name)


async def test_dpo(openai):
    lines = [
        {
            "input": {"messages": [{"role": "user", "content": f"q{i}"}]},
            "preferred_output": [{"role": "assistant", "content": "yes"}],
            "non_preferred_output": [{"role": "assistant", "content": "no way"}],
        }
        for i in range(4)
    ]
    file = await upload(openai, "".join(json.dumps(line) + "\n" for line in lines).encode())
    job = await openai.fine_tuning.jobs.create(
        model="base",
        training_file=file.id,
        method={"type": "dpo", "dpo": {"hyperparameters": SMALL | {"beta": 0.3}}},
        extra_body={"adapter": {"method": "loreft", "r": 2}},
    )
    done = await until(openai, job, "succeeded")
    assert done.method.type == "dpo" and done.method.dpo.hyperparameters.beta == 0.3
    assert done.method.supervised is None


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b'{"messages": []}\n', "Line 1: messages must be a list of messages"),
        (chats(2) + b"not json\n", "Line 3: not JSON"),
        (b"\xff\xfea", "UTF-16"),
        (b"", "empty"),
        (chats(1, answer="x" * 500), "longer than 128 tokens"),
    ],
)
async def test_bad_data_fails_the_job_alone(openai, content, words):
    good = await create(openai, await upload(openai, chats(4)))
    for files in ({"training": content}, {"training": chats(4), "validation": content}):
        uploads = {name: await upload(openai, data) for name, data in files.items()}
        fields = {"validation_file": uploads["validation"].id} if "validation" in files else {}
        job = await until(openai, await create(openai, uploads["training"], **fields), "failed")
        assert words in job.error.message
        assert job.error.param == ("validation_file" if fields else "training_file")
        [event] = (await openai.fine_tuning.jobs.list_events(job.id, limit=1)).data
        assert event.level == "error" and words in event.message
    await until(openai, good, "succeeded")


async def test_over_long_samples_are_reported(openai):
    file = await upload(openai, chats(4) + chats(1, answer="x" * 500))
    job = await until(openai, await create(openai, file), "succeeded")
    events = [e async for e in openai.fine_tuning.jobs.list_events(job.id)]
    [warning] = [e for e in events if e.level == "warn"]
    assert warning.message.startswith("1 lines of the training file are left out") and warning.message.endswith(": 5")


async def test_prompts_that_do_not_activate_an_activated_lora_are_reported(openai, training):
    invoked = training.plain.tokenizer.tokenize("q2")
    file = await upload(openai, chats(4))
    adapter = {"alora_invocation_tokens": invoked}
    job = await until(openai, await create(openai, file, extra_body={"adapter": adapter}), "succeeded")
    [warning] = [e async for e in openai.fine_tuning.jobs.list_events(job.id) if e.level == "warn"]
    assert warning.message == f"3 of 4 prompts lack the invocation sequence {invoked}: their answers are not learned"
    adapter = {"alora_invocation_tokens": invoked * 2}
    job = await until(openai, await create(openai, file, extra_body={"adapter": adapter}), "failed")
    assert "4 of 4 prompts lack" in job.error.message and "nothing to learn" in job.error.message


@pytest.mark.parametrize(
    ("fields", "status", "param", "words"),
    [
        ({"model": "X"}, 404, "model", "`X` cannot be fine-tuned here"),
        ({"model": None}, 400, "model", "Field required"),
        ({"training_file": "file-none"}, 404, None, "no file 'file-none'"),
        ({"validation_file": "file-none"}, 404, None, "no file 'file-none'"),
        ({"training_file": "\ud800"}, 400, "file", "not valid Unicode"),
        ({"suffix": "a:b"}, 400, "suffix", "'a:b'"),
        ({"suffix": "a" * 65}, 400, "suffix", "64"),
        ({"seed": -1}, 400, "seed", "-1"),
        ({"metadata": {"k" * 65: "v"}}, 400, "metadata", "64"),
        ({"metadata": {str(i): "v" for i in range(17)}}, 400, "metadata", "16"),
        ({"method": {"type": "reinforcement"}}, 400, "method", "not supported yet"),
        ({"method": {"type": "reinforcement", "reinforcement": {"grader": {}}}}, 400, "method", "not supported yet"),
        ({"method": {"type": "magic"}}, 400, "method", "'magic'"),
        ({"method": SUPERVISED | {"type": "dpo"}}, 400, "method", "method.supervised is given, but method.type is"),
        ({"method": {"type": "dpo", "dpo": {"beta": 0.1}}}, 400, "beta", "beta is 0.1, but there is no such field"),
        ({"r": 16}, 400, "r", "r is 16, but there is no such field here: model, training_file, "),
        ({"integrations": [{"type": "wandb", "wandb": {"project": "p", "x": 1}}]}, 400, "x", "no such field here"),
        ({"hyperparameters": {"n_epochs": 0}}, 400, "n_epochs", "0"),
        ({"hyperparameters": {"n_epoch": 1}}, 400, "n_epoch", "no such setting"),
        ({"hyperparameters": {"beta": 0.1}}, 400, "beta", "only dpo"),
        ({"hyperparameters": {"n_epochs": 1}, "method": SUPERVISED}, 400, "hyperparameters", "once"),
        ({"adapter": {"initialisation": "pissa"}}, 400, "initialisation", "changes the base weights"),
        ({"adapter": {"r": 64}}, 400, "r", "needs 5 GiB, 4 GiB are there"),
        ({"adapter": "lora"}, 400, "adapter", "dictionary"),
        ({"weight": 0}, 400, "weight", "greater than 0"),
        ({"integrations": [{"type": "wandb", "wandb": {"project": "p"}}]}, 400, "integrations", "pip install wandb"),
        ({"integrations": [{"type": "mlflow"}]}, 400, "integrations", "'wandb'"),
    ],
)  # fmt: skip
async def test_bad_jobs_are_refused_at_once(openai, http, fields, status, param, words):
    file = await upload(openai, chats(1))
    body = {"model": "base", "training_file": file.id} | fields
    response = await http.post("/v1/fine_tuning/jobs", content=json.dumps(body), headers=JSON)
    error = response.json()["error"]
    assert response.status_code == status
    assert (error["param"], error["type"]) == (param, "invalid_request_error")
    assert words in error["message"]
    assert (await openai.fine_tuning.jobs.list()).data == []


async def test_results_cannot_be_trained_on(openai):
    job = await until(openai, await create(openai, await upload(openai, chats(4))), "succeeded")
    with pytest.raises(openai_sdk.BadRequestError, match="purpose is 'fine-tune-results'"):
        await openai.fine_tuning.jobs.create(model="base", training_file=job.result_files[0])


def form(*parts, end=b"--B--\r\n"):
    body = b"".join(
        b'--B\r\nContent-Disposition: form-data; name="%s"%s\r\n\r\n%s\r\n' % (name, extra, content)
        for name, extra, content in parts
    )
    return body + end


PURPOSE = (b"purpose", b"", b"fine-tune")
FILE = (b"file", b'; filename="a.jsonl"', b"x")


@pytest.mark.parametrize(
    ("body", "status", "param", "words"),
    [
        (form(PURPOSE, FILE), 200, None, ""),
        (form(FILE, PURPOSE), 200, None, ""),
        (form(FILE), 400, "purpose", "purpose must be 'fine-tune', got ''"),
        (form((b"purpose", b"", b"batch"), FILE), 400, "purpose", "'batch'"),
        (form(PURPOSE), 400, "file", "file is missing"),
        (form(PURPOSE, (b"file", b"", b"x")), 400, "file", "with a filename"),
        (form(PURPOSE, FILE, FILE), 400, "file", "one file"),
        (form(PURPOSE, FILE, (b"expires_after[anchor]", b"", b"created_at")), 400, "expires_after[anchor]", "not supp"),
        (form(PURPOSE, FILE, (b"x", b"", b"y" * 70_000)), 413, None, "beside the file"),
        (form(PURPOSE, FILE, end=b""), 400, None, "ends before"),
        (b"nonsense", 400, None, "not valid multipart"),
    ],
)
async def test_uploads(http, training, tmp_path, body, status, param, words):
    response = await http.post("/v1/files", content=body, headers={"Content-Type": "multipart/form-data; boundary=B"})
    assert response.status_code == status, response.text
    if status != 200:
        error = response.json()["error"]
        assert error["param"] == param and words in error["message"]
    assert list((tmp_path / "uploads").iterdir()) == []
    assert len(list((tmp_path / "files").iterdir())) == (status == 200)


async def test_an_upload_that_is_no_form(http):
    response = await http.post("/v1/files", json={"purpose": "fine-tune"})
    assert response.status_code == 400 and "multipart/form-data" in response.json()["error"]["message"]


async def test_large_uploads(training, engine, monkeypatch):
    """Beyond max_request_bytes, up to a limit that holds without a Content-Length too."""
    monkeypatch.setattr("multigraft.training.store.MAX_FILE_BYTES", 300_000)
    app = create_app(engine, ServerConfig(max_request_bytes=1000))

    async def chunks(size):
        yield form(PURPOSE, end=b'--B\r\nContent-Disposition: form-data; name="file"; filename="f"\r\n\r\n')
        for _ in range(size // 1000):
            yield b"x" * 1000
        yield b"\r\n--B--\r\n"

    headers = {"Content-Type": "multipart/form-data; boundary=B"}
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://test") as http:
        good = await http.post("/v1/files", content=chunks(300_000), headers=headers)
        assert good.status_code == 200 and good.json()["bytes"] == 300_000
        bad = await http.post("/v1/files", content=chunks(301_000), headers=headers)
        assert bad.status_code == 413 and bad.json()["error"]["code"] == "request_too_large"
        huge = await http.post("/v1/files", content=b"x", headers=headers | {"Content-Length": str(2**31)})
        assert huge.status_code == 413
        assert (await http.post("/v1/fine_tuning/jobs", content=b" " * 2000)).status_code == 413


@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("GET", "/v1/files/X"), ("GET", "/v1/files/X/content"), ("DELETE", "/v1/files/X"),
        ("GET", "/v1/fine_tuning/jobs/X"), ("GET", "/v1/fine_tuning/jobs/X/events"),
        ("GET", "/v1/fine_tuning/jobs/X/checkpoints"), ("GET", "/v1/fine_tuning/jobs/X/adapter"),
        ("POST", "/v1/fine_tuning/jobs/X/cancel"), ("POST", "/v1/fine_tuning/jobs/X/pause"),
        ("POST", "/v1/fine_tuning/jobs/X/resume"),
    ],
)  # fmt: skip
async def test_unknown_ids(http, method, path):
    response = await http.request(method, path)
    assert response.status_code == 404
    assert response.json()["error"]["code"] == "not_found" and "'X'" in response.json()["error"]["message"]


@pytest.mark.parametrize("path", ["files", "fine_tuning/jobs"])
async def test_bad_pages(http, path):
    for query, param in (("limit=0", "limit"), ("limit=many", "limit"), ("after=X", "after")):
        response = await http.get(f"/v1/{path}?{query}")
        assert response.status_code == 400 and response.json()["error"]["param"] == param


async def test_without_training_there_are_no_endpoints(engine, anyio_backend):
    app = create_app(engine, ServerConfig())
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://test") as http:
        assert (await http.get("/v1/files")).status_code == 404
        assert "multigraft:training" not in (await http.get("/metrics")).text
