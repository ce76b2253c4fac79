"""RecordEvents, GetHistory and ForgetUser through gRPC, and recommendations from what they keep."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, cast

import grpc
import pytest
from google.protobuf.timestamp_pb2 import Timestamp
from google.rpc import status_pb2

from atspeed.engine.bundle.catalogue import Catalogue
from atspeed.local.stack import LocalStack, ServiceProcess
from atspeed.v1 import recommendation_pb2 as pb
from tests.bundles import random_history
from tests.integration.conftest import LIMITS
from tests.serving import LIVENESS_SECONDS, Client, assert_same_list, refused, storm

INVALID = grpc.StatusCode.INVALID_ARGUMENT
LONG = "x" * 257
CAP = LIMITS["max-history-items"]


def forget(client: Client, user_id: str) -> bool:
    return client.stub.ForgetUser(pb.ForgetUserRequest(user_id=user_id), timeout=LIVENESS_SECONDS).existed


@pytest.fixture(scope="module")
def without_redis(shared_stack: LocalStack, log_folder: Path) -> Iterator[Client]:
    """An orchestrator that keeps no histories."""
    flags = {name: value for name, value in shared_stack.orchestrators[0].flags.items() if name != "redis-url"}
    service = ServiceProcess("orchestrator", flags, log_folder / "without-redis.log")
    service.start()
    with Client(service.address) as client:
        yield client
    service.stop()


class TestRoundTrip:
    def test_what_is_recorded_is_kept_in_order(self, client: Client) -> None:
        assert client.history("user") == []
        assert client.record("user", ["item-3", "item-1"]).history_length == 2
        assert client.record("user", ["item-2", "item-3"]).history_length == 4
        assert client.history("user") == ["item-3", "item-1", "item-2", "item-3"]
        assert client.history("other") == []

    def test_unknown_items_are_kept_and_named(self, client: Client) -> None:
        """A later snapshot of the catalogue may know them."""
        reply = client.record("user", ["ghost", "item-1", "phantom"])
        assert list(reply.unknown_item_ids) == ["ghost", "phantom"]
        assert client.history("user") == ["ghost", "item-1", "phantom"]
        recommendation = client.recommend(user_id="user")
        assert list(recommendation.unknown_history_item_ids) == ["ghost", "phantom"]
        assert recommendation.history_items_used == 1

    def test_the_newest_are_kept(self, client: Client) -> None:
        items = [f"item-{n}" for n in range(CAP)]
        assert client.record("user", items).history_length == CAP
        assert client.record("user", ["item-300", "item-301"]).history_length == CAP
        assert client.history("user") == [*items[2:], "item-300", "item-301"]

    def test_an_event_comes_back_with_all_its_fields(self, client: Client) -> None:
        reply = client.recommend(["item-1"])
        event = pb.Event(
            item_id="item-2",
            time=Timestamp(seconds=1_700_000_000, nanos=123_456_000),
            type="click",
            weight=0.0,
            event_id="e-1",
            recommendation_id=reply.recommendation_id,
        )
        request = pb.RecordEventsRequest(user_id="user", events=[event])
        first, again = (client.stub.RecordEvents(request, timeout=LIVENESS_SECONDS) for _ in range(2))
        assert (first.history_length, first.duplicate_events) == (1, 0)
        assert (again.history_length, again.duplicate_events) == (1, 1)
        stored = client.stub.GetHistory(pb.GetHistoryRequest(user_id="user"), timeout=LIVENESS_SECONDS)
        assert list(stored.events) == [event]

    def test_a_late_event_changes_the_list_as_its_time_says(self, client: Client, catalogue: Catalogue) -> None:
        first, late, last = random_history(catalogue, 3, seed=12)
        for item, seconds in ((first, 10), (last, 30), (late, 20)):
            event = pb.Event(item_id=item, time=Timestamp(seconds=seconds))
            client.stub.RecordEvents(pb.RecordEventsRequest(user_id="user", events=[event]), timeout=LIVENESS_SECONDS)
        assert client.history("user") == [first, late, last]
        assert_same_list(client.recommend(user_id="user"), client.recommend([first, late, last]))

    def test_forgetting_is_complete(self, client: Client) -> None:
        client.record("user", ["item-1"])
        client.record("other", ["item-2"])
        assert forget(client, "user") is True
        assert forget(client, "user") is False
        assert client.history("user") == []
        assert client.history("other") == ["item-2"]
        with refused(grpc.StatusCode.NOT_FOUND, "user_id"):
            client.recommend(user_id="user")

    def test_an_event_changes_the_next_list(self, client: Client, catalogue: Catalogue) -> None:
        """The list is always that of the history as it stands."""
        history = random_history(catalogue, 4, seed=2)
        for length in range(1, 5):
            client.record("user", [history[length - 1]])
            assert_same_list(client.recommend(user_id="user"), client.recommend(history[:length]))

    @pytest.mark.parametrize("text", [" ", "é漢", "a\nb", "a\x00b", '"', "x" * 256, "history:user", "*"])
    def test_ids_are_taken_as_they_are(self, client: Client, text: str) -> None:
        client.record(text, [text])
        assert client.history(text) == [text]
        assert client.history("user") == []
        assert forget(client, text) is True

    def test_concurrent_events_of_one_user_are_all_kept(self, client: Client, catalogue: Catalogue) -> None:
        """Recommendations in between see some beginning of them."""
        items = random_history(catalogue, 20, seed=4)
        client.record("user", ["item-0"])
        calls: list[Callable[[], Any]] = [lambda item=item: client.record("user", [item]) for item in items]  # type: ignore[misc]
        calls += [lambda: client.recommend(user_id="user")] * 5
        replies = storm(calls, {}, concurrency=8)
        assert sorted(reply.history_length for reply in replies[:20]) == list(range(2, 22))
        assert sorted(client.history("user")) == sorted(["item-0", *items])


def one(user_id: str, *item_ids: str, event_id: str = "") -> pb.RecordEventsRequest:
    events = [pb.Event(item_id=item, event_id=event_id) for item in item_ids]
    return pb.RecordEventsRequest(user_id=user_id, events=events)


def record_batch(client: Client, *requests: pb.RecordEventsRequest) -> list[pb.RecordEventsResult]:
    message = pb.RecordEventsBatchRequest(requests=requests)
    return list(client.stub.RecordEventsBatch(message, timeout=LIVENESS_SECONDS).results)


class TestBatchesOfEvents:
    def test_each_request_has_the_result_of_a_call_of_its_own(self, client: Client) -> None:
        """Requests of one user are carried out in their order, and one that is refused does not fail the others."""
        requests = [
            one("user", "item-3", "item-1"),
            one("other", "ghost"),
            one("user", ""),
            one("user", "item-2", event_id="e"),
            one("", "item-1"),
            one("user", "item-2", event_id="e"),
        ]
        results = record_batch(client, *requests)
        kinds = [result.WhichOneof("result") for result in results]
        assert kinds == ["response", "response", "error", "response", "error", "response"]
        assert client.history("user") == ["item-3", "item-1", "item-2"]
        assert client.history("other") == ["ghost"]
        lengths = [result.response.history_length for result in results]
        assert lengths == [2, 1, 0, 3, 0, 3]
        assert list(results[1].response.unknown_item_ids) == ["ghost"]
        assert results[5].response.duplicate_events == 1
        for result, request in ((results[2], requests[2]), (results[4], requests[4])):
            with pytest.raises(grpc.RpcError) as alone:
                client.stub.RecordEvents(request, timeout=LIVENESS_SECONDS)
            trailers: dict[str, Any] = dict(cast("Any", alone.value).trailing_metadata())
            expected = status_pb2.Status.FromString(trailers["grpc-status-details-bin"])
            assert result.error == expected

    def test_ten_thousand_events_fit_and_one_more_is_refused(self, client: Client) -> None:
        most = client.info().max_batch_events
        assert most == 10_000
        requests = [one(f"user-{number % 500}", f"item-{number}") for number in range(most)]
        results = record_batch(client, *requests)
        assert all(result.HasField("response") for result in results)
        assert client.history("user-7") == [f"item-{number}" for number in range(7, most, 500)]
        with refused(INVALID, "requests"):
            record_batch(client, *requests, one("user", "item-1"))
        assert client.history("user") == []
        with refused(INVALID, "requests"):
            record_batch(client)


REFUSED: list[tuple[str, str, Any]] = [
    ("user_id", "RecordEvents", pb.RecordEventsRequest(events=[pb.Event(item_id="item-1")])),
    ("user_id", "RecordEvents", pb.RecordEventsRequest(user_id=LONG, events=[pb.Event(item_id="item-1")])),
    ("events", "RecordEvents", pb.RecordEventsRequest(user_id="user")),
    ("events", "RecordEvents", pb.RecordEventsRequest(user_id="user", events=[pb.Event(item_id="item-1")] * (CAP + 1))),
    (
        "events[1].item_id",
        "RecordEvents",
        pb.RecordEventsRequest(user_id="user", events=[pb.Event(item_id="item-1"), pb.Event()]),
    ),
    (
        "events[1].item_id",
        "RecordEvents",
        pb.RecordEventsRequest(user_id="user", events=[pb.Event(item_id="item-1"), pb.Event(item_id=LONG)]),
    ),
    *[
        (f"events[0].{field}", "RecordEvents", pb.RecordEventsRequest(user_id="user", events=[event]))
        for field, event in (
            ("time", pb.Event(item_id="i", time=Timestamp(seconds=-1))),
            ("time", pb.Event(item_id="i", time=Timestamp(seconds=2**33))),
            ("time", pb.Event(item_id="i", time=Timestamp(seconds=1, nanos=-1))),
            ("type", pb.Event(item_id="i", type=LONG)),
            ("weight", pb.Event(item_id="i", weight=math.nan)),
            ("event_id", pb.Event(item_id="i", event_id=LONG)),
            ("recommendation_id", pb.Event(item_id="i", recommendation_id=LONG)),
        )
    ],
    ("user_id", "GetHistory", pb.GetHistoryRequest()),
    ("user_id", "GetHistory", pb.GetHistoryRequest(user_id=LONG)),
    ("user_id", "ForgetUser", pb.ForgetUserRequest()),
    ("user_id", "ForgetUser", pb.ForgetUserRequest(user_id=LONG)),
]


@pytest.mark.parametrize(("field", "method", "request_"), REFUSED)
def test_a_refused_event_is_not_stored_in_part(client: Client, field: str, method: str, request_: Any) -> None:
    """The refusal names its field, nothing of the request is kept, and the next event is."""
    with refused(INVALID, field):
        getattr(client.stub, method)(request_, timeout=LIVENESS_SECONDS)
    assert client.history("user") == []
    assert client.record("user", ["item-1"]).history_length == 1


def test_without_redis_histories_come_with_the_request(
    without_redis: Client, client: Client, catalogue: Catalogue
) -> None:
    """Calls that need a stored history are refused with the reason; inline histories are served."""
    history = random_history(catalogue, 5, seed=6)
    with refused(grpc.StatusCode.UNIMPLEMENTED, "user_id"):
        without_redis.recommend(user_id="user")
    for call in (
        lambda: without_redis.record("user", ["item-1"]),
        lambda: without_redis.history("user"),
        lambda: forget(without_redis, "user"),
        lambda: record_batch(without_redis, one("user", "item-1")),
    ):
        with pytest.raises(grpc.RpcError) as refusal:
            call()
        assert refusal.value.code() is grpc.StatusCode.UNIMPLEMENTED
    assert {backend.name for backend in without_redis.info().backends} == {"target", "draft"}
    assert_same_list(without_redis.recommend(history), client.recommend(history))
