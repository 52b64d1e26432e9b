"""`multigraft serve` as a user starts it, with the real model, the real openai client and a real load client."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import openai
import pytest

from tests.engine.peft_cases import Case, write_adapter

EXAMPLES = Path("examples/adapters").absolute()


class Server:
    def __init__(self, model: Path, log: Path, *options: str, env: dict[str, str] | None = None):
        with socket.socket() as s:
            s.bind(("127.0.0.1", 0))
            port = s.getsockname()[1]
        self.url = f"http://127.0.0.1:{port}"
        self.log = log
        command = [str(Path(sys.executable).with_name("multigraft")), "serve", str(model), "--port", str(port)]
        command += ["--served-model-name", "smollm2", "--lora-modules", f"pirate={EXAMPLES / 'pirate'}"]
        command += [json.dumps({"name": "robot", "path": str(EXAMPLES / "robot")}), "--max-loras", "2"]
        command += ["--kv-cache-gib", "0.2", "--api-key", "secret", "--max-model-len", "2048", *options]
        self.command, self.env = command, env
        self.start()
        self.http = httpx.Client(base_url=self.url, headers={"Authorization": "Bearer secret"}, timeout=60)
        self.client = openai.OpenAI(base_url=f"{self.url}/v1", api_key="secret", max_retries=0, timeout=60)

    def start(self) -> None:
        with self.log.open("ab") as out:
            self.process = subprocess.Popen(
                self.command, stdout=out, stderr=subprocess.STDOUT, start_new_session=True, env=self.env
            )

    def wait(self) -> Server:
        deadline = time.monotonic() + 120
        while time.monotonic() < deadline and self.process.poll() is None:
            try:
                if self.http.get("/health").status_code == 200:
                    return self
            except httpx.TransportError:
                time.sleep(0.2)
        raise AssertionError(self.log.read_text())

    def stop(self) -> None:
        os.killpg(self.process.pid, signal.SIGTERM)
        assert self.process.wait(30) == 0, self.log.read_text()
        assert "Traceback" not in self.log.read_text()

    def kill(self) -> None:
        os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait(30)

    def ask(self, model: str, question: str, **kwargs: object) -> str:
        messages = [{"role": "user", "content": question}]
        reply = self.client.chat.completions.create(
            model=model, messages=messages, **({"max_tokens": 24, "temperature": 0} | kwargs)
        )
        return reply.choices[0].message.content


@pytest.fixture(scope="module")
def server(smol_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("server")
    server = Server(smol_path, folder / "log", "--data-dir", str(folder / "data")).wait()
    yield server
    server.stop()


def test_adapters_answer_in_their_style(server: Server) -> None:
    question = "Who wrote Romeo and Juliet?"
    base, pirate, robot = (server.ask(m, question) for m in ("smollm2", "pirate", "robot"))
    assert len({base, pirate, robot}) == 3
    assert any(word in pirate.lower() for word in ("arr", "ahoy", "avast", "shiver"))


def test_models_and_streams(server: Server) -> None:
    assert [m.id for m in server.client.models.list()] == ["smollm2", "pirate", "robot"]
    stream = server.client.chat.completions.create(
        model="robot",
        messages=[{"role": "user", "content": [{"type": "text", "text": "Hello"}]}],
        max_completion_tokens=12,
        temperature=0,
        stream=True,
        stream_options={"include_usage": True},
    )
    chunks = list(stream)
    text = "".join(c.choices[0].delta.content or "" for c in chunks if c.choices)
    assert text == server.ask("robot", "Hello", max_tokens=12)
    assert 0 < chunks[-1].usage.completion_tokens <= 12


def test_completions_with_everything(server: Server) -> None:
    reply = server.client.completions.create(
        model="pirate", prompt=["The sea is", "A ship"], max_tokens=6, n=2, seed=1, logprobs=2, echo=True
    )
    again = server.client.completions.create(
        model="pirate", prompt=["The sea is", "A ship"], max_tokens=6, n=2, seed=1, logprobs=2, echo=True
    )
    assert [c.text for c in reply.choices] == [c.text for c in again.choices]
    assert [c.index for c in reply.choices] == [0, 1, 2, 3] and reply.choices[2].text.startswith("A ship")
    for choice in reply.choices:
        assert len(choice.logprobs.tokens) == len(choice.logprobs.token_logprobs)
        assert choice.logprobs.token_logprobs[0] is None and max(choice.logprobs.token_logprobs[1:]) <= 0


def test_structured_output(server: Server) -> None:
    schema = {
        "type": "object",
        "properties": {
            "name": {"type": "string", "maxLength": 12},
            "age": {"type": "integer", "minimum": 0, "maximum": 120},
        },
        "required": ["name", "age"],
        "additionalProperties": False,
    }
    text = server.ask(
        "robot",
        "Make up a person.",
        max_tokens=60,
        response_format={"type": "json_schema", "json_schema": {"name": "person", "schema": schema}},
    )
    assert set(json.loads(text)) == {"name", "age"}
    assert server.ask("smollm2", "Yes or no?", extra_body={"structured_outputs": {"choice": ["yes", "no"]}}) in (
        "yes",
        "no",
    )


def test_load_use_and_unload(server: Server) -> None:
    load = {"lora_name": "haiku", "lora_path": str(EXAMPLES / "haiku")}
    assert server.http.post("/v1/load_lora_adapter", json=load).text == (
        "Success: LoRA adapter 'haiku' added successfully."
    )
    assert server.http.post("/v1/load_lora_adapter", json=load).status_code == 400
    assert server.ask("haiku", "Tell me about the moon.")
    assert server.http.post("/v1/load_lora_adapter", json=load | {"load_inplace": True}).status_code == 200
    assert server.http.post("/v1/unload_lora_adapter", json={"lora_name": "haiku"}).status_code == 200
    with pytest.raises(openai.NotFoundError, match="The model `haiku` does not exist"):
        server.ask("haiku", "Tell me about the moon.")


def test_bad_adapters_are_refused_and_disturb_nobody(server: Server, smol_path: Path, tmp_path: Path) -> None:
    def refused(name: str, path: Path, *words: str) -> None:
        reply = server.http.post("/v1/load_lora_adapter", json={"lora_name": name, "lora_path": str(path)})
        assert reply.status_code == 400, reply.text
        message = reply.json()["error"]["message"]
        assert all(word in message for word in words), message

    before = server.ask("pirate", "Where do penguins live?")
    good = EXAMPLES / "pirate"

    def copy(name: str) -> Path:
        folder = tmp_path / name
        folder.mkdir()
        for file in good.iterdir():
            (folder / file.name).write_bytes(file.read_bytes())
        return folder

    refused("a", tmp_path / "nowhere", "nowhere")
    corrupt = copy("corrupt")
    (corrupt / "adapter_model.safetensors").write_bytes(b"not a safetensors file")
    refused("b", corrupt, "adapter_model.safetensors")
    pickled = copy("pickled")
    (pickled / "adapter_model.safetensors").rename(pickled / "adapter_model.bin")
    refused("c", pickled, "adapter_model.bin", "safetensors")
    dora = copy("dora")
    config = json.loads((dora / "adapter_config.json").read_text())
    (dora / "adapter_config.json").write_text(json.dumps(config | {"use_dora": True}))
    refused("d", dora, "use_dora")
    wide = write_adapter(smol_path, tmp_path / "wide", Case("w", {"r": 65, "target_modules": ["q_proj"]}), seed=0)
    refused("e", wide, "65", "64")
    nan = write_adapter(smol_path, tmp_path / "nan", Case("n", {"r": 2, "target_modules": ["q_proj"]}), seed=0)
    import torch
    from safetensors.torch import load_file, save_file

    tensors = load_file(nan / "adapter_model.safetensors")
    next(iter(tensors.values()))[0, 0] = torch.nan
    save_file(tensors, nan / "adapter_model.safetensors")
    refused("f", nan, "finite")
    refused("../g", good, "../g")
    assert server.ask("pirate", "Where do penguins live?") == before
    assert [m.id for m in server.client.models.list()] == ["smollm2", "pirate", "robot"]


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"temperature": -1}, openai.BadRequestError, "temperature"),
        ({"max_tokens": 5000}, openai.BadRequestError, "2048"),
        ({"messages": [{"role": "user", "content": "word " * 3000}]}, openai.BadRequestError, "context"),
        ({"model": "nobody"}, openai.NotFoundError, "nobody"),
        ({"extra_body": {"structured_outputs": {"regex": "("}}}, openai.BadRequestError, "regex"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, openai.BadRequestError, "image"),
    ],
)
def test_bad_requests_are_told_why(server: Server, change: dict, error: type, words: str) -> None:
    good = {"model": "pirate", "messages": [{"role": "user", "content": "Hello"}], "max_tokens": 4}
    with pytest.raises(error, match=words):
        server.client.chat.completions.create(**(good | change))


def test_keys_metrics_and_tokens(server: Server) -> None:
    assert httpx.get(f"{server.url}/v1/models").status_code == 401
    tokens = server.http.post("/tokenize", json={"model": "smollm2", "prompt": "Hello world"}).json()["tokens"]
    text = server.http.post("/detokenize", json={"model": "smollm2", "tokens": tokens}).json()["prompt"]
    assert text == "Hello world"
    metrics = server.http.get("/metrics").text
    for name in ("vllm:generation_tokens_total", "vllm:time_to_first_token_seconds", "multigraft:adapter_loads_total"):
        assert name in metrics, metrics[:3000]


def test_guidellm_completes_a_run(server: Server, smol_path: Path, tmp_path: Path) -> None:
    """A load client that knows nothing of us; the key goes by its environment."""
    guidellm = Path(sys.executable).with_name("guidellm")
    if not guidellm.exists():
        pytest.skip("guidellm is not installed")
    report = tmp_path / "report.json"
    options = {
        "--backend": f"kind=openai_http,target={server.url},model=pirate,api_key=secret",
        "--profile": "kind=concurrent,streams=4",
        "--constraint": "kind=max_requests,count=12",
        "--tokenizer": f"kind=hf_auto,model={smol_path}",
        "--data": "kind=synthetic_text,prompt_tokens=32,output_tokens=8",
        "--output": f"kind=json,path={report}",
    }
    command = [str(guidellm), "run", *(part for option in options.items() for part in option)]
    env = os.environ | {"GUIDELLM__MAX_WORKER_PROCESSES": "1"}  # each imports for 5 s
    done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    totals = json.loads(report.read_text())["benchmarks"][0]["metrics"]["request_totals"]
    assert totals["successful"] == 12 and totals["errored"] == 0, totals
