"""The dead-letter topic: messages that will never be stored, with the reason."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from confluent_kafka import KafkaException, Producer

from atspeed.event_consumer.messages import Message

_FLUSH_SECONDS = 10.0


class DeadLetterError(Exception):
    """Dead letters that the brokers have not confirmed."""


class DeadLetters:
    """Producer of dead letters.

    Args:
        settings: librdkafka's settings.
        topic: the dead-letter topic.
    """

    def __init__(self, settings: Mapping[str, Any], topic: str) -> None:
        self.topic = topic
        durable = {"acks": "all", "enable.idempotence": True, "message.timeout.ms": int(_FLUSH_SECONDS * 1000)}
        self._producer = Producer({**settings, **durable})

    def send(self, letters: Sequence[tuple[Message, str]]) -> None:
        """Write messages as they came, with the reason in a header. Returns once the brokers have them all.

        Raises DeadLetterError; some may then be there already, and are written again.
        """
        confirmed: list[bool] = []
        try:
            for message, reason in letters:
                self._producer.produce(
                    self.topic,
                    key=message.key,
                    value=message.value,
                    headers=[*message.headers, *_place(message), ("atspeed-error", reason.encode())],
                    on_delivery=lambda error, _: confirmed.append(error is None),
                )
            self._producer.flush(_FLUSH_SECONDS + 1)
        except (KafkaException, BufferError) as error:
            raise DeadLetterError(f"{self.topic}: {type(error).__name__}") from error
        if confirmed.count(True) != len(letters):
            raise DeadLetterError(f"{self.topic}: {confirmed.count(True)} of {len(letters)} letters were confirmed")


def _place(message: Message) -> list[tuple[str, bytes]]:
    place = {"topic": message.topic, "partition": message.partition, "offset": message.offset}
    return [(f"atspeed-{name}", str(value).encode()) for name, value in place.items()]
