"""Addresses of Redis that a client uses as they are meant: a Unix socket, a percent-encoded password; commands refuse others."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from typer.testing import CliRunner

from atspeed.cli.main import app
from atspeed.engine.kv.redis_client import connect
from atspeed.local.redis_server import LocalRedis, LocalRedisError, local_redis, server_binary
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


def test_commands_refuse_a_bad_url_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    url = "redis://:Secret#1@127.0.0.1:6379/0"
    done = CliRunner().invoke(app, ["up", str(tmp_path), "--redis-url", url])
    assert done.exit_code == 2
    assert "--redis-url" in done.output
    assert "Secret" not in done.output
    monkeypatch.setenv("REDIS_URL", url)
    with pytest.raises(LocalRedisError, match=r"REDIS_URL: must hold no #") as refusal, local_redis():
        pass
    assert "Secret" not in str(refusal.value)
