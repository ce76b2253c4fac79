"""Events of users with items, and their form in Redis.

An event is one field of a history's hash. The field's name is its key, and sorts events of the same time:

    k<event_id>          an event with an idempotency key
    n<12 digits>         an event without one, numbered in the order of arrival
    meta                 no event: `<last time> <last number> <dropped events> <floor>`, see `orchestrator.history`

The value is `<time> <bytes of the item id> <item id><JSON object>`. Times are whole microseconds since 1970. A negative one gives
the order of events whose time is not known. The object is left out if it is empty.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import NamedTuple

META = b"meta"


@dataclass(frozen=True, slots=True)
class StoredEvent:
    """Event of a user with an item.

    Attributes:
        item_id: the item.
        time_us: microseconds since 1970; None for the moment of its storage, or if it is not known.
        type: kind of the event, in the caller's words.
        weight: weight of the event, in the caller's scale.
        event_id: idempotency key; empty without one.
        recommendation_id: the reply that it follows from; empty if none is known.
    """

    item_id: str
    time_us: int | None = None
    type: str = ""
    weight: float | None = None
    event_id: str = ""
    recommendation_id: str = ""

    @property
    def arguments(self) -> tuple[str, str, str]:
        """Return the key, the time and the rest of the value, as the script of a history takes them."""
        details = {"t": self.type or None, "w": self.weight, "r": self.recommendation_id or None}
        given = {name: value for name, value in details.items() if value is not None}
        packed = json.dumps(given, separators=(",", ":"), ensure_ascii=False) if given else ""
        time = "" if self.time_us is None else str(self.time_us)
        return self.event_id, time, f"{len(self.item_id.encode())} {self.item_id}{packed}"


class Entry(NamedTuple):
    """Field and value of one event. Entries sort by time, then by key.

    Attributes:
        time_us: microseconds since 1970, or a negative number.
        field: name of the hash's field.
        item: the item's id.
        details: the JSON object of the value; empty without one.
    """

    time_us: int
    field: bytes
    item: bytes
    details: bytes

    @property
    def item_id(self) -> str:
        """Return the item as text."""
        return self.item.decode("utf-8", "replace")

    @property
    def event(self) -> StoredEvent:
        """Return the event."""
        details = json.loads(self.details) if self.details else {}
        return StoredEvent(
            item_id=self.item_id,
            time_us=self.time_us if self.time_us >= 0 else None,
            type=details.get("t", ""),
            weight=details.get("w"),
            event_id=self.field[1:].decode("utf-8", "replace") if self.field.startswith(b"k") else "",
            recommendation_id=details.get("r", ""),
        )


def entries(fields: Mapping[bytes, bytes]) -> list[Entry]:
    """Return the events of a hash, oldest first. Raises ValueError for a value of another form."""
    return sorted(_entry(field, value) for field, value in fields.items() if field != META)


def entries_of_list(items: Iterable[bytes]) -> list[Entry]:
    """Return the events of a list of item ids, oldest first. Histories had this form before events had times."""
    listed = list(items)
    return [Entry(place - len(listed), b"", item, b"") for place, item in enumerate(listed)]


def _entry(field: bytes, value: bytes) -> Entry:
    time, size, rest = value.split(b" ", 2)
    end = int(size)
    return Entry(int(time), field, rest[:end], rest[end:])
