"""The Python clients against a server in this process: both give the same, from a loop, a thread and a module's level."""

from __future__ import annotations

import asyncio
import inspect
import threading
from collections.abc import Callable
from datetime import UTC, datetime
from typing import Any

import grpc
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from atspeed.rpc.addresses import target_uri
from atspeed.v1 import recommendation_pb2 as pb
from atspeed_client import (
    AsyncClient,
    CallError,
    Client,
    ClientStateError,
    Event,
    Mode,
    Recommendation,
    RecommenderError,
    RecommendRequest,
    Track,
    UserEvents,
    Violation,
    addresses,
)
from tests.fake_service import FakeService, connected, serving

BUSY = grpc.StatusCode.RESOURCE_EXHAUSTED
DOWN = grpc.StatusCode.UNAVAILABLE


async def results_of(client: AsyncClient, requests: list[RecommendRequest]) -> dict[int, Recommendation | CallError]:
    return {index: result async for index, result in client.recommend_batch(requests)}


async def called(kind: str, address: str, name: str, *arguments: Any, **options: Any) -> Any:
    """The result of one call of a sync or async client."""
    if kind == "async":
        async with AsyncClient(address) as client:
            return await getattr(client, name)(*arguments, **options)

    def blocking() -> Any:
        with Client(address) as client:
            return getattr(client, name)(*arguments, **options)

    return await asyncio.to_thread(blocking)


@pytest.mark.parametrize("kind", ["sync", "async"])
async def test_batches_of_events(kind: str) -> None:
    """Each user has a result, a call is made again, and a mistake names its place before anything is sent."""
    service = FakeService()
    service.failures, service.code = 1, DOWN
    async with serving(service) as address:
        batch = [
            UserEvents("alice", ["a", Event("b")], tenant="shop"),
            UserEvents("lost", ["a"]),
            UserEvents("bob", "x"),
        ]
        with pytest.raises(RecommenderError, match=r"batch\[2\].events: "):
            await called(kind, address, "record_batch", batch)
        for wrong, problem in (([], "batch: must hold"), ([("alice", ["a"])], r"batch\[0\]: must be a UserEvents")):
            with pytest.raises(RecommenderError, match=problem):
                await called(kind, address, "record_batch", wrong)
        alice, lost = await called(kind, address, "record_batch", batch[:2])
    assert alice.history_length == 2
    assert (lost.code, lost.message) == (DOWN, "histories are out of reach")
    first, again = service.calls
    assert first == again
    assert first.requests[0].tenant == "shop"
    assert all(event.event_id for request in first.requests for event in request.events)


@pytest.mark.parametrize("kind", ["sync", "async"])
async def test_calls(kind: str) -> None:
    """Every call, with its result."""
    service = FakeService()
    async with serving(service) as address:
        reply = await called(kind, address, "recommend", "alice", k=3, mode=Mode.TARGET_ONLY)
        assert (reply.item_ids, reply.mode, reply.recommendation_id) == (["i"], "target-only", "rec-1")
        assert [reply.request_id] == service.request_ids
        explained = await called(
            kind, address, "explain", RecommendRequest("alice"), items=["x"], wider_beam_width=50, track="canary"
        )
        assert (explained.response.item_ids, explained.wider_beam_width, service.tracks) == (["i"], 50, ["canary"])
        assert [(item.item_id, item.outcome) for item in explained.items] == [("x", "unknown-item")]
        recorded = await called(kind, address, "record", "alice", ["a", Event("b", type="buy")])
        assert recorded.history_length == 2
        history = await called(kind, address, "history", "alice")
        assert history.item_ids == ["a", "b"]
        assert history.events[1] == Event("b", datetime(1970, 1, 1, 0, 0, 5, tzinfo=UTC), "", 0.0, "e")
        assert await called(kind, address, "forget", "alice") is True
        assert await called(kind, address, "forget", "bob") is False
        assert (await called(kind, address, "info")).bundle_name == "fake"


