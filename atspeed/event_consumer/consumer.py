"""The consumer's loop: read, record, commit.

A batch of messages is read, recorded in calls of many, and committed once the service has said that all is stored. So every
message is recorded at least once, and a second time changes nothing, since every event has an idempotency key (`messages`).

    a message that the service takes         done
    one that it will never take              done, once the dead-letter topic has it
    one that it cannot take now              each partition is read again from its first such message, after the service's hint

Messages of a partition are recorded in their order. Without calls of its own while it waits, the consumer asks a busy service
for nothing: the brokers keep what it does not read.
"""

from __future__ import annotations

import math
import random
import secrets
import threading
import time
from collections import deque
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

import grpc
import structlog
from confluent_kafka import TIMESTAMP_NOT_AVAILABLE, Consumer, KafkaException, TopicPartition

from atspeed.errors import Reason
from atspeed.event_consumer.dead_letters import DeadLetterError, DeadLetters
from atspeed.event_consumer.messages import BadMessageError, Message, MessageFormat
from atspeed.event_consumer.metrics import ConsumerMetrics
from atspeed.event_consumer.recorder import EventRecorder
from atspeed.v1 import recommendation_pb2 as pb
from atspeed_client.errors import CallError

_LEAST_WAIT_SECONDS, _MOST_WAIT_SECONDS = 0.2, 30.0
_log: structlog.stdlib.BoundLogger = structlog.get_logger(__name__)


@dataclass
class _Outcome:
    """Outcome of a batch.

    Attributes:
        dead: messages that will never be stored, with the reason.
        waiting: messages to read again.
        hint_seconds: the service's retry hint.
        problem: why they wait.
    """

    dead: list[tuple[Message, str]] = field(default_factory=list)
    waiting: list[Message] = field(default_factory=list)
    hint_seconds: float = 0.0
    problem: str = ""

    def wait_for(self, messages: Sequence[Message], error: CallError) -> None:
        """Note messages that the service cannot take now."""
        self.waiting += messages
        self.hint_seconds = max(self.hint_seconds, error.retry_after_seconds or 0.0)
        self.problem = f"{error.code.name} {error.reason}".strip()


