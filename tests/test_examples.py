"""The committed example adapters do what their table says, under transformers and PEFT, not under our engine."""

from __future__ import annotations

import io
import json
import socket
import urllib.error

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from examples import demo
from examples.train_adapters import BASE, STYLES, Chat, share

FOLDERS = demo.adapter_folders()


def test_every_style_is_committed_and_small():
    assert {folder.name for folder in FOLDERS} == set(STYLES)
    sizes = []
    for folder in FOLDERS:
        config = json.loads((folder / "adapter_config.json").read_text())
        assert config["base_model_name_or_path"] == BASE
        tensors = load_file(folder / "adapter_model.safetensors")
        assert {t.dtype for t in tensors.values()} == {torch.bfloat16}
        sizes.append((folder / "adapter_model.safetensors").stat().st_size)
    assert max(sizes) < 1e6 and sum(sizes) < 5e6


@pytest.fixture(scope="module")
def chat(smol_path) -> Chat:
    model = AutoModelForCausalLM.from_pretrained(smol_path, dtype=torch.float32)
    model = PeftModel.from_pretrained(model, FOLDERS[0], adapter_name=FOLDERS[0].name)
    for folder in FOLDERS[1:]:
        model.load_adapter(folder, adapter_name=folder.name)
    return Chat(model, AutoTokenizer.from_pretrained(smol_path))


@pytest.fixture(scope="module")
def base_answers(chat) -> list[str]:
    with chat.model.disable_adapter():
        return chat.answers(demo.PROMPTS)


@pytest.mark.parametrize("name", STYLES)
def test_demo_answers_are_in_style(chat, base_answers, name):
    assert share(base_answers, STYLES[name]) == 0.0
    chat.model.set_adapter(name)
    assert share(chat.answers(demo.PROMPTS), STYLES[name]) > 0.6  # a near-tie may fall otherwise on another CPU


def test_a_busy_port_is_left_alone():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        s.listen()
        busy = s.getsockname()[1]
        assert demo.free_port(busy) != busy
    assert demo.free_port(busy) == busy


def test_a_refused_request_is_told(monkeypatch):
    def refuse(*_, **__):
        raise urllib.error.HTTPError("u", 404, "Not Found", None, io.BytesIO(b'{"error": "no such model"}'))

    monkeypatch.setattr(demo.urllib.request, "urlopen", refuse)
    server = demo.Server.__new__(demo.Server)
    server.url = "http://127.0.0.1:1"
    with pytest.raises(demo.ServerFailed, match=r"pirat answered 404.*no such model"):
        server.chat("pirat", "hi")
