"""Requests of the client: recommendations and events, checked when they are made."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from secrets import token_urlsafe
from typing import Any

from atspeed_client import arguments
from atspeed_client.arguments import MAX_INT32, MAX_INT64
from atspeed_client.enums import MODES, Mode, Priority
from atspeed_client.errors import ArgumentTypeError, ArgumentValueError
from atspeed_client.v1 import recommendation_pb2 as pb

_PRIORITIES = {Priority.INTERACTIVE: pb.PRIORITY_INTERACTIVE, Priority.BATCH: pb.PRIORITY_BATCH}


class RecommendRequest:
    """Request for a list, for a stored user or, with `history`, for the items given.

    The contract's `RecommendRequest` describes each field. Modes and priorities may be text, and items may be any iterable of
    ids. None stands for a field that is not set. An `allowed` without any id is refused.

    Raises ArgumentTypeError or ArgumentValueError, which name the argument at fault.

    Attributes:
        message: the request as it is sent.
    """

    __slots__ = ("message",)

    def __init__(
        self,
        user_id: str | None = None,
        *,
        history: Iterable[str] | None = None,
        k: int = 10,
        beam_width: int = 0,
        beam_widths: Iterable[int] | None = None,
        least_beam_width: int = 0,
        mode: Mode | str = Mode.STRICT,
        tolerance: float = 0.0,
        temperature: float | None = None,
        seed: int | None = None,
        excluded: Iterable[str] | None = None,
        allowed: Iterable[str] | None = None,
        exclude_seen: bool = False,
        items_per_path: int = 0,
        user_fields: Mapping[str, str] | None = None,
        tenant: str = "",
        priority: Priority | str | None = None,
        code_paths: bool = True,
        statistics: bool = True,
    ) -> None:
        message = self.message = pb.RecommendRequest(
            k=arguments.whole("k", k, 1, MAX_INT32),
            beam_width=arguments.whole("beam_width", beam_width, 0, MAX_INT32),
            mode=MODES.number(arguments.choice("mode", mode, Mode)),
            tolerance=arguments.number("tolerance", tolerance, least=0.0),
            excluded_item_ids=arguments.item_ids("excluded", () if excluded is None else excluded, ordered=False),
            exclude_seen=arguments.flag("exclude_seen", exclude_seen),
            tenant=arguments.text("tenant", tenant, required=False),
            least_beam_width=arguments.whole("least_beam_width", least_beam_width, 0, MAX_INT32),
            items_per_path=arguments.whole("items_per_path", items_per_path, 0, MAX_INT32),
            beam_widths=arguments.wholes("beam_widths", () if beam_widths is None else beam_widths, 1, MAX_INT32),
            user_fields=arguments.texts_by_name("user_fields", {} if user_fields is None else user_fields),
        )
        if message.beam_width and message.beam_widths:
            raise ArgumentValueError("beam_widths", "give either beam_width or beam_widths")
        if priority is not None:
            message.priority = _PRIORITIES[arguments.choice("priority", priority, Priority)]
        if temperature is not None:
            message.temperature = arguments.number("temperature", temperature, above=0.0)
        if seed is not None:
            message.seed = arguments.whole("seed", seed, 0, MAX_INT64)
        if allowed is not None:
            message.allowed_item_ids.extend(arguments.item_ids("allowed", allowed, ordered=False, required=True))
        if not arguments.flag("code_paths", code_paths):
            message.reply_options.omit_code_paths = True
        if not arguments.flag("statistics", statistics):
            message.reply_options.omit_statistics = True
        _set_subject(message, user_id, history)

    def __repr__(self) -> str:
        subject = "history" if self.message.HasField("history") else repr(self.message.user_id)
        return f"RecommendRequest({subject}, k={self.message.k}, mode={MODES.value(self.message.mode).value!r})"


def _set_subject(message: pb.RecommendRequest, user_id: str | None, history: Iterable[str] | None) -> None:
    if (user_id is None) == (history is None):
        raise ArgumentValueError("user_id", "give either user_id or history")
    if user_id is not None:
        message.user_id = arguments.text("user_id", user_id)
    else:
        message.history.SetInParent()
        message.history.item_ids.extend(arguments.item_ids("history", history))


def _new_event_id() -> str:
    return token_urlsafe(12)


@dataclass(frozen=True, slots=True)
class Event:
    """Event of a user with an item.

    A new event gets a random `event_id`, so that a call that records it can be repeated. Give it one of its own if the same
    event may be made twice, such as a message's offset.

    Attributes:
        item_id: the item.
        time: moment of the event, with a time zone; None for the moment of its storage.
        type: kind of the event, in words of yours.
        weight: weight of the event, in a scale of yours.
        event_id: idempotency key; empty if there is none.
        recommendation_id: the `Recommendation.recommendation_id` that the event follows from.
    """

    item_id: str
    time: datetime | None = None
    type: str = ""
    weight: float | None = None
    event_id: str = field(default_factory=_new_event_id)
    recommendation_id: str = ""

    def message(self, name: str) -> pb.Event:
        """Return the event as it is sent. Raises ArgumentTypeError or ArgumentValueError that begin with `name`."""
        message = pb.Event(
            item_id=arguments.text(f"{name}.item_id", self.item_id),
            type=arguments.text(f"{name}.type", self.type, required=False),
            event_id=arguments.text(f"{name}.event_id", self.event_id, required=False),
            recommendation_id=arguments.text(f"{name}.recommendation_id", self.recommendation_id, required=False),
        )
        if self.weight is not None:
            message.weight = arguments.number(f"{name}.weight", self.weight)
        if self.time is not None:
            if not isinstance(self.time, datetime):
                raise ArgumentTypeError(f"{name}.time", f"must be a datetime, got {type(self.time).__name__}")
            if self.time.tzinfo is None:
                raise ArgumentValueError(f"{name}.time", "must have a time zone, such as datetime.now(UTC)")
            message.time.FromDatetime(self.time)
        return message

    @classmethod
    def of(cls, message: Any) -> Event:
        """Return a stored event."""
        return cls(
            item_id=message.item_id,
            time=message.time.ToDatetime(tzinfo=UTC) if message.HasField("time") else None,
            type=message.type,
            weight=message.weight if message.HasField("weight") else None,
            event_id=message.event_id,
            recommendation_id=message.recommendation_id,
        )


@dataclass(frozen=True, slots=True)
class UserEvents:
    """Events of one user, for `record_batch`.

    Attributes:
        user_id: the user.
        events: events, or items that the user has just met, in any order.
        tenant: tenant of the user.
    """

    user_id: str
    events: Iterable[str | Event]
    tenant: str = ""


def events(name: str, values: Any) -> list[pb.Event]:
    """Check item ids or events, of any ordered iterable, and return them as they are sent."""
    listed = arguments.listed(name, values, "item ids or events")
    if not listed:
        raise ArgumentValueError(name, "must hold at least one item id or event")
    return [_event(f"{name}[{place}]", value) for place, value in enumerate(listed)]


def _event(name: str, value: Any) -> pb.Event:
    if isinstance(value, Event):
        return value.message(name)
    return pb.Event(item_id=arguments.text(name, value), event_id=_new_event_id())
