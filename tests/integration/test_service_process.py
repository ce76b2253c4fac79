"""A service as a process: it prints its addresses, ends at signals, and names the reason if it does not start."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import grpc
import pytest

from atspeed.rpc.server import running
from tests.echo import Echo, call, settings

ROOT = Path(__file__).parents[2]
PROGRAM = """
import asyncio
from contextlib import asynccontextmanager
from pathlib import Path

from atspeed.engine.errors import BundleError
from atspeed.rpc.server import run
from tests.echo import Echo, EchoSettings


@asynccontextmanager
async def echo(settings):
    if (settings.bundle / "broken").exists():
        raise BundleError("manifest.json: not there")
    if (settings.bundle / "slow").exists():
        print("loading", flush=True)
        while not (settings.bundle / "unresponsive").exists():
            await asyncio.sleep(0.01)
        while True:  # as code does that does not let the event loop run
            pass
    yield [Echo().registration()]
    (settings.bundle / "left").touch()


run(EchoSettings, echo)
"""


@asynccontextmanager
async def process(*arguments: str) -> AsyncIterator[asyncio.subprocess.Process]:
    child = await asyncio.create_subprocess_exec(
        *(sys.executable, "-c", PROGRAM, *arguments),
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )
    try:
        yield child
    finally:
        if child.returncode is None:
            child.kill()
        await child.communicate()


async def ended(*arguments: str) -> tuple[int | None, str]:
    """Exit code and stderr of a process that does not start."""
    async with process(*arguments) as child:
        _, stderr = await asyncio.wait_for(child.communicate(), 30)
        return child.returncode, stderr.decode()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
async def test_process_prints_its_address_and_ends_at_a_signal(tmp_path: Path, number: signal.Signals) -> None:
    async with process("--bundle", str(tmp_path), "--port", "0", "--redis-url", "redis://:hidden@localhost") as child:
        assert child.stdout is not None
        line = json.loads(await asyncio.wait_for(child.stdout.readline(), 30))
        assert line == {
            "service": "echo",
            "address": f"127.0.0.1:{line['port']}",
            "port": line["port"],
            "pid": child.pid,
        }
        async with grpc.aio.insecure_channel(line["address"]) as channel:
            assert await call(channel, "UnaryUnary", "hello") == "hello"
        child.send_signal(number)
        _, stderr = await asyncio.wait_for(child.communicate(), 10)
    assert child.returncode == 0
    assert (tmp_path / "left").exists()
    logs = [json.loads(entry) for entry in stderr.decode().splitlines()]
    assert [log["event"] for log in logs] == ["listening", "call", "draining"]
    assert all(log["service"] == "echo" for log in logs)
    assert "hidden" not in stderr.decode()


async def test_a_signal_ends_the_start(tmp_path: Path) -> None:
    """The first process of a container has no default for signals: one that came while the model was loaded was lost."""
    (tmp_path / "slow").touch()
    async with process("--bundle", str(tmp_path)) as child:
        assert child.stdout is not None
        assert await asyncio.wait_for(child.stdout.readline(), 30) == b"loading\n"
        child.send_signal(signal.SIGTERM)
        _, stderr = await asyncio.wait_for(child.communicate(), 10)
    assert child.returncode == 0
    assert [json.loads(entry)["event"] for entry in stderr.decode().splitlines()] == ["stopped_during_start"]


async def test_a_second_signal_ends_the_process_whatever_it_does(tmp_path: Path) -> None:
    (tmp_path / "slow").touch()
    (tmp_path / "unresponsive").touch()
    async with process("--bundle", str(tmp_path)) as child:
        assert child.stdout is not None
        assert await asyncio.wait_for(child.stdout.readline(), 30) == b"loading\n"
        async with asyncio.timeout(10):
            while child.returncode is None:
                with contextlib.suppress(ProcessLookupError):
                    child.send_signal(signal.SIGTERM)  # signals that meet before they are seen are one
                await asyncio.sleep(0.05)
    assert child.returncode == 128 + signal.SIGTERM


async def test_a_port_in_use_is_a_reason_not_to_start(tmp_path: Path) -> None:
    async with running(settings(tmp_path), [Echo().registration()]) as server:
        code, stderr = await ended("--bundle", str(tmp_path), "--port", str(server.port))
    assert code == 1
    assert f"cannot listen on {server.address}" in stderr
    assert "--port (TEST_ECHO_PORT)" in stderr
    assert "Traceback" not in stderr


@pytest.mark.parametrize("host", ["a..b", "a" * 300])
async def test_a_metrics_host_that_cannot_be_a_name_is_a_reason_not_to_start(tmp_path: Path, host: str) -> None:
    code, stderr = await ended("--bundle", str(tmp_path), "--metrics-port", "0", "--metrics-host", host)
    assert code == 2
    assert "--metrics-host (TEST_ECHO_METRICS_HOST)" in stderr
    assert "Traceback" not in stderr


async def test_a_broken_bundle_is_a_reason_not_to_start(tmp_path: Path) -> None:
    (tmp_path / "broken").touch()
    code, stderr = await ended("--bundle", str(tmp_path))
    assert code == 1
    (entry,) = stderr.splitlines()
    assert json.loads(entry)["reason"] == "manifest.json: not there"


async def test_a_bad_setting_ends_with_code_2_and_one_line(tmp_path: Path) -> None:
    code, stderr = await ended("--bundle", str(tmp_path), "--port", "high")
    assert code == 2
    (line,) = stderr.splitlines()
    assert line.startswith("echo: --port (TEST_ECHO_PORT): ")
