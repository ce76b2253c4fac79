"""One of three replicas ends, in order or at once, while requests run: no call fails and no list changes."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from atspeed.local.redis_server import LocalRedis
from atspeed.local.stack import LocalStack, ServiceProcess
from tests.faults.conftest import Case
from tests.faults.load import Load
from tests.serving import Client, resume, suspend

PATIENT = {
    "planner": "fixed",
    "draft-timeout-seconds": 60,
    "draft-timeout-factor": 10_000,
}  # a draft is late on a busy machine
TIMES = [1, pytest.param(30, marks=pytest.mark.long)]


@pytest.fixture(scope="module")
def shared_trio(bundle: Path, redis_server: LocalRedis, log_folder: Path) -> Iterator[LocalStack]:
    """Three of each service."""
    folder = log_folder / "trio"
    folder.mkdir()
    three = {"drafts": 3, "targets": 3, "orchestrators": 3}
    flags: dict[str, dict[str, object]] = {"target": {"threads": 1}, "orchestrator": PATIENT}
    with LocalStack(bundle, redis_url=redis_server.url, log_folder=folder, flags=flags, **three) as stack:
        yield stack


@pytest.fixture
def trio(redis_url: str, shared_trio: LocalStack) -> Iterator[LocalStack]:
    yield shared_trio
    for service in shared_trio.services:
        resume(service)
        if not service.running:
            service.start()


@pytest.fixture
def balanced(trio: LocalStack) -> Iterator[Client]:
    """Client with the addresses of all three orchestrators."""
    with Client.of_replicas([orchestrator.address for orchestrator in trio.orchestrators]) as client:
        yield client


@pytest.mark.parametrize("times", TIMES)
@pytest.mark.parametrize("kind", ["targets", "orchestrators", pytest.param("drafts", marks=pytest.mark.long)])
def test_stopped_in_order(trio: LocalStack, balanced: Client, cases: list[Case], kind: str, times: int) -> None:
    """After SIGTERM running calls end on the replica and new ones use the others. A restarted replica is used again."""
    replicas: list[ServiceProcess] = getattr(trio, kind)
    with Load(balanced, cases) as load:
        for number in range(times):
            load.goes_on()
            victim = replicas[number % len(replicas)]
            victim.stop()
            load.goes_on()
            victim.start()
    if kind != "drafts":
        assert {reason for _, reply in load.answers for reason in reply.degraded_reasons} == set()


@pytest.mark.parametrize("times", TIMES)
def test_a_target_killed_with_streams_open(trio: LocalStack, balanced: Client, cases: list[Case], times: int) -> None:
    """kill -9 while streams wait for the replica, which hangs first: another one takes them up."""
    with Load(balanced, cases, callers=9) as load:
        for number in range(times):
            victim = trio.targets[number % 3]
            suspend(victim)
            load.waits()
            victim.kill()
            load.goes_on()
            victim.start()
    assert load.retries > 0


@pytest.mark.parametrize("times", TIMES[1:])
def test_an_orchestrator_killed(trio: LocalStack, balanced: Client, cases: list[Case], times: int) -> None:
    """kill -9: a recommendation changes nothing, so the client asks another replica."""
    with Load(balanced, cases) as load:
        for number in range(times):
            victim = trio.orchestrators[number % 3]
            load.goes_on()
            victim.kill()
            load.goes_on()
            victim.start()
