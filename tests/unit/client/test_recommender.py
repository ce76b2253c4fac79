"""The Python client against a server in this process."""

from __future__ import annotations

from typing import Any

import grpc
import pytest

from atspeed.client.recommender import CallError, Mode, RecommenderClient, RecommenderError, recommend_request
from atspeed.rollout.release_track import Track
from atspeed.v1 import recommendation_pb2 as pb
from tests.fake_service import FakeService, connected


async def test_calls() -> None:
    """Every call, with its result."""
    async with connected(FakeService()) as client:
        reply = await client.recommend("alice", k=3, mode=Mode.TARGET_ONLY)
        assert [item.item_id for item in reply.items] == ["i"]
        assert reply.mode == pb.MODE_TARGET_ONLY
        assert (await client.record("alice", ["a", "b"])).history_length == 2
        assert await client.history("alice") == ["a", "b"]
        assert await client.forget("alice")
        assert not await client.forget("bob")
        assert (await client.info()).bundle_name == "fake"


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
    assert service.calls[0] == pb.RecordEventsRequest(
        user_id="alice", events=[pb.Event(item_id="a"), pb.Event(item_id="b")], tenant="shop"
    )


async def test_batch_gives_lists_and_errors_by_index() -> None:
    """One that fails is a value, so that it does not end the rest."""
    requests = [recommend_request("alice"), recommend_request("bob", k=10_000)]
    async with connected(FakeService()) as client:
        results = {index: result async for index, result in client.recommend_batch(requests)}
    assert isinstance(results[0], pb.RecommendResponse)
    failed = results[1]
    assert isinstance(failed, CallError)
    assert failed.code is grpc.StatusCode.INVALID_ARGUMENT
    assert failed.message == "k: too large"
    assert failed.field == "k"


async def test_an_error_carries_status_message_field_and_request_id() -> None:
    """One exception type, whatever the service answered."""
    async with connected(FakeService()) as client:
        with pytest.raises(RecommenderError, match=r"^NOT_FOUND: user_id: no history") as caught:
            await client.recommend("nobody")
    assert isinstance(caught.value, CallError)
    assert caught.value.code is grpc.StatusCode.NOT_FOUND
    assert caught.value.field == "user_id"
    assert caught.value.request_id == "r-1"


async def test_unavailable_is_retried_but_not_for_records() -> None:
    """A list may be asked for again; events recorded twice would be two events."""
    service = FakeService(failures=2)
    async with connected(service) as client:
        await client.recommend("alice")
        assert len(service.calls) == 3
        service.failures = 1
        with pytest.raises(RecommenderError, match="UNAVAILABLE"):
            await client.record("alice", ["a"])
    assert len(service.calls) == 4


async def test_the_deadline_travels_and_ends_the_call() -> None:
    """The service gets the deadline, and the caller never waits longer."""
    service = FakeService(delay=5.0)
    async with connected(service, timeout_seconds=0.3) as client:
        with pytest.raises(RecommenderError, match="DEADLINE_EXCEEDED"):
            await client.recommend("alice")
    assert service.time_left is not None
    assert service.time_left <= 0.3


async def test_unreachable_service_is_unavailable() -> None:
    """A refused connection is UNAVAILABLE like any other."""
    async with RecommenderClient("127.0.0.1:1", timeout_seconds=5.0) as client:
        with pytest.raises(RecommenderError) as caught:
            await client.info()
    assert caught.value.code is grpc.StatusCode.UNAVAILABLE


def test_requests() -> None:
    """Names of options are those of the contract or shorter; a mode that is not set is strict."""
    request = recommend_request(
        history=["a"], k=5, beam_width=9, mode=Mode.EXACT_SAMPLING, seed=0, excluded=["b"], allowed=["c"], tenant="t"
    )
    assert request == pb.RecommendRequest(
        history=pb.History(item_ids=["a"]),
        k=5,
        beam_width=9,
        mode=pb.MODE_EXACT_SAMPLING,
        seed=0,
        excluded_item_ids=["b"],
        allowed_item_ids=["c"],
        tenant="t",
    )
    assert recommend_request("u", beam_widths=(2, 9)).beam_widths == [2, 9]
    assert recommend_request("u") == pb.RecommendRequest(user_id="u", k=10, mode=pb.MODE_STRICT)
    assert recommend_request(history=[]).WhichOneof("subject") == "history"


@pytest.mark.parametrize("subject", [{}, {"user_id": "u", "history": ["a"]}])
def test_a_request_has_one_subject(subject: Any) -> None:
    """A user or a history is needed, and not both: anything else is a mistake in the calling program."""
    with pytest.raises(ValueError, match="either user_id or history"):
        recommend_request(**subject)


async def test_invalid_address_is_refused() -> None:
    """Said at once, not when the first call times out."""
    with pytest.raises(ValueError, match="not HOST:PORT"):
        RecommenderClient("nowhere")


@pytest.mark.parametrize(
    ("track", "sent"), [(None, []), (Track.CANARY, ["canary"]), (Track.STABLE, ["stable"]), ("canary", ["canary"])]
)
async def test_track_travels_in_the_metadata(track: Track | str | None, sent: list[str]) -> None:
    service = FakeService()
    async with connected(service) as client:
        await client.recommend("alice", track=track)
    assert service.tracks == sent
