"""A Kafka cluster in this process: librdkafka's own mock, with topics, groups and committed offsets."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from confluent_kafka import Consumer, Producer, TopicPartition

from tests.serving import LIVENESS_SECONDS


class Kafka:
    """The mock cluster. It ends with the producer that holds it."""

    def __init__(self) -> None:
        self._cluster = Producer({"bootstrap.servers": "127.0.0.1:1", "test.mock.num.brokers": 1, "log_level": 0})
        brokers = self._cluster.list_topics(timeout=LIVENESS_SECONDS).brokers.values()
        self.address = ",".join(f"{broker.host}:{broker.port}" for broker in brokers)
        self._producer = Producer({"bootstrap.servers": self.address, "log_level": 0})

    def send(self, topic: str, *messages: tuple[str, bytes]) -> None:
        """Write keys and values, and wait until the cluster has them."""
        for key, value in messages:
            self._producer.produce(topic, key=key, value=value)
        assert self._producer.flush(LIVENESS_SECONDS) == 0

    def consumer(self, group: str, **settings: Any) -> Consumer:
        """A consumer of a group, which commits nothing by itself."""
        return Consumer(
            {
                "bootstrap.servers": self.address,
                "group.id": group,
                "auto.offset.reset": "earliest",
                "enable.auto.commit": False,
                "enable.auto.offset.store": False,
                "log_level": 0,
                **settings,
            }
        )

    def committed(self, topic: str) -> int:
        """Messages of a topic that the group of its name has committed."""
        with self._open(topic) as consumer:
            places = [TopicPartition(topic, part) for part in self._parts(consumer, topic)]
            return sum(max(0, place.offset) for place in consumer.committed(places, timeout=LIVENESS_SECONDS))

    def read(self, topic: str, count: int) -> list[Any]:
        """The messages of a topic, as soon as there are so many; more is an error."""
        with self._open("reader") as consumer:
            consumer.assign([TopicPartition(topic, part, 0) for part in self._parts(consumer, topic)])
            found: list[Any] = []
            end = time.monotonic() + LIVENESS_SECONDS
            while len(found) < count and time.monotonic() < end:
                found += [one for one in consumer.consume(count, 0.2) if one.error() is None]
            found += [one for one in consumer.consume(count + 1, 0.2) if one.error() is None]
            assert len(found) == count
            return found

    @contextmanager
    def _open(self, group: str) -> Iterator[Consumer]:
        consumer = self.consumer(group)
        try:
            yield consumer
        finally:
            consumer.close()

    def _parts(self, consumer: Consumer, topic: str) -> list[int]:
        return list(consumer.list_topics(topic, timeout=LIVENESS_SECONDS).topics[topic].partitions)
