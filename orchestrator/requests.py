"""Checks of public requests, before anything is looked up or allocated."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from typing import Protocol

from atspeed.engine.bundle.item_ids import MAX_ID_BYTES
from atspeed.engine.search.beam_widths import BeamWidths
from atspeed.engine.search.mode import Mode
from atspeed.errors import InvalidArgumentError, Violations
from atspeed.rpc import wire
from atspeed.rpc.admission import Priority
from atspeed.v1 import recommendation_pb2 as pb
from orchestrator.events import StoredEvent
from orchestrator.explanation.explain import ExplainParams
from orchestrator.explanation.explanation import MAX_ITEMS
from orchestrator.recommendation import RecommendParams

PRIORITIES = {pb.PRIORITY_INTERACTIVE: Priority.INTERACTIVE, pb.PRIORITY_BATCH: Priority.BATCH}
_DEFAULT_BEAM_WIDTH = 20  # the contract's default: wide enough for lists of up to 20 items
_WIDER, _LEAST_WIDER_BEAM_WIDTH = 5, 100  # the contract's default for the wider list of an explanation
_LATEST_SECONDS = 86_400.0  # clocks of producers may be ahead, and wrong by a time zone
_NANOSECONDS = 1_000_000_000
_MAX_USER_FIELDS = 64  # bounds the work of a bad request; the bundle says which names it knows
_MAX_BEAM_WIDTHS = 64  # bounds the work of a bad request; paths have a few codes, and `recommend` checks their number


class RequestLimits(Protocol):
    """Limits of a request; see the settings of the same names."""

    @property
    def max_k(self) -> int: ...  # noqa: D102
    @property
    def max_beam_width(self) -> int: ...  # noqa: D102
    @property
    def max_candidate_items(self) -> int: ...  # noqa: D102
    @property
    def max_history_items(self) -> int: ...  # noqa: D102


def parse_request(
    request: pb.RecommendRequest, limits: RequestLimits, usual: Priority = Priority.INTERACTIVE
) -> RecommendParams:
    """Return the parameters of a request. Raises InvalidArgumentError with every violation.

    usual: the priority of a request that names none.
    """
    found = Violations()
    mode, beam_widths = Mode.STRICT, BeamWidths.of(_DEFAULT_BEAM_WIDTH)
    with found.noted():
        mode = wire.mode(request.mode, "mode")
        _check_mode_fields(request, mode)
    with found.noted():
        _in_range("k", request.k, 1, limits.max_k)
        beam_widths = _beam_widths(request, mode, limits.max_beam_width)
        if request.least_beam_width:
            _in_range("least_beam_width", request.least_beam_width, request.k, beam_widths.largest)
    _check_numbers(request, found)
    if request.priority not in (*PRIORITIES, pb.PRIORITY_UNSPECIFIED):
        found.add("priority", f"{request.priority} is not a priority of this service")
    for field in ("excluded_item_ids", "allowed_item_ids"):
        with found.noted():
            check_ids(field, getattr(request, field), limits.max_candidate_items)
    with found.noted():
        check_id("tenant", request.tenant, required=False)
    with found.noted():
        _check_user_fields(request)
    with found.noted():
        _check_subject(request, limits.max_history_items)
    found.raise_any()
    stored = request.WhichOneof("subject") == "user_id"
    return RecommendParams(
        k=request.k,
        beam_widths=beam_widths,
        mode=mode,
        user_id=request.user_id if stored else None,
        history=None if stored else list(request.history.item_ids),
        tolerance=request.tolerance,
        temperature=request.temperature if request.HasField("temperature") else 1.0,
        seed=request.seed if request.HasField("seed") else None,
        excluded=list(request.excluded_item_ids),
        allowed=list(request.allowed_item_ids),
        exclude_seen=request.exclude_seen,
        tenant=request.tenant,
        priority=PRIORITIES.get(request.priority, usual),
        least_beam_width=request.least_beam_width or None,
        items_per_path=request.items_per_path or None,
        user_fields=dict(request.user_fields),
    )


def parse_explain_request(request: pb.ExplainRequest, limits: RequestLimits, usual: Priority) -> ExplainParams:
    """Return the parameters of a request for an explanation. Raises InvalidArgumentError with every violation."""
    found, width = Violations(), request.wider_beam_width
    with found.noted():
        check_ids("item_ids", request.item_ids, MAX_ITEMS)
    with found.noted():
        params = parse_request(request.request, limits, usual)
        least = params.beam_widths.largest
        if width:
            _in_range("wider_beam_width", width, least, limits.max_beam_width)
    found.raise_any()
    usual_width = min(max(_WIDER * least, _LEAST_WIDER_BEAM_WIDTH), limits.max_beam_width)
    return ExplainParams(params, list(request.item_ids), width or usual_width)


def parse_events(request: pb.RecordEventsRequest, limits: RequestLimits) -> list[StoredEvent]:
    """Return the events of a request. Raises InvalidArgumentError with every violation."""
    found = Violations()
    with found.noted():
        check_user(request)
    if not request.events:
        found.add("events", "must not be empty")
    if len(request.events) > limits.max_history_items:
        found.add("events", f"has {len(request.events)} items, at most {limits.max_history_items} are allowed")
    else:
        latest = time.time() + _LATEST_SECONDS
        for place, event in enumerate(request.events):
            _check_event(f"events[{place}]", event, latest, found)
    found.raise_any()
    return [_event(event) for event in request.events]


def _check_event(field: str, event: pb.Event, latest: float, found: Violations) -> None:
    for name in ("item_id", "type", "event_id", "recommendation_id"):
        with found.noted():
            check_id(f"{field}.{name}", getattr(event, name), required=name == "item_id")
    moment = event.time
    if not (0 <= moment.seconds <= latest and 0 <= moment.nanos < _NANOSECONDS):
        found.add(f"{field}.time", "must be a moment since 1970 and at most a day in the future")
    if not math.isfinite(event.weight):
        found.add(f"{field}.weight", f"must be finite, got {event.weight}")


def _event(event: pb.Event) -> StoredEvent:
    return StoredEvent(
        item_id=event.item_id,
        time_us=event.time.seconds * 1_000_000 + event.time.nanos // 1000 if event.HasField("time") else None,
        type=event.type,
        weight=event.weight if event.HasField("weight") else None,
        event_id=event.event_id,
        recommendation_id=event.recommendation_id,
    )


class HasUser(Protocol):
    """Request about one user."""

    @property
    def user_id(self) -> str: ...  # noqa: D102
    @property
    def tenant(self) -> str: ...  # noqa: D102


def check_user(request: HasUser) -> None:
    """Raise InvalidArgumentError with the fields' names unless user and tenant are valid ids."""
    found = Violations()
    with found.noted():
        check_id("user_id", request.user_id)
    with found.noted():
        check_id("tenant", request.tenant, required=False)
    found.raise_any()


