"""Addresses of Redis that a client uses as they are meant: a Unix socket, a percent-encoded password."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from atspeed.engine.kv.redis_client import connect
from atspeed.local.redis_server import LocalRedis, server_binary
from tests.serving import until


@pytest.fixture
def redis_socket(tmp_path: Path) -> Iterator[Path]:
    """A Redis that listens on a socket of this machine alone."""
    path = tmp_path / "redis.sock"
    options = ["--port", "0", "--unixsocket", str(path), "--save", "", "--dir", str(tmp_path)]
    with subprocess.Popen([server_binary(), *options], stdout=subprocess.DEVNULL) as server:
        until(path.exists)
        yield path
        server.terminate()


async def test_unix_socket_is_used(redis_socket: Path) -> None:
    async with connect(f"unix://{redis_socket}?db=3", timeout_seconds=10) as client:
        await client.set("a", "b")
        assert (await client.info("keyspace"))["db3"]["keys"] == 1


@pytest.mark.parametrize(
    "url", ["redis://:p%23a%2Fb@127.0.0.1:{port}/1", "redis://default:p%23a%2Fb@127.0.0.1:{port}?db=1"]
)
async def test_percent_encoded_password_is_decoded(url: str) -> None:
    with LocalRedis() as server:
        async with connect(server.url, timeout_seconds=10) as client:
            await client.config_set("requirepass", "p#a/b")
        port = server.url.rpartition(":")[2].partition("/")[0]
        async with connect(url.format(port=port), timeout_seconds=10) as client:
            assert await client.set("a", "b")
