"""Every way to go wrong has the one shape of error, a fitting status and words that help."""

import json

import httpx
import openai as openai_sdk
import pytest

from multigraft.core.config import ServerConfig
from multigraft.server import create_app

pytestmark = pytest.mark.anyio


def error_of(response, status):
    assert response.status_code == status, response.text
    body = response.json()
    assert set(body) == {"error"}
    assert set(body["error"]) == {"message", "type", "param", "code"}
    assert body["error"]["type"] == ("invalid_request_error" if status < 500 else "server_error")
    return body["error"]


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions"])
@pytest.mark.parametrize("stream", [False, True])
async def test_unknown_model(http, path, stream):
    body = {"model": "X", "prompt": "a", "messages": [{"role": "user", "content": "a"}], "stream": stream}
    error = error_of(await http.post(path, json=body), 404)
    assert error["message"] == "The model `X` does not exist."
    assert (error["param"], error["code"]) == ("model", "model_not_found")


async def test_the_sdk_raises_its_own_classes(openai):
    with pytest.raises(openai_sdk.NotFoundError):
        await openai.completions.create(model="X", prompt="a")
    with pytest.raises(openai_sdk.BadRequestError) as caught:
        await openai.completions.create(model="base", prompt="a", temperature=-1)
    assert caught.value.param == "temperature"


@pytest.mark.parametrize("stream", [False, True])
async def test_prompt_too_long(http, stream):
    error = error_of(await http.post("/v1/completions", json={"prompt": "a" * 300, "stream": stream}), 400)
    assert error["code"] == "context_length_exceeded"


async def test_one_prompt_too_long_among_several_ends_all(http, engine):
    engine.delay = 0.01
    error_of(await http.post("/v1/completions", json={"prompt": ["a", "b" * 300, "c"]}), 400)
    assert engine.running == 0
    assert len(engine.aborted) == len(engine.calls)


@pytest.mark.parametrize(
    ("fields", "param", "words"),
    [
        ({"temperature": "hot"}, "temperature", "'hot'"),
        ({"temperature": 200}, "temperature", "200"),
        ({"top_p": 0}, "top_p", "(0, 1]"),
        ({"n": 0}, "n", "0"),
        ({"n": 129}, "n", "128"),
        ({"best_of": 3}, "best_of", "3"),
        ({"suffix": "end"}, "suffix", "'end'"),
        ({"use_beam_search": True}, "use_beam_search", "not supported"),
        ({"max_completion_tokens": 3}, "max_completion_tokens", "not supported"),
        ({"logprobs": 50}, "logprobs", "50"),
        ({"max_tokens": 0}, "max_tokens", "at least 1"),
        ({"min_tokens": 20}, "min_tokens", "20"),
        ({"logit_bias": {"a": 1}}, "logit_bias", "integer"),
        ({"logit_bias": {"5": 101}}, "logit_bias", "100"),
        ({"stop": [""]}, "stop", "non-empty"),
        ({"prompt": []}, "prompt", "[]"),
        ({"prompt": [1, "a"]}, "prompt", "token ids"),
        ({"prompt": [[1], []]}, "prompt", "token ids"),
        ({"prompt": [True]}, "prompt", "token ids"),
        ({"prompt": [-1]}, "prompt", "token ids"),
        ({"prompt": None}, "prompt", "required"),
        ({"prompt": "\ud800"}, "prompt", "surrogate"),
        ({"stream": "maybe"}, "stream", "'maybe'"),
    ],
)
async def test_bad_values_are_named(http, engine, fields, param, words):
    response = await http.post(
        "/v1/completions", content=json.dumps({"prompt": "a"} | fields), headers={"content-type": "application/json"}
    )
    error = error_of(response, 400)
    assert error["param"] == param
    assert words in error["message"], error["message"]
    assert engine.calls == []


