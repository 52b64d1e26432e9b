"""Models, adapters, tokens and probes."""

import subprocess
import sys

import httpx
import pytest

from multigraft import __version__
from multigraft.core.config import ServerConfig
from multigraft.server import create_app

pytestmark = pytest.mark.anyio


async def test_list_of_models(openai):
    base, french = (await openai.models.list()).data
    assert (base.id, base.object, base.root, base.parent, base.max_model_len) == (
        "base", "model", "/models/base", None, 200,
    )  # fmt: skip
    assert (french.id, french.root, french.parent, french.scope) == ("french", "/adapters/french", "base", "prefill")
    assert not hasattr(base, "scope")


async def test_one_model(openai, http):
    assert (await openai.models.retrieve("french")).id == "french"
    response = await http.get("/v1/models/org/unknown")
    assert response.status_code == 404
    assert response.json()["error"]["message"] == "The model `org/unknown` does not exist."


async def test_adapter_life(http, openai):
    load = {"lora_name": "org/latin", "lora_path": "/adapters/latin", "scope": "prefill"}
    response = await http.post("/v1/load_lora_adapter", json=load)
    assert (response.status_code, response.text) == (200, "Success: LoRA adapter 'org/latin' added successfully.")
    assert (await openai.completions.create(model="org/latin", prompt="a")).model == "org/latin"
    assert (await openai.models.retrieve("org/latin")).scope == "prefill"

    response = await http.post("/v1/load_lora_adapter", json=load)
    assert response.status_code == 400
    assert response.json()["error"]["message"] == (
        "The lora adapter 'org/latin' has already been loaded. If you want to load the adapter in place, "
        "set 'load_inplace' to True."
    )
    response = await http.post("/v1/load_lora_adapter", json=load | {"load_inplace": True})
    assert response.status_code == 200
    assert (await openai.models.retrieve("org/latin")).version == 2

    response = await http.post("/v1/unload_lora_adapter", json={"lora_name": "org/latin"})
    assert (response.status_code, response.text) == (200, "Success: LoRA adapter 'org/latin' removed successfully.")
    response = await http.post("/v1/unload_lora_adapter", json={"lora_name": "org/latin"})
    assert response.status_code == 404
    assert response.json()["error"]["message"] == "The lora adapter 'org/latin' cannot be found."


@pytest.mark.parametrize(
    ("path", "body", "message"),
    [
        ("load", {"lora_name": "a"}, "Both 'lora_name' and 'lora_path' must be provided."),
        ("load", {"lora_path": "/a"}, "Both 'lora_name' and 'lora_path' must be provided."),
        ("load", {"lora_name": "a", "lora_path": "/broken"}, "/broken has no adapter_model.safetensors."),
        ("load", {"lora_name": "a", "lora_path": "/a", "scope": "decode"}, "scope: Input should be"),
        ("unload", {}, "'lora_name' needs to be provided to unload a LoRA adapter."),
    ],
)
async def test_bad_adapter_requests(http, path, body, message):
    response = await http.post(f"/v1/{path}_lora_adapter", json=body)
    assert response.status_code == 400
    assert response.json()["error"]["message"].startswith(message)


async def test_adapter_endpoints_can_be_closed(engine):
    app = create_app(engine, ServerConfig(allow_lora_updating=False))
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://test") as http:
        response = await http.post("/v1/load_lora_adapter", json={"lora_name": "a", "lora_path": "/a"})
        assert response.status_code == 404


async def test_tokenize(http, engine):
    got = (await http.post("/tokenize", json={"prompt": "Hi", "return_token_strs": True})).json()
    assert got == {"count": 3, "max_model_len": 200, "tokens": [2, 72, 105], "token_strs": ["\x02", "H", "i"]}
    got = (await http.post("/tokenize", json={"prompt": "Hi", "add_special_tokens": False})).json()
    assert got["tokens"] == [72, 105]
    messages = [{"role": "user", "content": "Hi"}]
    got = (await http.post("/tokenize", json={"messages": messages, "add_generation_prompt": False})).json()
    assert got["tokens"] == [ord(c) for c in "user:Hi\n"]
    assert engine.chats[0]["add_generation_prompt"] is False
    for body in ({}, {"prompt": "a", "messages": messages}):
        response = await http.post("/tokenize", json=body)
        assert response.status_code == 400 and response.json()["error"]["param"] == "prompt"
    assert (await http.post("/tokenize", json={"prompt": "a", "model": "X"})).status_code == 404


async def test_detokenize(http):
    assert (await http.post("/detokenize", json={"tokens": [72, 105]})).json() == {"prompt": "Hi"}
    response = await http.post("/detokenize", json={"tokens": ["a"]})
    assert response.status_code == 400 and response.json()["error"]["param"] == "tokens"


async def test_version(http):
    assert (await http.get("/version")).json() == {"version": __version__}


def test_the_server_imports_no_torch():
    code = "import multigraft.server, sys; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