def test_both_clients_have_the_same_calls() -> None:
    """With the same arguments; only what they return is awaited."""
    for name, method in inspect.getmembers(Client, inspect.isfunction):
        if not name.startswith("_"):
            own, other = (inspect.signature(one).parameters for one in (method, getattr(AsyncClient, name)))
            assert own == other, name
    assert inspect.signature(Client).parameters == inspect.signature(AsyncClient).parameters
    options = set(inspect.signature(RecommendRequest).parameters)
    assert set(inspect.signature(Client.recommend).parameters) == options | {"self", "track", "timeout_seconds"}


async def test_a_client_is_made_anywhere_and_used_in_many_loops_and_threads() -> None:
    """At a module's level, in several event loops one after another and at once, and blocking beside a running loop."""
    async with serving(FakeService()) as address:
        shared, blocking = AsyncClient(address), Client(address)
        assert (await shared.recommend("alice")).item_ids == ["i"]

        async def several() -> list[list[str]]:
            return [reply.item_ids for reply in await asyncio.gather(*(shared.recommend("u") for _ in range(3)))]

        for _ in range(2):
            assert await asyncio.to_thread(lambda: asyncio.run(several())) == [["i"]] * 3
        found: list[list[str]] = []
        threads = [threading.Thread(target=lambda: found.append(blocking.recommend("u").item_ids)) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            await asyncio.to_thread(thread.join)
        assert found == [["i"]] * 4
        await shared.close()
        blocking.close()
        with pytest.raises(ClientStateError, match="closed"):
            blocking.info()


async def test_a_tenants_users_are_its_own() -> None:
    """Every call about a stored history carries the tenant, or none."""
    service = FakeService()
    async with connected(service) as client:
        for tenant in ("shop", ""):
            await client.record("alice", ["a", "b"], tenant=tenant)
            await client.history("alice", tenant=tenant)
            await client.forget("alice", tenant=tenant)
            await client.recommend("alice", tenant=tenant)
    assert [call.tenant for call in service.calls] == ["shop"] * 4 + [""] * 4


@pytest.mark.parametrize("kind", ["sync", "async"])
async def test_an_error_carries_what_the_service_says(kind: str) -> None:
    """One exception type, whatever the service answered."""
    async with serving(FakeService()) as address:
        with pytest.raises(RecommenderError, match=r"^NOT_FOUND: user_id: no history") as caught:
            await called(kind, address, "recommend", "nobody")
    error = caught.value
    assert isinstance(error, CallError)
    assert (error.code, error.reason) == (grpc.StatusCode.NOT_FOUND, "HISTORY_NOT_FOUND")
    assert error.violations == (Violation("user_id", "no history is stored for this user"),)
    assert (error.field, error.request_id, error.attempts) == ("user_id", "r-1", 1)
    assert error.retry_after_seconds is None


@pytest.mark.parametrize("kind", ["sync", "async"])
@pytest.mark.parametrize("code", [BUSY, DOWN])
async def test_busy_and_unavailable_services_are_asked_again(kind: str, code: grpc.StatusCode) -> None:
    """Under the same request id; a new event has a key, so it can be sent again too, with the same one."""
    service = FakeService(failures=2, code=code)
    async with serving(service) as address:
        await called(kind, address, "recommend", "alice")
        assert len(service.calls) == 3
        assert len(set(service.request_ids)) == 1
        service.calls.clear()
        service.failures = 1
        await called(kind, address, "record", "alice", ["a"])
    first, again = service.calls
    assert first == again
    assert first.events[0].event_id


async def test_retries_end() -> None:
    """After so many, and at once without a hint, for other statuses, and for an event without a key whose fate is open."""
    service = FakeService(failures=100, code=BUSY)
    async with connected(service, retries=1) as client:
        with pytest.raises(CallError) as caught:
            await client.recommend("a")
        assert (caught.value.attempts, len(service.calls)) == (2, 2)
        assert caught.value.retry_after_seconds == 0.02
        service.calls.clear()
        service.code = grpc.StatusCode.INTERNAL
        with pytest.raises(CallError):
            await client.recommend("a")
        assert len(service.calls) == 1
        service.calls.clear()
        service.code = DOWN
        with pytest.raises(CallError, match="UNAVAILABLE"):
            await client.record("alice", [Event("a", event_id="")])
        assert len(service.calls) == 1


async def test_a_hint_beyond_the_deadline_ends_the_call_at_once() -> None:
    """Waiting for it could not help; the caller learns the hint instead."""
    service = FakeService(failures=100, code=BUSY, hint=3600.0)
    async with connected(service) as client:
        with pytest.raises(CallError, match="RESOURCE_EXHAUSTED") as caught:
            await client.recommend("a")
    assert (caught.value.retry_after_seconds, len(service.calls)) == (3600.0, 1)


async def test_a_closed_client_ends_blocking_calls() -> None:
    """They raise what closing means, and not an error of gRPC."""
    service = FakeService(delay=60.0)
    async with serving(service) as address:
        client = Client(address)
        call = asyncio.create_task(asyncio.to_thread(client.recommend, "a"))
        await service.reached.wait()
        client.close()
        with pytest.raises(CallError, match="closed during the call") as caught:
            await call
    assert caught.value.code is grpc.StatusCode.CANCELLED


@pytest.mark.parametrize("kind", ["sync", "async"])
async def test_batch_gives_lists_and_errors_by_index(kind: str) -> None:
    """One that fails is a value, and those that a busy service refuses are asked for again."""
    requests = [RecommendRequest("alice", k=1), RecommendRequest("bob", k=10_000), RecommendRequest("eve", k=3)]
    service = FakeService(refused=3)
    async with serving(service) as address:
        if kind == "async":
            async with AsyncClient(address, retries=3) as client:
                results = await results_of(client, requests)
        else:
            with Client(address, retries=3) as blocking:
                results = await asyncio.to_thread(lambda: dict(blocking.recommend_batch(requests)))
    lists = {index: result.beam_width for index, result in results.items() if isinstance(result, Recommendation)}
    assert lists == {0: 1, 2: 3}
    failed = results[1]
    assert isinstance(failed, CallError)
    assert (failed.code, failed.message, failed.field) == (grpc.StatusCode.INVALID_ARGUMENT, "k: too large", "k")
    assert [len(call.requests) for call in service.calls] == [3, 2, 1]


async def test_a_batch_that_stays_refused_says_so() -> None:
    service = FakeService(refused=1000)
    async with connected(service, retries=2) as client:
        results = await results_of(client, [RecommendRequest("a"), RecommendRequest("b")])
    assert [isinstance(one, CallError) and one.attempts for one in results.values()] == [3, 3]
    assert len(service.calls) == 3


async def test_the_deadline_travels_and_ends_the_call() -> None:
    """The service sees how long it has, and the caller never waits longer."""
    service = FakeService(delay=5.0)
    for of_client, of_call in (({"timeout_seconds": 0.3}, {}), ({}, {"timeout_seconds": 0.3})):
        async with connected(service, **of_client) as client:
            with pytest.raises(RecommenderError, match="DEADLINE_EXCEEDED"):
                await client.recommend("alice", **of_call)  # type: ignore[arg-type]
        assert service.time_left is not None
        assert service.time_left <= 0.3


@pytest.mark.parametrize("kind", ["sync", "async"])
async def test_unreachable_service_is_unavailable(kind: str) -> None:
    """A refused connection is UNAVAILABLE like any other."""
    with pytest.raises(RecommenderError) as caught:
        await called(kind, "127.0.0.1:1", "info")
    assert caught.value.code is DOWN


def test_requests() -> None:
    """Names of options are those of the contract or shorter; a mode that is not set is strict."""
    request = RecommendRequest(
        history=["a"],
        k=5,
        beam_width=9,
        mode=Mode.EXACT_SAMPLING,
        seed=0,
        excluded=["b"],
        allowed=["c"],
        tenant="t",
        priority="batch",
        statistics=False,
    )
    assert request.message == pb.RecommendRequest(
        history=pb.History(item_ids=["a"]),
        k=5,
        beam_width=9,
        mode=pb.MODE_EXACT_SAMPLING,
        seed=0,
        excluded_item_ids=["b"],
        allowed_item_ids=["c"],
        tenant="t",
        priority=pb.PRIORITY_BATCH,
        reply_options=pb.ReplyOptions(omit_statistics=True),
    )
    assert RecommendRequest("u", beam_widths=(2, 9)).message.beam_widths == [2, 9]
    assert RecommendRequest("u").message == pb.RecommendRequest(user_id="u", k=10, mode=pb.MODE_STRICT)
    assert RecommendRequest(history=[]).message.WhichOneof("subject") == "history"


@pytest.mark.parametrize("subject", [{}, {"user_id": "u", "history": ["a"]}])
def test_a_request_has_one_subject(subject: Any) -> None:
    """Neither or both would be refused by the service; it is a mistake in the calling program."""
    with pytest.raises(ValueError, match="either user_id or history"):
        RecommendRequest(**subject)


ADDRESSES: list[tuple[str, str]] = [
    ("localhost:1", "dns:///localhost:1"),
    ("127.0.0.1:1", "ipv4:127.0.0.1:1"),
    ("10.0.0.1:1, 10.0.0.2:2", "ipv4:10.0.0.1:1,10.0.0.2:2"),
    ("[::1]:1", "ipv6:[::1]:1"),
    ("dns:///a.b:1", "dns:///a.b:1"),
    ("ipv4:1.2.3.4:5", "ipv4:1.2.3.4:5"),
    ("ipv6:[::1]:5", "ipv6:[::1]:5"),
    ("unix:/tmp/s", "unix:/tmp/s"),
]


@pytest.mark.parametrize(("address", "target"), ADDRESSES)
def test_addresses(address: str, target: str) -> None:
    """Names of enums, in the spelling of the services."""
    assert addresses.target(address) == target == target_uri(address)


@pytest.mark.parametrize(
    "address", ["nowhere", "a:0", "a:99999", "a:x", ":1", "::1:1", "1.2.3:4", "a:1,b:2", "1.2.3.4:1,[::1]:1", "unix:"]
)
def test_addresses_that_are_none(address: str) -> None:
    reads: list[Callable[[str], str]] = [addresses.target, target_uri]
    for read in reads:
        with pytest.raises(ValueError, match=r"HOST:PORT|IP:PORT|no address|mixed"):
            read(address)


HOSTS = ["a", "1.2.3.4", "[::1]", "::1", "a.b-c", "-x", ".y", "é", "1.2.3", "x_y", "", "999.1.1.1", " b", "a" * 70]
PORTS = [":1", ":65535", ":65536", ":0", ":x", "", ":１"]
SCHEMES = [
    "",
    "dns:",
    "dns:///",
    "dns://8.8.8.8/",
    "dns://8.8.8.8:53/",
    "ipv4:",
    "ipv6:",
    "unix:",
    "unix:///",
    "unix://",
]
endpoints = st.builds(str.__add__, st.sampled_from(HOSTS), st.sampled_from(PORTS))


@given(st.builds(str.__add__, st.sampled_from(SCHEMES), st.lists(endpoints, max_size=3).map(",".join)))
@settings(max_examples=200)
def test_addresses_are_those_of_the_services(address: str) -> None:
    """The client reads them by itself, since it imports nothing of the services."""

    def outcome(read: Callable[[str], str]) -> str | None:
        try:
            return read(address)
        except ValueError:
            return None

    assert outcome(addresses.target) == outcome(target_uri)


@pytest.mark.parametrize(
    ("track", "sent"), [(None, []), (Track.CANARY, ["canary"]), (Track.STABLE, ["stable"]), ("canary", ["canary"])]
)
async def test_track_travels_in_the_metadata(track: Track | str | None, sent: list[str]) -> None:
    service = FakeService()
    async with connected(service) as client:
        await client.recommend("alice", track=track)
    assert service.tracks == sent
