"""Checks of public requests, before anything is looked up or allocated."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Protocol

from atspeed.engine.bundle.item_ids import MAX_ID_BYTES
from atspeed.engine.search.beam_widths import BeamWidths
from atspeed.engine.search.mode import Mode
from atspeed.errors import InvalidArgumentError
from atspeed.rpc import wire
from atspeed.rpc.admission import Priority
from atspeed.v1 import recommendation_pb2 as pb
from orchestrator.recommendation import RecommendParams

PRIORITIES = {pb.PRIORITY_INTERACTIVE: Priority.INTERACTIVE, pb.PRIORITY_BATCH: Priority.BATCH}
_DEFAULT_BEAM_WIDTH = 20  # the contract's default: wide enough for lists of up to 20 items
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
    """Return the parameters of a request. Raises InvalidArgumentError with the name of the first invalid field.

    usual: the priority of a request that names none.
    """
    mode = wire.mode(request.mode, "mode")
    _in_range("k", request.k, 1, limits.max_k)
    beam_widths = _beam_widths(request, mode, limits.max_beam_width)
    if request.least_beam_width:
        _in_range("least_beam_width", request.least_beam_width, request.k, beam_widths.largest)
    if request.priority not in (*PRIORITIES, pb.PRIORITY_UNSPECIFIED):
        raise InvalidArgumentError("priority", f"{request.priority} is not a priority of this service")
    _check_mode_fields(request, mode)
    check_ids("excluded_item_ids", request.excluded_item_ids, limits.max_candidate_items)
    check_ids("allowed_item_ids", request.allowed_item_ids, limits.max_candidate_items)
    check_id("tenant", request.tenant, required=False)
    user_id, history = _subject(request, limits.max_history_items)
    return RecommendParams(
        k=request.k,
        beam_widths=beam_widths,
        mode=mode,
        user_id=user_id,
        history=history,
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
    )


class HasUser(Protocol):
    """Request about one user."""

    @property
    def user_id(self) -> str: ...  # noqa: D102
    @property
    def tenant(self) -> str: ...  # noqa: D102


def check_user(request: HasUser) -> None:
    """Raise InvalidArgumentError with the field's name unless user and tenant are valid ids."""
    check_id("user_id", request.user_id)
    check_id("tenant", request.tenant, required=False)


def check_id(field: str, value: str, *, required: bool = True) -> None:
    """Raise InvalidArgumentError with the name `field` unless the value is a valid id."""
    if required and not value:
        raise InvalidArgumentError(field, "must not be empty")
    if len(value.encode()) > MAX_ID_BYTES:
        raise InvalidArgumentError(field, f"has {len(value.encode())} bytes, at most {MAX_ID_BYTES} are allowed")


def check_ids(field: str, values: Sequence[str], limit: int) -> None:
    """Raise InvalidArgumentError with the name `field` if there are too many ids or one is invalid."""
    if len(values) > limit:
        raise InvalidArgumentError(field, f"has {len(values)} items, at most {limit} are allowed")
    for index, value in enumerate(values):
        # The length is checked here first: ten thousand field names would cost more than the checks.
        if not 0 < len(value.encode()) <= MAX_ID_BYTES:
            check_id(f"{field}[{index}]", value)


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
    for index, width in enumerate(request.beam_widths):
        # A sample of k is exact only if every level keeps the ancestors of all k.
        least = request.k if index == last or mode is Mode.EXACT_SAMPLING else 1
        _in_range(f"beam_widths[{index}]", width, least, most)
    return BeamWidths.of(*request.beam_widths)


def _subject(request: pb.RecommendRequest, max_items: int) -> tuple[str | None, list[str] | None]:
    """Return the user id or the history of a request, and None for the other one."""
    subject = request.WhichOneof("subject")
    if subject is None:
        raise InvalidArgumentError("subject", "one of user_id and history must be set")
    if subject == "user_id":
        check_id("user_id", request.user_id)
        return request.user_id, None
    check_ids("history", request.history.item_ids, max_items)
    return None, list(request.history.item_ids)


def _check_mode_fields(request: pb.RecommendRequest, mode: Mode) -> None:
    """Refuse the fields of other modes: if they were ignored, the list would not be the one that the caller expects."""
    if not 0 <= request.tolerance < math.inf:
        raise InvalidArgumentError("tolerance", f"must be at least 0 and finite, got {request.tolerance}")
    present = {"tolerance": bool(request.tolerance)}
    present |= {field: request.HasField(field) for field in ("temperature", "seed")}
    for field in present:
        if present[field] and field not in mode.properties.fields:
            takers = " and ".join(other for other in Mode if field in other.properties.fields)
            raise InvalidArgumentError(field, f"belongs to {takers}, not to mode {mode}")
    if request.HasField("temperature") and not 0.01 <= request.temperature <= 100:
        raise InvalidArgumentError("temperature", f"must be between 0.01 and 100, got {request.temperature}")


def _in_range(field: str, value: int, low: int, high: int) -> None:
    if not low <= value <= high:
        raise InvalidArgumentError(field, f"must be between {low} and {high}, got {value}")