class EventConsumer:
    """Consumer of one topic, until `stopping` is set.

    Args:
        consumer: a consumer of a group, which commits nothing by itself.
        batch_messages: most messages of a batch.
        linger_seconds: longest wait for a full batch.

    Attributes:
        healthy: whether the last batch was done, or there was none.
    """

    def __init__(
        self,
        consumer: Consumer,
        topic: str,
        form: MessageFormat,
        recorder: EventRecorder,
        dead_letters: DeadLetters,
        metrics: ConsumerMetrics,
        *,
        batch_messages: int,
        linger_seconds: float,
    ) -> None:
        self._consumer = consumer
        self._topic = topic
        self._form = form
        self._recorder = recorder
        self._dead_letters = dead_letters
        self._metrics = metrics
        self._batch_messages = batch_messages
        self._linger_seconds = linger_seconds
        self._failures = 0
        self.healthy = True

    def run(self, stopping: threading.Event) -> None:
        """Consume until the event is set. The running batch ends first."""
        self._consumer.subscribe([self._topic])
        try:
            while not stopping.is_set():
                if delay := self._cycle():
                    stopping.wait(delay)
        finally:
            self._consumer.close()

    def _cycle(self) -> float:
        """Read and record a batch. Returns the seconds to wait before the next one."""
        started = time.monotonic()
        messages, broken = self._read()
        if not messages:
            self.healthy = not broken and not self._failures
            self._measure_lag()
            return 0.0
        outcome = self._record(messages)
        self._commit(messages, outcome.waiting)
        self._measure_lag()
        if not outcome.waiting:
            self._failures, self.healthy = 0, True
            self._metrics.batch_seconds.observe(time.monotonic() - started)
            return 0.0
        self._failures, self.healthy = self._failures + 1, False
        self._metrics.retries.inc()
        delay = self._delay(outcome.hint_seconds)
        _log.warning(
            "events_wait", messages=len(outcome.waiting), reason=outcome.problem, retry_seconds=round(delay, 2)
        )
        return delay

    def _read(self) -> tuple[list[Message], bool]:
        """Return the next messages, and whether the brokers reported a failure."""
        found: list[Message] = []
        broken = False
        for one in self._consumer.consume(self._batch_messages, self._linger_seconds):
            if (error := one.error()) is None:
                found.append(_message(one))
            else:
                broken = True
                _log.warning("kafka_error", error=error.name())
        return found, broken

    def _record(self, messages: Sequence[Message]) -> _Outcome:
        outcome = _Outcome()
        requests: list[pb.RecordEventsRequest] = []
        sent: list[Message] = []
        for message in messages:
            try:
                requests.append(message.request(self._form))
                sent.append(message)
            except BadMessageError as error:
                outcome.dead.append((message, str(error)))
        self._call(sent, requests, outcome)
        self._write_dead_letters(outcome)
        return outcome

    def _call(self, sent: Sequence[Message], requests: Sequence[pb.RecordEventsRequest], outcome: _Outcome) -> None:
        """Record the requests. A call that is refused for what it holds is made in halves, down to the message at fault."""
        done = 0
        parts = deque(self._recorder.packed(requests))
        while parts:
            part = parts.popleft()
            of_part = sent[done : done + len(part)]
            try:
                results = self._recorder.record(part, secrets.token_hex(8))
            except CallError as error:
                if len(part) > 1 and (_refuses_size(error) or _refuses_message(error)):
                    parts.extendleft((part[len(part) // 2 :], part[: len(part) // 2]))
                    continue
                if not _refuses_message(error):
                    outcome.wait_for(sent[done:], error)
                    return
                outcome.dead.append((of_part[0], error.message))
                done += 1
                continue
            for message, request, result in zip(of_part, part, results, strict=True):
                if not isinstance(result, CallError):
                    self._metrics.stored(len(request.events), result)
                elif _refuses_message(result):
                    outcome.dead.append((message, result.message))
                else:
                    outcome.wait_for([message], result)
            done += len(part)

    def _write_dead_letters(self, outcome: _Outcome) -> None:
        """Write the dead letters. Those that are read again are left for then; without a confirmation all are read again."""
        again = _first_offsets(outcome.waiting)
        letters = [one for one in outcome.dead if one[0].offset < again.get(one[0].partition, math.inf)]
        if not letters:
            return
        try:
            self._dead_letters.send(letters)
        except DeadLetterError as error:
            outcome.waiting += [message for message, _ in letters]
            outcome.problem = str(error)
            return
        self._metrics.dead_letters(len(letters))
        first = letters[0][0]
        _log.warning("dead_letters", messages=len(letters), partition=first.partition, offset=first.offset)

    def _commit(self, messages: Sequence[Message], waiting: Sequence[Message]) -> None:
        """Commit each partition up to its first waiting message, and read it again from there."""
        first, again = _first_offsets(messages), _first_offsets(waiting)
        ends = {one.partition: one.offset + 1 for one in messages} | again
        moved = [TopicPartition(self._topic, part, end) for part, end in ends.items() if end > first[part]]
        try:
            if moved:
                self._consumer.commit(offsets=moved, asynchronous=False)
        except KafkaException as error:  # another consumer has the partition, and records these messages again
            _log.warning("commit_failed", error=error.args[0].name())
        for part, offset in again.items():
            with suppress(KafkaException):  # the partition is another consumer's by now
                self._consumer.seek(TopicPartition(self._topic, part, offset))

    def _delay(self, hint_seconds: float) -> float:
        """Return the wait after a failure: the hint, or a growing one. Consumers that were refused together spread."""
        backoff = _LEAST_WAIT_SECONDS * 2 ** min(self._failures, 8)
        spread = random.uniform(1.0, 1.25)  # noqa: S311 - no secret
        return min((hint_seconds or backoff) * spread, _MOST_WAIT_SECONDS)

    def _measure_lag(self) -> None:
        with suppress(KafkaException):
            places = self._consumer.position(self._consumer.assignment())
            lag = 0
            for place in places:
                _, end = self._consumer.get_watermark_offsets(place, cached=True)
                if end > 0 and place.offset >= 0:
                    lag += max(0, end - place.offset)
            self._metrics.lag.set(lag)


def _refuses_size(error: CallError) -> bool:
    """Return whether a smaller call may succeed: this one is beyond a limit, and a wait does not help."""
    return error.code is grpc.StatusCode.RESOURCE_EXHAUSTED and error.retry_after_seconds is None


def _refuses_message(error: CallError) -> bool:
    """Return whether a message is at fault, and no wait helps: it is invalid, or of a tenant that the token is not for.

    A token that is not valid, or not for the method, is for the operator to replace. All messages wait until then.
    """
    return error.code is grpc.StatusCode.INVALID_ARGUMENT or (
        error.code is grpc.StatusCode.PERMISSION_DENIED and error.reason == Reason.TENANT_DENIED
    )


def _first_offsets(messages: Iterable[Message]) -> dict[int, int]:
    """Return the first offset of each partition."""
    first: dict[int, int] = {}
    for one in messages:
        first[one.partition] = min(first.get(one.partition, one.offset), one.offset)
    return first


def _message(one: Any) -> Message:
    kind, timestamp = one.timestamp()
    return Message(
        topic=one.topic(),
        partition=one.partition(),
        offset=one.offset(),
        timestamp_ms=None if kind == TIMESTAMP_NOT_AVAILABLE else timestamp,
        key=one.key(),
        value=one.value(),
        headers=tuple(one.headers() or ()),
    )
