"""The consumer's loop over librdkafka's mock cluster: what it commits, reads again, and gives up."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import grpc
import pytest
from google.protobuf.timestamp_pb2 import Timestamp

from atspeed.event_consumer.consumer import EventConsumer
from atspeed.event_consumer.dead_letters import DeadLetters
from atspeed.event_consumer.messages import MOST_BYTES, BadMessageError, Message, MessageFormat
from atspeed.event_consumer.metrics import ConsumerMetrics
from atspeed.event_consumer.recorder import EventRecorder
from atspeed.v1 import recommendation_pb2 as pb
from atspeed_client.channels import Endpoint
from atspeed_client.errors import CallError
from tests.kafka import Kafka
from tests.serving import LIVENESS_SECONDS


@pytest.fixture(scope="module")
def kafka() -> Kafka:
    return Kafka()


Answer = pb.RecordEventsResponse | CallError


class FakeService(EventRecorder):
    """Stores keys of events, unless `refuse` has an error for a request or for the whole call."""

    def __init__(self, *, max_events: int = 1000) -> None:
        super().__init__(Endpoint("127.0.0.1:1", None, None), timeout_seconds=1, max_events=max_events)
        self.stored: list[tuple[str, str, str]] = []
        self.sizes: list[int] = []
        self.refuse: Callable[[pb.RecordEventsRequest], CallError | None] = lambda request: None
        self.limit: Callable[[Sequence[pb.RecordEventsRequest]], CallError | None] = lambda requests: None
        self.down: CallError | None = None
        self.calls = 0

    def record(self, requests: Sequence[pb.RecordEventsRequest], request_id: str) -> list[Answer]:
        self.calls += 1
        if error := self.down or self.limit(requests):
            raise error
        self.sizes.append(sum(len(request.events) for request in requests))
        answers: list[Answer] = []
        for request in requests:
            error = self.refuse(request)
            if error is None:
                self.stored += [(request.user_id, event.item_id, event.event_id) for event in request.events]
            answers.append(error or pb.RecordEventsResponse(history_length=1))
        return answers


def message(user: str, *items: str) -> tuple[str, bytes]:
    return user, json.dumps({"user_id": user, "events": [{"item_id": item} for item in items]}).encode()


@contextmanager
def consuming(
    kafka: Kafka, topic: str, service: FakeService, form: MessageFormat = MessageFormat.JSON
) -> Iterator[tuple[EventConsumer, ConsumerMetrics]]:
    """The loop in a thread, until the end of the block."""
    metrics, stopping = ConsumerMetrics(), threading.Event()
    loop = EventConsumer(
        kafka.consumer(topic),  # a group of its own
        topic,
        form,
        service,
        DeadLetters({"bootstrap.servers": kafka.address, "log_level": 0}, f"{topic}.dead"),
        metrics,
        batch_messages=50,
        linger_seconds=0.05,
    )
    thread = threading.Thread(target=loop.run, args=(stopping,))
    thread.start()
    try:
        yield loop, metrics
    finally:
        stopping.set()
        thread.join(LIVENESS_SECONDS)
        assert not thread.is_alive()


def until(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + LIVENESS_SECONDS
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.02)


def value(metrics: ConsumerMetrics, name: str, **labels: str) -> float:
    return metrics.registry.get_sample_value(f"atspeed_consumer_{name}", labels) or 0.0


def test_messages_are_recorded_in_order_and_committed(kafka: Kafka) -> None:
    service = FakeService(max_events=20)
    sent = [message(f"u{n % 7}", f"{n}", f"{n}b") for n in range(120)]
    kafka.send("plain", *sent)
    with consuming(kafka, "plain", service) as (_, metrics):
        until(lambda: len(service.stored) == 240)
        until(lambda: value(metrics, "lag_messages") == 0 and kafka.committed("plain") == 120)
        assert value(metrics, "messages_total", outcome="stored") == 120
        assert value(metrics, "events_total", outcome="new") == 240
    for user in range(7):
        items = [item for name, item, _ in service.stored if name == f"u{user}"]
        assert items == [f"{n}{more}" for n in range(user, 120, 7) for more in ("", "b")]
    assert len({key for *_, key in service.stored}) == 240
    assert max(service.sizes) <= 20


def test_nothing_is_committed_while_the_service_is_down(kafka: Kafka) -> None:
    service = FakeService()
    service.down = CallError(grpc.StatusCode.UNAVAILABLE, "down", retry_after_seconds=0.01)
    kafka.send("down", *(message(f"u{n}", f"{n}") for n in range(30)))
    with consuming(kafka, "down", service) as (loop, metrics):
        until(lambda: service.calls >= 3)
        until(lambda: not loop.healthy)
        assert kafka.committed("down") == 0
        service.down = None
        until(lambda: kafka.committed("down") == 30)
        until(lambda: loop.healthy)
        assert value(metrics, "retries_total") >= 3
    assert sorted(item for _, item, _ in service.stored) == sorted(f"{n}" for n in range(30))


def test_a_refused_user_holds_up_the_messages_behind_and_no_others(kafka: Kafka) -> None:
    """Each partition is committed up to its first message that waits. What is read again keeps its key."""
    service = FakeService()
    busy = CallError(grpc.StatusCode.UNAVAILABLE, "histories", retry_after_seconds=0.01)
    service.refuse = lambda request: busy if request.user_id == "u3" and request.events[0].item_id == "13" else None
    kafka.send("busy", *(message(f"u{n % 10}", f"{n}") for n in range(40)))
    with consuming(kafka, "busy", service) as (_, metrics):
        until(lambda: value(metrics, "retries_total") >= 2)
        assert "13" not in {item for _, item, _ in service.stored}
        assert 0 < kafka.committed("busy") < 40
        service.refuse = lambda request: None
        until(lambda: kafka.committed("busy") == 40)
    by_item = {item: {key for _, other, key in service.stored if other == item} for _, item, _ in service.stored}
    assert len(by_item) == 40
    assert all(len(keys) == 1 for keys in by_item.values())


def test_bad_messages_go_to_the_dead_letters_with_the_reason(kafka: Kafka) -> None:
    service = FakeService()
    invalid = CallError(grpc.StatusCode.INVALID_ARGUMENT, "user_id: must not be empty")
    service.refuse = lambda request: None if request.user_id else invalid
    bad = [("k1", b"{"), ("k2", b'{"user": "u"}'), message("", "1"), ("k4", b"\xff"), ("k5", b"[1]")]
    kafka.send("bad", message("u", "1"), *bad, message("u", "2"))
    with consuming(kafka, "bad", service) as (_, metrics):
        until(lambda: kafka.committed("bad") == 7)
        assert value(metrics, "messages_total", outcome="dead_letter") == 5
    letters = {letter.value(): dict(letter.headers()) for letter in kafka.read("bad.dead", 5)}
    assert set(letters) == {content for _, content in bad}
    assert letters[bad[2][1]]["atspeed-error"] == b"user_id: must not be empty"
    assert b'has no field named "user"' in letters[bad[1][1]]["atspeed-error"]
    assert letters[b"{"]["atspeed-topic"] == b"bad"
    assert sorted(item for _, item, _ in service.stored) == ["1", "2"]


@pytest.mark.parametrize("whole_call", [True, False])
def test_messages_of_tenants_that_the_token_is_not_for_are_dead_letters(kafka: Kafka, whole_call: bool) -> None:
    """The service refuses the whole call with such a message; another could refuse only the message."""
    topic, service = f"tenants-{whole_call}", FakeService()
    denied = CallError(
        grpc.StatusCode.PERMISSION_DENIED, "tenant: the token is bound to others", reason="TENANT_DENIED"
    )

    def foreign(request: pb.RecordEventsRequest) -> CallError | None:
        return denied if request.user_id in {"u3", "u4", "u11"} else None

    if whole_call:
        service.limit = lambda requests: next(filter(None, map(foreign, requests)), None)
    else:
        service.refuse = foreign
    kafka.send(topic, *(message(f"u{n}", f"{n}") for n in range(12)))
    with consuming(kafka, topic, service) as (loop, metrics):
        until(lambda: kafka.committed(topic) == 12)
        assert value(metrics, "messages_total", outcome="dead_letter") == 3
        assert value(metrics, "messages_total", outcome="stored") == 9
        until(lambda: loop.healthy)
    assert len(kafka.read(f"{topic}.dead", 3)) == 3
    assert len(service.stored) == 9


def test_a_token_that_may_not_record_at_all_loses_nothing(kafka: Kafka) -> None:
    service = FakeService()
    service.down = CallError(
        grpc.StatusCode.PERMISSION_DENIED, "a token with the scope write", reason="PERMISSION_DENIED"
    )
    kafka.send("denied", *(message(f"u{n}", f"{n}") for n in range(5)))
    with consuming(kafka, "denied", service) as (loop, metrics):
        until(lambda: service.calls >= 2 and not loop.healthy)
        assert kafka.committed("denied") == 0
        service.down = None
        until(lambda: kafka.committed("denied") == 5)
        assert value(metrics, "messages_total", outcome="dead_letter") == 0


def test_a_bad_message_behind_one_that_waits_is_one_dead_letter(kafka: Kafka) -> None:
    service = FakeService()
    service.down = CallError(grpc.StatusCode.RESOURCE_EXHAUSTED, "busy", retry_after_seconds=0.01)
    kafka.send("behind", message("u", "1"), ("u", b"{"))
    with consuming(kafka, "behind", service):
        until(lambda: service.calls >= 3)
        service.down = None
        until(lambda: kafka.committed("behind") == 2)
    kafka.read("behind.dead", 1)


def test_a_call_that_is_too_large_for_the_service_is_made_in_parts(kafka: Kafka) -> None:
    """A limit below the one that the service named, a quota, and a message that alone is beyond the limit."""
    service = FakeService()
    most_events, most_requests = 6, 3

    def limited(requests: Sequence[pb.RecordEventsRequest]) -> CallError | None:
        if sum(len(request.events) for request in requests) > most_events:
            return CallError(grpc.StatusCode.INVALID_ARGUMENT, "requests: too many events")
        return CallError(grpc.StatusCode.RESOURCE_EXHAUSTED, "quota") if len(requests) > most_requests else None

    service.limit = limited
    large = message("u0", *(f"x{n}" for n in range(most_events + 1)))
    kafka.send("large", *(message("u0", f"{n}", f"{n}b") for n in range(9)), large, message("u0", "last"))
    with consuming(kafka, "large", service) as (_, metrics):
        until(lambda: kafka.committed("large") == 11)
        assert value(metrics, "messages_total", outcome="dead_letter") == 1
    (letter,) = kafka.read("large.dead", 1)
    assert (letter.value(), dict(letter.headers())["atspeed-error"]) == (large[1], b"requests: too many events")
    assert [item for _, item, _ in service.stored] == [*(f"{n}{b}" for n in range(9) for b in ("", "b")), "last"]


def test_a_quota_that_no_message_fits_loses_nothing(kafka: Kafka) -> None:
    service = FakeService()
    service.limit = lambda _: CallError(grpc.StatusCode.RESOURCE_EXHAUSTED, "quota")
    kafka.send("quota", message("u", "1"), message("u", "2"))
    with consuming(kafka, "quota", service) as (loop, metrics):
        until(lambda: value(metrics, "retries_total") >= 1)
        assert (kafka.committed("quota"), loop.healthy) == (0, False)
        service.limit = lambda _: None
        until(lambda: kafka.committed("quota") == 2)
        assert value(metrics, "messages_total", outcome="dead_letter") == 0


def test_protobuf_messages(kafka: Kafka) -> None:
    service = FakeService()
    request = pb.RecordEventsRequest(user_id="u", events=[pb.Event(item_id="é", event_id="own")])
    kafka.send("binary", ("u", request.SerializeToString()))
    with consuming(kafka, "binary", service, MessageFormat.PROTOBUF):
        until(lambda: kafka.committed("binary") == 1)
    assert service.stored == [("u", "é", "own")]


class TestMessages:
    def of(self, content: bytes | None, offset: int = 7, timestamp_ms: int | None = 1_700_000_000_123) -> Message:
        return Message("t" * 249, 3, offset, timestamp_ms, b"k", content)

    def test_an_event_without_key_and_time_gets_those_of_its_message(self) -> None:
        content = json.dumps({"user_id": "u", "events": [{"item_id": "a"}, {"item_id": "a"}]}).encode()
        first, again = (self.of(content).request(MessageFormat.JSON) for _ in range(2))
        assert first == again
        assert len({event.event_id for event in first.events}) == 2
        assert all(len(event.event_id) <= 256 for event in first.events)
        assert first.events[0].time == Timestamp(seconds=1_700_000_000, nanos=123_000_000)
        others = (self.of(content, offset=8), self.of(content, timestamp_ms=None))
        keys = {one.request(MessageFormat.JSON).events[0].event_id for one in others}
        assert len(keys | {first.events[0].event_id}) == 3
        assert not others[1].request(MessageFormat.JSON).events[0].HasField("time")

    def test_an_event_keeps_its_own_key_and_time(self) -> None:
        event = {"item_id": "a", "event_id": "e", "time": "2024-05-01T00:00:00Z", "type": "buy", "weight": 0}
        content = json.dumps({"user_id": "u", "tenant": "shop", "events": [event]}).encode()
        stored = self.of(content).request(MessageFormat.JSON)
        assert (stored.tenant, stored.events[0].event_id, stored.events[0].type) == ("shop", "e", "buy")
        assert stored.events[0].time == Timestamp(seconds=1_714_521_600)
        assert stored.events[0].HasField("weight")

    @pytest.mark.parametrize("timestamp_ms", [-5, 2**62])
    def test_a_time_that_is_none_is_bad_where_an_event_needs_it(self, timestamp_ms: int) -> None:
        event = {"item_id": "a", "time": "2024-05-01T00:00:00Z"}
        content = json.dumps({"user_id": "u", "events": [event]}).encode()
        own = self.of(content, timestamp_ms=timestamp_ms).request(MessageFormat.JSON)
        assert own.events[0].time == Timestamp(seconds=1_714_521_600)
        content = json.dumps({"user_id": "u", "events": [event, {"item_id": "b"}]}).encode()
        with pytest.raises(BadMessageError, match=rf"events\[1\] has no time, and the message's is {timestamp_ms} ms"):
            self.of(content, timestamp_ms=timestamp_ms).request(MessageFormat.JSON)

    @pytest.mark.parametrize("form", list(MessageFormat))
    @pytest.mark.parametrize("content", [None, b"", b"\xff\xff", b" " * (MOST_BYTES + 1)])
    def test_what_is_no_request_is_bad(self, content: bytes | None, form: MessageFormat) -> None:
        with pytest.raises(BadMessageError):
            self.of(content).request(form)
