"""Metrics of the events' consumer: messages, events, retries and lag."""

from __future__ import annotations

from prometheus_client import CollectorRegistry

from atspeed.observability.metrics import SECONDS, CounterOf, GaugeOf, HistogramOf
from atspeed.v1 import recommendation_pb2 as pb

MESSAGES = CounterOf(
    "atspeed_consumer_messages_total",
    "Messages that are done, by outcome: stored, or dead_letter for one that will never be stored.",
    ("outcome",),
    essential=True,
)
EVENTS = CounterOf(
    "atspeed_consumer_events_total",
    "Events of stored messages, by outcome: new, duplicate, or expired for one older than a full history.",
    ("outcome",),
)
RETRIES = CounterOf(
    "atspeed_consumer_retries_total",
    "Batches that are read again because the service or the dead-letter topic did not take all of them.",
    essential=True,
)
LAG = GaugeOf(
    "atspeed_consumer_lag_messages",
    "Messages of the assigned partitions that are not done, as the brokers last told.",
    essential=True,
)
BATCH_SECONDS = HistogramOf("atspeed_consumer_batch_seconds", "Time from a batch's read to its commit.", (), SECONDS)
METRICS = (MESSAGES, EVENTS, RETRIES, LAG, BATCH_SECONDS)


class ConsumerMetrics:
    """Counts what the consumer does.

    Attributes:
        registry: the registry of the exporter.
    """

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self._messages = MESSAGES.build(self.registry)
        self._events = EVENTS.build(self.registry)
        self.retries = RETRIES.build(self.registry)
        self.lag = LAG.build(self.registry)
        self.batch_seconds = BATCH_SECONDS.build(self.registry)
        for outcome in ("stored", "dead_letter"):
            self._messages.labels(outcome)

    def stored(self, events: int, reply: pb.RecordEventsResponse) -> None:
        """Count a stored message."""
        self._messages.labels("stored").inc()
        self._events.labels("duplicate").inc(reply.duplicate_events)
        self._events.labels("expired").inc(reply.expired_events)
        self._events.labels("new").inc(max(0, events - reply.duplicate_events - reply.expired_events))

    def dead_letters(self, count: int) -> None:
        """Count dead letters."""
        self._messages.labels("dead_letter").inc(count)
