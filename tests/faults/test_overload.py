"""More to do than a replica can: who is served, who waits, and what the others are told."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, cast

import grpc
import pytest
from google.rpc import error_details_pb2, status_pb2

from atspeed.local.stack import LocalStack, ServiceProcess
from atspeed.rpc.admission import PRIORITY_HEADER
from atspeed.rpc.grpc_status import PUSHBACK_HEADER, STATUS_HEADER
from atspeed.v1 import recommendation_pb2 as pb
from tests.faults.conftest import Case
from tests.serving import (
    LIVENESS_SECONDS,
    RECOMMENDATION,
    SERVING,
    Client,
    assert_same_list,
    check_health,
    ids,
    request_of,
    resume,
    suspend,
    until,
)

BUSY = grpc.StatusCode.RESOURCE_EXHAUSTED


@pytest.fixture(scope="module")
def small_service(shared_stack: LocalStack, log_folder: Path) -> Iterator[ServiceProcess]:
    """An orchestrator that serves one request at a time, without a draft, and lets two wait."""
    flags = {
        **{name: value for name, value in shared_stack.orchestrators[0].flags.items() if name != "draft"},
        "max-running": 1,
        "max-queued": 2,
        "target-pass-seconds": 60,
    }
    service = ServiceProcess("orchestrator", flags, log_folder / "small.log")
    service.start()
    yield service
    service.stop()


@pytest.fixture
def small(small_service: ServiceProcess, stack: LocalStack) -> Iterator[Client]:
    with Client(small_service.address) as client:
        yield client


@pytest.fixture
def waiting(stack: LocalStack, small: Client, cases: list[Case]) -> Iterator[ThreadPoolExecutor]:
    """While no target answers, one request is being served, so that the next ones wait. A pool to send them from."""
    small.recommend(cases[0].history)  # the channel to the targets is up
    with ThreadPoolExecutor(16) as pool:
        for target in stack.targets:
            suspend(target)
        first = pool.submit(small.recommend, cases[0].history)
        until(lambda: small.info().running_recommendations == 1)
        yield pool
        for target in stack.targets:
            resume(target)
        assert len(first.result().items) == 5


def queued(pool: ThreadPoolExecutor, client: Client, call: Callable[[], Any]) -> Future[Any]:
    """A call, once it waits for its turn."""
    before = client.info().waiting_recommendations
    future = pool.submit(call)
    until(lambda: client.info().waiting_recommendations > before)
    return future


def refusal_of(call: Callable[[], Any]) -> grpc.Call:
    """How a call is refused."""
    with pytest.raises(grpc.RpcError) as refusal:
        call()
    return cast("grpc.Call", refusal.value)


def trailers(status: grpc.Call) -> dict[str, str | bytes]:
    return dict(status.trailing_metadata() or ())


def hint_of(refusal: grpc.Call) -> int:
    """The milliseconds after which a refused caller may try again: the same in the detail and in the trailer."""
    detail = status_pb2.Status.FromString(cast("bytes", trailers(refusal)[STATUS_HEADER]))
    info = error_details_pb2.RetryInfo()
    assert detail.details[-1].Unpack(info)
    assert info.retry_delay.ToMilliseconds() == int(str(trailers(refusal)[PUSHBACK_HEADER]))
    return int(info.retry_delay.ToMilliseconds())


def test_excess_calls_are_refused_with_a_hint_and_others_are_served(
    stack: LocalStack, small: Client, cases: list[Case], waiting: ThreadPoolExecutor
) -> None:
    held = [queued(waiting, small, lambda case=case: small.recommend(case.history, k=20)) for case in cases[:2]]  # type: ignore[misc]
    refusal = refusal_of(lambda: small.recommend(cases[2].history))
    assert refusal.code() is BUSY
    assert hint_of(refusal) > 0
    assert check_health(small.channel, RECOMMENDATION) == check_health(small.channel, "") == SERVING
    for target in stack.targets:
        resume(target)
    for future, case in zip(held, cases, strict=False):
        assert_same_list(future.result(), case.expected)


@pytest.mark.parametrize("by_metadata", [False, True])
def test_batch_requests_make_room_for_interactive_ones(
    small: Client, cases: list[Case], waiting: ThreadPoolExecutor, by_metadata: bool
) -> None:
    """The second of two waiting batch requests is refused when somebody comes who waits for the answer."""

    def batch() -> pb.RecommendResponse:
        fields = {} if by_metadata else {"priority": pb.PRIORITY_BATCH}
        metadata = ((PRIORITY_HEADER, "batch"),) if by_metadata else ()
        request = request_of(cases[0].history, **fields)
        return small.stub.Recommend(request, timeout=LIVENESS_SECONDS, metadata=metadata)

    first, second = queued(waiting, small, batch), queued(waiting, small, batch)
    assert refusal_of(batch).code() is BUSY
    interactive = waiting.submit(small.recommend, cases[1].history)
    assert cast("grpc.Call", second.exception()).code() is BUSY
    assert not first.done()
    assert not interactive.done()


def test_the_requests_of_a_batch_are_refused_one_by_one(
    stack: LocalStack, small: Client, cases: list[Case], waiting: ThreadPoolExecutor
) -> None:
    """They share places and queue with all others; two wait, and the rest is told when to come back."""
    batch = waiting.submit(small.batch, [request_of(case.history, k=20) for case in cases[:5]])
    until(lambda: small.info().waiting_recommendations == 2)
    for target in stack.targets:
        resume(target)
    results = batch.result()
    refused = [result.error for result in results.values() if result.HasField("error")]
    assert len(refused) == 3
    for error in refused:
        assert error.code == BUSY.value[0]
        assert any(detail.Is(error_details_pb2.RetryInfo.DESCRIPTOR) for detail in error.details)
    for index, result in results.items():
        if result.HasField("response"):
            assert_same_list(result.response, cases[index].expected)


def test_fewer_beams_only_for_a_request_that_waited_and_allows_it(
    stack: LocalStack, small: Client, cases: list[Case], waiting: ThreadPoolExecutor
) -> None:
    history = cases[0].history
    fields = {"k": 5, "beam_width": 20}
    stubborn = queued(waiting, small, lambda: small.recommend(history, **fields))
    lenient = queued(waiting, small, lambda: small.recommend(history, **fields, least_beam_width=6))
    for target in stack.targets:
        resume(target)
    assert (stubborn.result().beam_width, stubborn.result().degraded) == (20, False)
    assert (lenient.result().beam_width, lenient.result().degraded) == (6, True)
    assert list(lenient.result().degraded_reasons) == [pb.DEGRADED_REASON_BEAM_WIDTH_NARROWED]
    calm = small.recommend(history, **fields, least_beam_width=6)
    assert (calm.beam_width, calm.degraded, ids(calm)) == (20, False, ids(stubborn.result()))
    assert ids(lenient.result()) == ids(small.recommend(history, k=5, beam_width=6))


def test_a_request_that_is_given_up_leaves_the_queue(
    small: Client, cases: list[Case], waiting: ThreadPoolExecutor
) -> None:
    """By its deadline or by its caller; nothing is computed for it."""
    late = refusal_of(lambda: small.recommend(cases[0].history, timeout=0.3))
    assert late.code() in {grpc.StatusCode.DEADLINE_EXCEEDED, BUSY}
    call = small.stub.Recommend.future(request_of(cases[0].history), timeout=LIVENESS_SECONDS)
    until(lambda: small.info().waiting_recommendations == 1)
    call.cancel()
    until(lambda: small.info().waiting_recommendations == 0)


def test_a_flood_gets_right_lists_or_hints_and_leaves_nothing_behind(
    small_service: ServiceProcess, small: Client, cases: list[Case]
) -> None:
    """Many more calls at once than there are places: no other code, every refusal logged, memory as before, all served again."""
    asked = [cases[number % len(cases)] for number in range(400)]
    before, logged = resident_mb(small_service), small_service.log.stat().st_size
    calls = [
        small.stub.Recommend.future(request_of(case.history, k=20), timeout=LIVENESS_SECONDS, wait_for_ready=True)
        for case in asked
    ]
    assert check_health(small.channel, RECOMMENDATION) == SERVING
    refused = 0
    for call, case in zip(calls, asked, strict=True):
        if (failure := call.exception()) is None:
            assert_same_list(call.result(), case.expected)
        else:
            refusal = cast("grpc.Call", failure)
            assert refusal.code() is BUSY, refusal.details()
            assert hint_of(refusal) > 0
            refused += 1
    assert 0 < refused < len(asked)
    lines = small_service.log.read_bytes()[logged:].splitlines()
    assert sum(json.loads(line).get("code") == "RESOURCE_EXHAUSTED" for line in lines) == refused
    assert resident_mb(small_service) - before < 20
    for case in cases[:5]:
        assert_same_list(small.recommend(case.history, k=20), case.expected)


def resident_mb(service: ServiceProcess) -> float:
    """MiB that a process holds."""
    assert service.process is not None
    pages = int(Path(f"/proc/{service.process.pid}/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 2**20
