from collections.abc import AsyncIterator

import httpx
import pytest
from fake_engine import FakeEngine
from openai import AsyncOpenAI

from multigraft.core.config import ServerConfig
from multigraft.server import create_app


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


@pytest.fixture
def engine() -> FakeEngine:
    return FakeEngine()


@pytest.fixture
def config() -> ServerConfig:
    return ServerConfig()


@pytest.fixture
async def http(engine: FakeEngine, config: ServerConfig, anyio_backend: str) -> AsyncIterator[httpx.AsyncClient]:
    transport = httpx.ASGITransport(create_app(engine, config), raise_app_exceptions=False)
    async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
        yield client


@pytest.fixture
def openai(http: httpx.AsyncClient) -> AsyncOpenAI:
    return AsyncOpenAI(api_key="none", base_url="http://test/v1", http_client=http, max_retries=0)