@pytest.mark.parametrize(
    ("content", "kind", "words"),
    [
        (b'{"prompt": ', "application/json", "not valid JSON"),
        (b"[1]", "application/json", "JSON object"),
        (b"", "application/json", "JSON object"),
        (b'{"prompt": "a"}', "text/plain", "Content-Type: application/json"),
        (b"[" * 100_000, "application/json", ""),
        (b'{"prompt": "\xff"}', "application/json", ""),
    ],
)
async def test_bad_bodies(http, content, kind, words):
    error = error_of(await http.post("/v1/completions", content=content, headers={"content-type": kind}), 400)
    assert words in error["message"]


async def test_unknown_routes_and_methods(http):
    assert "/v1/engines" in error_of(await http.get("/v1/engines"), 404)["message"]
    response = await http.get("/v1/completions")
    assert error_of(response, 405)["code"] == "method_not_allowed"
    assert response.headers["allow"] == "POST"


async def test_a_bug_in_the_engine_gives_nothing_away(http, engine):
    engine.fail_at = 0
    error = error_of(await http.post("/v1/completions", json={"prompt": "a"}), 500)
    assert "fire" not in error["message"]
    assert error["code"] == "internal_error"


async def test_error_in_mid_stream_is_an_event(http, openai, engine):
    engine.fail_at = 3
    text = (await http.post("/v1/completions", json={"prompt": "a", "stream": True})).text
    events = [line.removeprefix("data: ") for line in text.split("\n") if line]
    assert [json.loads(e)["choices"][0]["text"] for e in events[:3]] == ["H", "e", "l"]
    assert json.loads(events[3])["error"]["code"] == "internal_error"
    assert events[4:] == ["[DONE]"]
    with pytest.raises(openai_sdk.APIError, match="Internal server error"):
        async for _ in await openai.completions.create(model="base", prompt="a", stream=True):
            pass


async def test_api_keys(engine):
    app = create_app(engine, ServerConfig(api_key=("one", "two")))
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://test") as http:
        for headers in (
            {},
            {"Authorization": "Bearer three"},
            {"Authorization": "Basic one"},
            {"Authorization": "one"},
        ):
            response = await http.get("/v1/models", headers=headers)
            assert error_of(response, 401)["code"] == "invalid_api_key"
            assert response.headers["www-authenticate"] == "Bearer"
        for key in ("one", "two"):
            assert (await http.get("/v1/models", headers={"Authorization": f"Bearer {key}"})).status_code == 200
        for path in ("/health", "/ping", "/version", "/metrics"):
            assert (await http.get(path)).status_code == 200
        error_of(await http.post("/tokenize", json={"prompt": "a"}), 401)


async def test_body_limit(engine):
    app = create_app(engine, ServerConfig(max_request_bytes=1000))
    sent = 0

    async def long_body():
        nonlocal sent
        for _ in range(1000):
            sent += 100
            yield b" " * 100

    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://test") as http:
        error = error_of(await http.post("/v1/completions", json={"prompt": "a" * 1000}), 413)
        assert error["code"] == "request_too_large" and "1000" in error["message"]
        # Without a Content-Length the body is refused as soon as it has passed the limit.
        headers = {"content-type": "application/json"}
        error_of(await http.post("/v1/completions", content=long_body(), headers=headers), 413)
        assert 1000 < sent <= 1200
        assert (await http.post("/v1/completions", json={"prompt": "a"})).status_code == 200


async def test_draining_refuses_all_but_probes(engine):
    app = create_app(engine, ServerConfig())
    app.state.service.draining = True
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://test") as http:
        for response in (await http.post("/v1/completions", json={"prompt": "a"}), await http.get("/health")):
            assert error_of(response, 503)["code"] == "shutting_down"
        assert (await http.get("/metrics")).status_code == 200


async def test_an_unhealthy_engine(http, engine):
    assert (await http.get("/health")).status_code == 200
    engine.healthy = False
    assert error_of(await http.get("/health"), 503)["code"] == "unhealthy"
    assert error_of(await http.get("/ping"), 503)["code"] == "unhealthy"
