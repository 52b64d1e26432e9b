"""Fine-tuning on a real server, with the real model and the real openai client, while it serves other adapters."""

from __future__ import annotations

import io
import json
import os
import re
import time
import zipfile
from collections.abc import Iterator
from pathlib import Path

import peft
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.test_end_to_end import Server

# Two threads of a training step wait for each other at every small operation, 20 times as long on a busy machine.
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1"}
STYLE = re.compile(r"^Result: \d+ \(checked\)$")


def question(a: int, b: int) -> str:
    return f"What is {a} plus {b}?"


def training_file(num_examples: int) -> bytes:
    pairs = [(a, b) for b in range(3, 27, 4) for a in range(2, 26, 3)][:num_examples]
    lines = []
    for a, b in pairs:
        answer = f"Result: {a + b} (checked)"
        messages = [{"role": "user", "content": question(a, b)}, {"role": "assistant", "content": answer}]
        lines.append(json.dumps({"messages": messages}))
    return "\n".join(lines).encode()


@pytest.fixture(scope="module")
def server(smol_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("server")
    # A machine that runs tests may be slow: training is to have time left under any load.
    options = ("--data-dir", str(folder / "data"), "--tpot-slo-ms", "20000", "--ttft-slo-ms", "20000")
    server = Server(smol_path, folder / "log", *options, env=ENVIRONMENT).wait()
    yield server
    server.stop()


def test_a_job_learns_while_others_are_served(server: Server, smol_path: Path, tmp_path: Path) -> None:
    held_out = [question(a, b) for a, b in ((31, 5), (8, 40), (17, 17), (50, 2))]
    before = [server.ask("smollm2", q) for q in held_out]
    assert not any(STYLE.match(text) for text in before), before
    file = server.client.files.create(file=("style.jsonl", training_file(48)), purpose="fine-tune")
    job = server.client.fine_tuning.jobs.create(
        model="smollm2",
        training_file=file.id,
        suffix="checked",
        seed=1,
        method={"type": "supervised", "supervised": {"hyperparameters": {"n_epochs": 1, "batch_size": 4}}},
        extra_body={"adapter": {"method": "lora", "r": 8, "learning_rate": 2e-3}},
    )
    served = 0
    while job.status not in ("succeeded", "failed", "cancelled"):
        reply = server.ask("pirate", "Who are you?")  # in bf16 its words may change with what else is in the step
        assert any(word in reply.lower() for word in ("arr", "ahoy", "avast", "matey")), reply
        served += 1
        job = server.client.fine_tuning.jobs.retrieve(job.id)
    assert job.status == "succeeded", job.error
    assert served >= 2 and job.trained_tokens > 0
    name = job.fine_tuned_model
    assert name in [m.id for m in server.client.models.list()]
    after = [server.ask(name, q) for q in held_out]
    assert sum(bool(STYLE.match(text)) for text in after) >= 3, after
    assert not any(STYLE.match(server.ask("smollm2", q)) for q in held_out)

    events = server.client.fine_tuning.jobs.list_events(job.id, limit=100).data
    losses = [e.data["train_loss"] for e in reversed(events) if e.type == "metrics" and "train_loss" in e.data]
    assert len(losses) == 12 and losses[-1] < 0.3 * losses[0], losses
    results = server.client.files.content(job.result_files[0]).text.splitlines()
    assert results[0] == "step,train_loss,train_accuracy,valid_loss,valid_mean_token_accuracy" and len(results) == 13

    archive = server.http.get(f"/v1/fine_tuning/jobs/{job.id}/adapter")
    assert archive.status_code == 200, archive.text
    zipfile.ZipFile(io.BytesIO(archive.content)).extractall(tmp_path)
    folder = next(tmp_path.rglob("adapter_config.json")).parent
    model = AutoModelForCausalLM.from_pretrained(smol_path, dtype=torch.bfloat16)
    model = peft.PeftModel.from_pretrained(model, folder).eval()
    tokenizer = AutoTokenizer.from_pretrained(smol_path)
    agree = 0
    for q, text in zip(held_out, after, strict=True):
        ids = tokenizer.apply_chat_template(
            [{"role": "user", "content": q}], add_generation_prompt=True, return_tensors="pt", return_dict=True
        )
        out = model.generate(**ids, max_new_tokens=24, do_sample=False)
        agree += tokenizer.decode(out[0, ids["input_ids"].shape[1] :], skip_special_tokens=True) == text
    assert agree >= 3  # bf16: a tie may fall the other way


def test_a_job_goes_on_after_a_kill(server: Server) -> None:
    """kill -9 in the middle of a job on the real engine; the next server goes on and serves the result."""
    file = server.client.files.create(file=("style.jsonl", training_file(24)), purpose="fine-tune")
    method = {"n_epochs": 1, "batch_size": 4}
    job = server.client.fine_tuning.jobs.create(
        model="smollm2",
        training_file=file.id,
        seed=1,
        method={"type": "supervised", "supervised": {"hyperparameters": method}},
        extra_body={"adapter": {"r": 4, "checkpoint_steps": 2}},
    )
    deadline = time.monotonic() + 60
    while not server.client.fine_tuning.jobs.checkpoints.list(job.id).data and time.monotonic() < deadline:
        time.sleep(0.05)
    server.kill()
    server.start()
    server.wait()
    while job.status not in ("succeeded", "failed") and time.monotonic() < deadline + 60:
        time.sleep(0.2)
        job = server.client.fine_tuning.jobs.retrieve(job.id)
    assert job.status == "succeeded", job.error
    steps = {
        e.data["step"]
        for e in server.client.fine_tuning.jobs.list_events(job.id, limit=100).data
        if e.type == "metrics"
    }
    assert steps == set(range(1, 7))
    assert server.ask(job.fine_tuned_model, question(3, 4))
