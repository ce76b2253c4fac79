"""Callers that go away, or whose time is over, in the middle of a pass: nothing more is computed for them, nothing is kept."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import grpc
import pytest

from atspeed.local.stack import LocalStack, ServiceProcess
from atspeed.v1 import recommendation_pb2 as pb
from tests.faults.conftest import Case, asking
from tests.observed import scrape
from tests.serving import LIVENESS_SECONDS, Client, request_of, resume, storm, suspend, until

CALLERS = 6
MODES = {"targets": pb.MODE_TARGET_ONLY, "drafts": pb.MODE_STRICT}  # several passes each, in the service that hangs

TREES = ("atspeed_open_trees", "atspeed_open_tree_kv_bytes")
Calls = Sequence[Any]  # grpc's type of a call that can be cancelled is not in the stubs


@pytest.fixture(scope="module")
def observed_stack(bundle: Path, log_folder: Path) -> Iterator[LocalStack]:
    """One of each, which tell what they hold, and an orchestrator that waits for its draft."""
    folder = log_folder / "given-up"
    folder.mkdir()
    patient = {
        "draft-timeout-seconds": 60,
        "draft-timeout-factor": 10_000,
        "planner": "fixed",
        "target-pass-seconds": 60,
    }
    flags: dict[str, dict[str, object]] = {
        "draft": {"metrics-port": 0},
        "target": {"metrics-port": 0, "threads": 1},
        "orchestrator": {"metrics-port": 0, **patient},
    }
    with LocalStack(bundle, log_folder=folder, flags=flags) as stack:
        yield stack


def gauge(service: ServiceProcess, name: str) -> float:
    """A number that a service exposes."""
    return scrape(service).value(name)


def passes(service: ServiceProcess) -> float:
    """Passes that a model service has finished."""
    return scrape(service).value("atspeed_pass_seconds_count", stage="forward")


def at_rest(stack: LocalStack) -> bool:
    """Return true if no service holds anything for a request."""
    held = [
        gauge(service, name)
        for service in stack.services
        for name in ("atspeed_admission_running", "atspeed_admission_queued")
    ]
    trees = [gauge(service, name) for service in (*stack.targets, *stack.drafts) for name in TREES]
    return not any(held) and not any(trees)


def cancelled(calls: Calls) -> None:
    for call in calls:
        call.cancel()


def expired(calls: Calls) -> None:
    for call in calls:
        assert call.exception().code() is grpc.StatusCode.DEADLINE_EXCEEDED


@pytest.mark.parametrize("kind", ["targets", "drafts"])
@pytest.mark.parametrize(("give_up", "seconds"), [(cancelled, LIVENESS_SECONDS), (expired, 3.0)])
@pytest.mark.parametrize("most_seconds", [LIVENESS_SECONDS, pytest.param(1.0, marks=pytest.mark.long)])
def test_nothing_is_left_of_them(
    observed_stack: LocalStack,
    cases: list[Case],
    kind: str,
    give_up: Callable[[Calls], None],
    seconds: float,
    most_seconds: float,
) -> None:
    """At most the pass that was under way for each is finished, of the several that each needs."""
    (service,) = getattr(observed_stack, kind)
    with Client(observed_stack.address) as client:
        storm(asking(client, cases[:2]), {})  # everything is connected
        until(lambda: at_rest(observed_stack))
        before = passes(service)
        suspend(service)
        requests = [request_of(case.history, k=20, mode=MODES[kind]) for case in cases[:CALLERS]]
        calls = [client.stub.Recommend.future(request, timeout=seconds) for request in requests]
        orchestrator = observed_stack.orchestrators[0]
        until(lambda: gauge(orchestrator, "atspeed_admission_running") == CALLERS or all(call.done() for call in calls))
        give_up(calls)
        until(lambda: gauge(orchestrator, "atspeed_admission_running") == 0)
        resume(service)
        begun = time.monotonic()
        until(lambda: at_rest(observed_stack))
        assert time.monotonic() - begun <= most_seconds
        assert passes(service) - before <= CALLERS
        assert len(client.recommend(cases[0].history).items) == 5
