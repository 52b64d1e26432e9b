"""On a real socket: streaming, clients that go away, and the end of the server."""

import asyncio
import contextlib
import signal
import sys
import time
from pathlib import Path

import httpx
import pytest
from fake_engine import FakeEngine
from openai import AsyncOpenAI

from multigraft.core.config import ServerConfig
from multigraft.core.errors import InvalidRequest
from multigraft.server import bind, serve

pytestmark = pytest.mark.anyio


@contextlib.asynccontextmanager
async def serving(engine):
    ready = asyncio.get_running_loop().create_future()
    task = asyncio.create_task(serve(engine, ServerConfig(port=0), on_ready=ready.set_result))
    try:
        await asyncio.wait({task, ready}, return_when=asyncio.FIRST_COMPLETED)
        yield ready.result()
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


async def until(condition):
    async with asyncio.timeout(5):
        while not condition():
            await asyncio.sleep(0.01)


async def test_tokens_arrive_as_they_are_made(anyio_backend):
    engine = FakeEngine("abcdef", delay=0.05)
    async with serving(engine) as url, AsyncOpenAI(api_key="k", base_url=f"{url}/v1") as client:
        times = []
        async for _ in await client.completions.create(model="base", prompt="a", stream=True):
            times.append(time.monotonic())
        assert len(times) == 6
        assert times[-1] - times[0] > 0.15  # five gaps of 0.05 s: not sent all at once
    assert engine.shutdowns


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions"])
@pytest.mark.parametrize(
    "fields", [{"stream": True}, {"stream": False}, {"stream": True, "n": 2}, {"prompt": ["a", "b"]}]
)
async def test_a_client_that_goes_away_aborts_its_request(anyio_backend, path, fields):
    engine = FakeEngine("x" * 100, delay=0.02)
    body = {"prompt": "a", "messages": [{"role": "user", "content": "a"}], "max_tokens": 100} | fields
    async with serving(engine) as url, httpx.AsyncClient(base_url=url) as http:
        if body.get("stream"):
            async with http.stream("POST", path, json=body) as response:
                await anext(response.aiter_lines())
                assert engine.running == 1
        else:
            with contextlib.suppress(httpx.ReadTimeout):
                await http.post(path, json=body, timeout=0.1)
        await until(lambda: engine.running == 0)
        assert len(engine.aborted) == len(engine.calls) >= 1
        metrics = (await http.get("/metrics")).text
        aborted = len(engine.calls) * fields.get("n", 1)
        assert f'vllm:request_success_total{{finished_reason="abort",model_name="base"}} {aborted}.0' in metrics


async def test_a_client_that_goes_away_before_the_first_token(anyio_backend):
    engine = FakeEngine(delay=30)
    async with serving(engine) as url, httpx.AsyncClient(base_url=url) as http:
        with pytest.raises(httpx.ReadTimeout):
            await http.post("/v1/completions", json={"prompt": "a", "stream": True}, timeout=0.2)
        await until(lambda: engine.aborted)


@contextlib.asynccontextmanager
async def server_process(delay, grace):
    process = await asyncio.create_subprocess_exec(
        sys.executable, str(Path(__file__).with_name("serve_fake.py")), str(delay), str(grace),
        stdout=asyncio.subprocess.PIPE, env={"PYTHONPATH": str(Path(__file__).parents[2])},
    )  # fmt: skip
    try:
        yield process, (await process.stdout.readline()).decode().strip()
    finally:
        if process.returncode is None:
            process.kill()
        await process.wait()


@pytest.mark.parametrize("sig", [signal.SIGTERM, signal.SIGINT])
async def test_graceful_shutdown(anyio_backend, sig):
    async with server_process(delay=0.1, grace=20) as (process, url), httpx.AsyncClient(base_url=url) as http:
        async with http.stream("POST", "/v1/completions", json={"prompt": "a", "max_tokens": 20, "stream": True}) as s:
            lines = s.aiter_lines()
            await anext(lines)
            process.send_signal(sig)
            while (health := await http.get("/health")).status_code == 200:
                await asyncio.sleep(0.02)
            assert health.status_code == 503
            refused = await http.post("/v1/completions", json={"prompt": "a"})
            assert (refused.status_code, refused.json()["error"]["code"]) == (503, "shutting_down")
            rest = [line async for line in lines if line]
        assert len(rest) == 20 and rest[-1] == "data: [DONE]"  # the running stream came to its end
        out = (await process.stdout.read()).decode()
        assert await process.wait() == 0
        assert "shutdowns=[20.0, 0.0] running=0 aborted=0" in out


async def test_shutdown_does_not_wait_beyond_the_grace(anyio_backend):
    async with server_process(delay=10, grace=0.2) as (process, url), httpx.AsyncClient(base_url=url) as http:
        request = asyncio.create_task(http.post("/v1/completions", json={"prompt": "a"}, timeout=30))
        await asyncio.sleep(0.5)
        start = time.monotonic()
        process.send_signal(signal.SIGTERM)
        assert await process.wait() == 0
        assert time.monotonic() - start < 9  # the grace, and the time to flush responses
        await asyncio.gather(request, return_exceptions=True)


async def test_a_second_signal_ends_at_once(anyio_backend):
    async with server_process(delay=10, grace=60) as (process, url), httpx.AsyncClient(base_url=url) as http:
        request = asyncio.create_task(http.post("/v1/completions", json={"prompt": "a"}, timeout=30))
        await asyncio.sleep(0.5)
        start = time.monotonic()
        process.send_signal(signal.SIGTERM)
        while (await http.get("/health")).status_code == 200:
            await asyncio.sleep(0.02)
        process.send_signal(signal.SIGTERM)
        await process.wait()
        assert time.monotonic() - start < 5
        await asyncio.gather(request, return_exceptions=True)


def test_a_taken_port_is_a_clear_error():
    with bind(ServerConfig(port=0)) as first:
        first.listen()
        port = first.getsockname()[1]
        with pytest.raises(InvalidRequest, match=f"Cannot listen on 127.0.0.1 port {port}"):
            bind(ServerConfig(port=port))
    with pytest.raises(InvalidRequest, match="70000"):
        bind(ServerConfig(port=70000))
