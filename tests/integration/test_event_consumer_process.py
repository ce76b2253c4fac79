"""`atspeed consume-events` beside a real orchestrator: killed in the middle, nothing is lost and nothing doubled."""

from __future__ import annotations

import json
import os
import random
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from typer.testing import CliRunner

from atspeed.cli import main
from atspeed.rpc.healthcheck import state
from tests.integration.conftest import LIMITS
from tests.kafka import Kafka
from tests.serving import LIVENESS_SECONDS, Client

ROOT = Path(__file__).parents[2]
CAP = LIMITS["max-history-items"]


@pytest.fixture(scope="module")
def kafka() -> Kafka:
    return Kafka()


def start(kafka: Kafka, client: Client, topic: str, *more: str) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "atspeed.cli", "consume-events", "--brokers", kafka.address, "--topic", topic]
    return subprocess.Popen(
        [*command, "--address", client.address, *more],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )


def until(condition: Callable[[], bool], process: subprocess.Popen[bytes]) -> None:
    end = time.monotonic() + 2 * LIVENESS_SECONDS  # a start, and a session that expires
    while not condition():
        assert process.poll() is None, process.communicate()[0].decode()
        assert time.monotonic() < end
        time.sleep(0.05)


@pytest.fixture
def started() -> Iterator[list[subprocess.Popen[bytes]]]:
    processes: list[subprocess.Popen[bytes]] = []
    yield processes
    for process in processes:
        process.kill()
        process.communicate()


def test_killed_twice_in_the_middle_it_loses_nothing_and_doubles_nothing(
    kafka: Kafka, client: Client, started: list[subprocess.Popen[bytes]], tmp_path: Path
) -> None:
    """Events come twice and out of order. Half of them have no key: a message read twice is still stored once."""
    draw, users = random.Random(3), [f"user-{n}" for n in range(20)]
    sent: list[tuple[str, bytes]] = []
    expected: dict[str, list[tuple[int, str]]] = {user: [] for user in users}
    for number in range(800):
        user = draw.choice(users)
        event = {"item_id": f"item-{number}", "time": f"2024-05-01T00:{number // 60:02d}:{number % 60:02d}Z"}
        expected[user].append((number, f"item-{number}"))
        keyed = number % 2 == 0
        content = json.dumps({"user_id": user, "events": [event | ({"event_id": f"e{number}"} if keyed else {})]})
        sent += [(user, content.encode())] * (2 if keyed else 1)
    draw.shuffle(sent)
    kafka.send("killed", *sent)
    total = len(sent)
    # The brokers give a killed member's partitions away after its session.
    (tmp_path / "kafka.properties").write_text("session.timeout.ms = 6000\nheartbeat.interval.ms=1000\n")
    group = ("--group", "killed", "--kafka-config", str(tmp_path / "kafka.properties"))
    for share in (0.1, 0.5):
        process = start(kafka, client, "killed", "--batch-messages", "10", *group)
        started.append(process)
        until(lambda: kafka.committed("killed") > share * total, process)  # noqa: B023
        process.send_signal(signal.SIGKILL)
        process.wait()
        assert kafka.committed("killed") < total
    with socket.create_server(("127.0.0.1", 0)) as listener:
        health = f"127.0.0.1:{listener.getsockname()[1]}"
    process = start(kafka, client, "killed", *group, "--health", health)
    started.append(process)
    until(lambda: kafka.committed("killed") == total, process)
    assert state(health) == "SERVING"
    process.send_signal(signal.SIGTERM)
    assert process.wait(LIVENESS_SECONDS) == 0
    for user in users:
        assert client.history(user) == [item for _, item in sorted(expected[user])][-CAP:]


@pytest.mark.parametrize(
    ("arguments", "code", "problem"),
    [
        (["--kafka-config", "FILE"], 1, "line 2: enable.auto.commit is set by the command"),
        (["--address", "127.0.0.1:1", "--timeout", "0.5"], 69, ""),
        (["--format", "avro"], 2, "--format"),
        (["--batch-messages", "0"], 2, "--batch-messages"),
    ],
)
def test_mistakes_are_one_line(client: Client, tmp_path: Path, arguments: list[str], code: int, problem: str) -> None:
    (tmp_path / "kafka.properties").write_text("# TLS\nenable.auto.commit=true\n")
    given = [str(tmp_path / "kafka.properties") if one == "FILE" else one for one in arguments]
    done = CliRunner().invoke(
        main.app, ["consume-events", "--brokers", "127.0.0.1:1", "--address", client.address, *given]
    )
    assert (done.exit_code, done.output.count("\n")) == (code, 1), done.output
    assert problem in done.output
