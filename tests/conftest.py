"""Fixtures that all tests share: a process that stays as it was, and a real Redis-compatible server for each worker.

The server is always started here and never taken from REDIS_URL: the tests empty it, stop it and kill it.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator

import pytest
import redis
import structlog
from redis.asyncio import Redis

from atspeed.engine.kv.redis_client import connect
from atspeed.local.redis_server import LocalRedis
from tests.process_state import changed, process_state
from tests.profiles import register

MAX_MEMORY = "256mb"

register()


@pytest.fixture(autouse=True)
def unchanged_process() -> Iterator[None]:
    """Fail a test that leaves the state of the process changed: a later test could fail or pass because of it."""
    before = process_state()
    yield
    # A recommender in this process sets structlog up, maybe in a fixture of a module: the next module sees the defaults.
    structlog.reset_defaults()
    if names := changed(before):
        pytest.fail(f"the test left this process changed: {names}")


@pytest.fixture(scope="session")
def redis_server() -> Iterator[LocalRedis]:
    """The server itself, for tests that stop, kill or pause it. `mended` is what the next test takes of it."""
    with LocalRedis(max_memory=MAX_MEMORY) as server:
        yield server


def mended(server: LocalRedis) -> str:
    """The URL of a server that runs, is empty and has its usual settings, whatever the test before did to it."""
    server.resume()
    server.start()
    with redis.Redis.from_url(server.url) as client:
        client.flushall()
        client.config_set("maxmemory", MAX_MEMORY)
    return server.url


@pytest.fixture
def redis_url(redis_server: LocalRedis) -> str:
    return mended(redis_server)


@pytest.fixture
async def redis_client(redis_url: str) -> AsyncIterator[Redis]:
    """A client of that server, which returns bytes and never retries."""
    client = connect(redis_url, timeout_seconds=5.0)
    yield client
    await client.aclose()
