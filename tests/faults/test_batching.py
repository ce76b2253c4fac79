"""A target that is flooded with passes: a request that is cancelled or late leaves the queue, and all memory is free again."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import cast

import grpc
import numpy as np
import pytest

from atspeed.engine.bundle.manifest import read_manifest
from atspeed.local.stack import ServiceProcess
from atspeed.rpc import wire
from atspeed.v1 import target_pb2, target_pb2_grpc
from tests.observed import scrape
from tests.serving import LIVENESS_SECONDS, EvaluateStream, models, until

SHORT, LONG, PLACES = 8, 60, 11
# A short pass waits a minute for others, and never has enough: so many rows are less than a full batch. A long one fills
# a batch by itself.
PATIENT = {"batch-delay-ms": 60_000, "batch-tokens": 100, "batch-requests": 64, "max-queued-passes": PLACES}


@pytest.fixture(scope="module")
def target(bundle: Path, log_folder: Path) -> Iterator[ServiceProcess]:
    flags = {"bundle": bundle, "warm-up-seconds": 0, "threads": 1, "metrics-port": 0, **PATIENT}
    service = ServiceProcess("target_service", flags, log_folder / "patient.log")
    service.start()
    yield service
    service.stop()


@pytest.fixture
def channel(target: ServiceProcess) -> Iterator[grpc.Channel]:
    with models(target.address) as channel:
        yield channel


@pytest.fixture
def version(bundle: Path) -> str:
    return read_manifest(bundle).model_version("target")


def question(version: str, tokens: int, seed: int) -> target_pb2.EvaluateRequest:
    """The root, after a prompt."""
    prompt = np.random.default_rng(seed).integers(3, 10, tokens)
    start = target_pb2.EvaluateStart(model_version=version, prompt=wire.to_array(prompt))
    return target_pb2.EvaluateRequest(start=start, nodes=wire.to_array(np.zeros(1, dtype=np.int32)))


def waiting(target: ServiceProcess) -> float:
    """Passes in the queue."""
    return scrape(target).value("atspeed_waiting_passes")


def passes(target: ServiceProcess) -> float:
    """Passes that were run for requests so far."""
    return scrape(target).value("atspeed_pass_requests_count")


def assert_idle(target: ServiceProcess, within: float = LIVENESS_SECONDS) -> None:
    """Soon nothing waits and nothing is held any more."""
    begun = time.monotonic()
    for gauge in ("atspeed_waiting_passes", "atspeed_open_trees", "atspeed_open_tree_kv_bytes"):
        until(lambda gauge=gauge: scrape(target).value(gauge) == 0)  # type: ignore[misc]
    assert time.monotonic() - begun <= within


def flood(channel: grpc.Channel, questions: Sequence[target_pb2.EvaluateRequest], timeout: float) -> list[grpc.Call]:
    """One stream for each question, all at once."""
    stub: target_pb2_grpc.TargetServiceStub = target_pb2_grpc.TargetServiceStub(channel)
    calls = [stub.Evaluate(iter([question]), timeout=timeout, wait_for_ready=True) for question in questions]
    return cast("list[grpc.Call]", calls)


WITHIN = [LIVENESS_SECONDS, pytest.param(1.0, marks=pytest.mark.long)]


@pytest.mark.parametrize("within", WITHIN)
def test_a_flood_that_is_cancelled_leaves_nothing_behind(
    target: ServiceProcess, channel: grpc.Channel, version: str, within: float
) -> None:
    """No part of such a request is computed. The streams beyond the queue are refused at once."""
    before = passes(target)
    calls = flood(channel, [question(version, SHORT, n) for n in range(PLACES)], LIVENESS_SECONDS)
    until(lambda: waiting(target) == PLACES)
    assert scrape(target).value("atspeed_open_tree_kv_bytes") > 0
    with EvaluateStream(channel) as stream, pytest.raises(grpc.RpcError) as refusal:
        stream.ask(question(version, SHORT, PLACES))
    status = cast("grpc.Call", refusal.value)
    assert (status.code(), status.details()) == (
        grpc.StatusCode.RESOURCE_EXHAUSTED,
        f"max_queued_passes: {PLACES} passes wait already",
    )
    calls[0].cancel()
    until(lambda: waiting(target) == PLACES - 1)
    for call in calls:
        call.cancel()
    assert_idle(target, within)
    assert passes(target) == before


@pytest.mark.parametrize("within", WITHIN)
def test_a_pass_whose_deadline_is_over_is_never_begun(
    target: ServiceProcess, channel: grpc.Channel, version: str, within: float
) -> None:
    before = passes(target)
    calls = flood(channel, [question(version, SHORT, n) for n in range(PLACES)], timeout=1)
    assert {call.code() for call in calls} == {grpc.StatusCode.DEADLINE_EXCEEDED}
    assert_idle(target, within)
    assert passes(target) == before


def test_the_replica_serves_as_before(target: ServiceProcess, channel: grpc.Channel, version: str) -> None:
    """Another flood, and then a pass that fills a batch by itself: it is computed alone, as soon as it is the oldest."""
    calls = flood(channel, [question(version, SHORT, n) for n in range(PLACES)], LIVENESS_SECONDS)
    until(lambda: waiting(target) == PLACES)
    for call in calls:
        call.cancel()
    until(lambda: waiting(target) == 0)
    with EvaluateStream(channel) as stream:
        assert stream.ask(question(version, LONG, seed=1)).statistics.batch_requests == 1
    assert_idle(target)
