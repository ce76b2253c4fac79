"""Messages of the events' topic: requests of RecordEvents, as JSON or as protobuf."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from enum import StrEnum

from google.protobuf.json_format import Parse, ParseError
from google.protobuf.message import DecodeError

from atspeed.v1 import recommendation_pb2 as pb

MOST_BYTES = 2_000_000  # of a message, and of a call: an orchestrator takes 4 MB

_MOST_TEXT = 500  # characters of a reason
_MOST_TIMESTAMP_MS = 253_402_300_799_999  # the end of the year 9999, which is that of Timestamp


class MessageFormat(StrEnum):
    """Format of the messages' values."""

    JSON = "json"
    PROTOBUF = "protobuf"


class BadMessageError(Exception):
    """A message that will never be stored. The text may quote it, so it goes to the dead-letter topic and into no log."""


@dataclass(frozen=True)
class Message:
    """Message of a topic.

    Attributes:
        topic, partition, offset: its place.
        timestamp_ms: when it was produced or appended; None if the topic keeps no times.
        key, value: its content.
        headers: its headers.
    """

    topic: str
    partition: int
    offset: int
    timestamp_ms: int | None
    key: bytes | None
    value: bytes | None
    headers: tuple[tuple[str, bytes | None], ...] = ()

    def request(self, form: MessageFormat) -> pb.RecordEventsRequest:
        """Return the request of the message. Raises BadMessageError.

        An event without a time gets the message's, and one without an `event_id` gets one of the message's place and time. So a
        message that is read twice is stored once.
        """
        request = _parsed(self.value, form)
        for number, event in enumerate(request.events):
            if not event.HasField("time") and self.timestamp_ms is not None:
                if not 0 <= self.timestamp_ms <= _MOST_TIMESTAMP_MS:
                    raise BadMessageError(f"events[{number}] has no time, and the message's is {self.timestamp_ms} ms")
                event.time.FromMilliseconds(self.timestamp_ms)
            if not event.event_id:
                event.event_id = f"{self._place}-{number}"
        return request

    @property
    def _place(self) -> str:
        topic = hashlib.blake2s(self.topic.encode(), digest_size=8).hexdigest()
        return f"{topic}-{self.partition}-{self.offset}-{self.timestamp_ms or 0}"


def _parsed(value: bytes | None, form: MessageFormat) -> pb.RecordEventsRequest:
    if not value:
        raise BadMessageError("the message has no value")
    if len(value) > MOST_BYTES:
        raise BadMessageError(f"the message has {len(value)} bytes, at most {MOST_BYTES} are allowed")
    request = pb.RecordEventsRequest()
    try:
        if form is MessageFormat.PROTOBUF:
            return pb.RecordEventsRequest.FromString(value)
        return Parse(value.decode(), request)
    except (DecodeError, UnicodeDecodeError):
        raise BadMessageError(f"the value is not a RecordEventsRequest as {form}") from None
    except ParseError as error:
        raise BadMessageError(f"the value is not a RecordEventsRequest as {form}: {error}"[:_MOST_TEXT]) from None
