"""Process of the consumer: signals, health and metrics around its loop."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from types import FrameType
from typing import Any

import grpc
import structlog
from confluent_kafka import Consumer, KafkaException
from grpc_health.v1 import health_pb2, health_pb2_grpc

from atspeed.event_consumer.consumer import EventConsumer
from atspeed.event_consumer.dead_letters import DeadLetters
from atspeed.event_consumer.messages import MessageFormat
from atspeed.event_consumer.metrics import ConsumerMetrics
from atspeed.event_consumer.recorder import EventRecorder
from atspeed.observability.metrics import exposed
from atspeed_client.channels import Endpoint

# Commits are the consumer's own. Cooperative: a rebalance takes only the partitions that move.
_OWN: Mapping[str, Any] = {"enable.auto.commit": False, "enable.auto.offset.store": False}
_DEFAULTS: Mapping[str, Any] = {
    "auto.offset.reset": "earliest",
    "partition.assignment.strategy": "cooperative-sticky",
    "queued.max.messages.kbytes": 16_384,
}
_log: structlog.stdlib.BoundLogger = structlog.get_logger(__name__)


@dataclass(frozen=True)
class ConsumerOptions:
    """Options of the consumer.

    Attributes:
        brokers: bootstrap addresses of the brokers.
        topic: the events' topic.
        group: the consumer group.
        form: the format of the messages.
        dead_letter_topic: where messages go that will never be stored.
        kafka: librdkafka's settings, such as those of TLS and SASL.
        batch_messages: most messages of a batch.
        linger_seconds: longest wait for a full batch.
        timeout_seconds: the deadline of a call to the service.
        max_events: most events of a call.
        health: HOST:PORT of the health server; None without one.
        metrics: host and port of the Prometheus exporter; None without one.
    """

    brokers: str
    topic: str
    group: str
    form: MessageFormat
    dead_letter_topic: str
    kafka: Mapping[str, str]
    batch_messages: int
    linger_seconds: float
    timeout_seconds: float
    max_events: int
    health: str | None = None
    metrics: tuple[str, int] | None = None


class ConsumerStartError(Exception):
    """A consumer that cannot start. The text is one line."""


def consume(endpoint: Endpoint, options: ConsumerOptions) -> None:
    """Consume until SIGTERM or SIGINT. Raises ConsumerStartError."""
    stopping, metrics = threading.Event(), ConsumerMetrics()
    shared = {**options.kafka, "bootstrap.servers": options.brokers, "error_cb": _note}
    try:
        consumer = Consumer({**_DEFAULTS, **shared, **_OWN, "group.id": options.group})
        dead_letters = DeadLetters(shared, options.dead_letter_topic)
    except KafkaException as error:
        raise ConsumerStartError(f"Kafka: {error.args[0].str()}") from error
    recorder = EventRecorder(endpoint, timeout_seconds=options.timeout_seconds, max_events=options.max_events)
    loop = EventConsumer(
        consumer,
        options.topic,
        options.form,
        recorder,
        dead_letters,
        metrics,
        batch_messages=options.batch_messages,
        linger_seconds=options.linger_seconds,
    )
    with ExitStack() as stack:
        stack.callback(recorder.close)
        stack.enter_context(_stopped_by_signals(stopping))
        if options.health is not None:
            stack.enter_context(_health(options.health, loop))
        if options.metrics is not None:
            stack.enter_context(_exporter(metrics, *options.metrics))
        _log.info("consuming", topic=options.topic, group=options.group)
        loop.run(stopping)
        _log.info("stopped")


def _note(error: Any) -> None:
    _log.warning("kafka_error", error=error.name())


@contextmanager
def _exporter(metrics: ConsumerMetrics, host: str, port: int) -> Iterator[None]:
    with ExitStack() as stack:
        try:
            stack.enter_context(exposed(metrics.registry, host, port))
        except OSError as error:
            raise ConsumerStartError(f"--metrics-port: cannot listen on {host}:{port}: {error.strerror}") from error
        yield


@contextmanager
def _stopped_by_signals(stopping: threading.Event) -> Iterator[None]:
    """Set the event at SIGTERM and SIGINT, for the length of the block."""

    def stop(_number: int, _frame: FrameType | None) -> None:
        stopping.set()

    before = {number: signal.signal(number, stop) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


class _HealthServicer(health_pb2_grpc.HealthServicer):
    """Health of the loop at the moment of the question."""

    def __init__(self, loop: EventConsumer) -> None:
        self._loop = loop

    def Check(self, request: Any, context: Any) -> health_pb2.HealthCheckResponse:  # noqa: ARG002, N802  gRPC's names
        """Return SERVING while batches succeed."""
        state = health_pb2.HealthCheckResponse
        return state(status=state.SERVING if self._loop.healthy else state.NOT_SERVING)


@contextmanager
def _health(address: str, loop: EventConsumer) -> Iterator[None]:
    """Answer health checks for the length of the block."""
    server = grpc.server(ThreadPoolExecutor(2, thread_name_prefix="health"))
    health_pb2_grpc.add_HealthServicer_to_server(_HealthServicer(loop), server)
    try:
        server.add_insecure_port(address)
    except RuntimeError as error:
        raise ConsumerStartError(f"--health: cannot listen on {address}") from error
    server.start()
    try:
        yield
    finally:
        server.stop(None).wait()