def check_id(field: str, value: str, *, required: bool = True) -> None:
    """Raise InvalidArgumentError with the name `field` unless the value is a valid id."""
    if required and not value:
        raise InvalidArgumentError(field, "must not be empty")
    if len(value.encode()) > MAX_ID_BYTES:
        raise InvalidArgumentError(field, f"has {len(value.encode())} bytes, at most {MAX_ID_BYTES} are allowed")


def check_ids(field: str, values: Sequence[str], limit: int) -> None:
    """Raise InvalidArgumentError with the name `field` if there are too many ids, or with every id that is invalid."""
    if len(values) > limit:
        raise InvalidArgumentError(field, f"has {len(values)} items, at most {limit} are allowed")
    found = Violations()
    for index, value in enumerate(values):
        # The length is checked here first: ten thousand field names would cost more than the checks.
        if not 0 < len(value.encode()) <= MAX_ID_BYTES:
            with found.noted():
                check_id(f"{field}[{index}]", value)
    found.raise_any()


def _beam_widths(request: pb.RecommendRequest, mode: Mode, most: int) -> BeamWidths:
    """Return the beam widths of a request, each at most `most`."""
    if not request.beam_widths:
        beam_width = request.beam_width or max(request.k, _DEFAULT_BEAM_WIDTH)
        _in_range("beam_width", beam_width, request.k, most)
        return BeamWidths.of(beam_width)
    if request.beam_width:
        raise InvalidArgumentError("beam_widths", "must not be set beside beam_width")
    if len(request.beam_widths) > _MAX_BEAM_WIDTHS:
        count = len(request.beam_widths)
        raise InvalidArgumentError("beam_widths", f"has {count} widths, at most {_MAX_BEAM_WIDTHS} are allowed")
    last = len(request.beam_widths) - 1
    found = Violations()
    for index, width in enumerate(request.beam_widths):
        # A sample of k is exact only if every level keeps the ancestors of all k.
        least = request.k if index == last or mode is Mode.EXACT_SAMPLING else 1
        with found.noted():
            _in_range(f"beam_widths[{index}]", width, least, most)
    found.raise_any()
    return BeamWidths.of(*request.beam_widths)


def _check_subject(request: pb.RecommendRequest, max_items: int) -> None:
    match request.WhichOneof("subject"):
        case None:
            raise InvalidArgumentError("subject", "one of user_id and history must be set")
        case "user_id":
            check_id("user_id", request.user_id)
        case _:
            check_ids("history", request.history.item_ids, max_items)


def _check_user_fields(request: pb.RecommendRequest) -> None:
    """Check the sizes of names and values; `recommend` compares them with those of the bundle."""
    if len(request.user_fields) > _MAX_USER_FIELDS:
        count = len(request.user_fields)
        raise InvalidArgumentError("user_fields", f"has {count} fields, at most {_MAX_USER_FIELDS} are allowed")
    found = Violations()
    for name, value in request.user_fields.items():
        for text in (name, value):
            with found.noted():
                check_id("user_fields", text)
    found.raise_any()


def _check_mode_fields(request: pb.RecommendRequest, mode: Mode) -> None:
    """Refuse the fields of other modes: if they were ignored, the list would not be the one that the caller expects."""
    found = Violations()
    present = {"tolerance": bool(request.tolerance)}
    present |= {field: request.HasField(field) for field in ("temperature", "seed")}
    for field in present:
        if present[field] and field not in mode.properties.fields:
            takers = " and ".join(other for other in Mode if field in other.properties.fields)
            found.add(field, f"belongs to {takers}, not to mode {mode}")
    found.raise_any()


def _check_numbers(request: pb.RecommendRequest, found: Violations) -> None:
    """Note the numbers that no mode accepts."""
    if not 0 <= request.tolerance < math.inf:
        found.add("tolerance", f"must be at least 0 and finite, got {request.tolerance}")
    if request.HasField("temperature") and not 0.01 <= request.temperature <= 100:
        found.add("temperature", f"must be between 0.01 and 100, got {request.temperature}")
    for field in ("seed", "items_per_path"):
        if (value := getattr(request, field)) < 0:
            found.add(field, f"must be at least 0, got {value}")


def _in_range(field: str, value: int, low: int, high: int) -> None:
    if not low <= value <= high:
        raise InvalidArgumentError(field, f"must be between {low} and {high}, got {value}")
