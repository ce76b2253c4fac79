"""Replies of the client, as small frozen values. The contract describes the fields of the same names."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, fields, is_dataclass
from datetime import datetime
from typing import Any

from atspeed_client.enums import ColdStart, DegradedReason, FewerThanK, Mode, Origin, ScoringRule
from atspeed_client.requests import Event
from atspeed_client.v1 import recommendation_pb2 as pb


class Reply:
    """Value that can be written as JSON."""

    __slots__ = ()

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as dicts, lists, text and numbers; moments are in ISO 8601."""
        return {one.name: _plain(getattr(self, one.name)) for one in fields(self)}  # type: ignore[arg-type]


@dataclass(frozen=True, slots=True)
class Item(Reply):
    """Recommended item."""

    rank: int
    item_id: str
    score: float
    code_path: tuple[int, ...]
    origin: Origin
    path_items: int


@dataclass(frozen=True, slots=True)
class Versions(Reply):
    """Versions of the models and data of a list."""

    target_model: str
    draft_model: str
    catalogue: str
    bundle: str


@dataclass(frozen=True, slots=True)
class Exactness(Reply):
    """Exactness of a list."""

    exact: bool
    largest_slack: float


@dataclass(frozen=True, slots=True)
class StageTimes(Reply):
    """Milliseconds per stage."""

    history_ms: float
    draft_ms: float
    target_ms: float
    target_forward_ms: float
    draft_forward_ms: float
    selection_ms: float
    total_ms: float


@dataclass(frozen=True, slots=True)
class Statistics(Reply):
    """Work and time that a list took."""

    target_passes: int
    accepted_levels: int
    draft_passes: int
    nodes_drafted: int
    nodes_used: int
    nodes_forced: int
    nodes_recovered: int
    nodes_spared: int
    nodes_prefetched: int
    nodes_prefetched_used: int
    nodes_asked: int
    nodes_proposed: int
    prompt_tokens: int
    cached_tokens: Mapping[str, int]
    target_retries: int
    expected_passes: float
    expected_ms: float
    target_predicted_ms: float
    draft_predicted_ms: float
    stage_times: StageTimes


@dataclass(frozen=True, slots=True)
class Recommendation(Reply):
    """List of recommended items.

    Attributes:
        request_id: the id of the call in the services' logs.
        recommendation_id: the id that events name for attribution.
    """

    items: tuple[Item, ...]
    recommendation_id: str
    request_id: str
    versions: Versions
    scoring_rule: ScoringRule
    mode: Mode
    exactness: Exactness
    degraded: bool
    degraded_reasons: tuple[DegradedReason, ...]
    degraded_descriptions: tuple[str, ...]
    cold_start: ColdStart | None
    cold_start_description: str
    fewer_than_k_reasons: tuple[FewerThanK, ...]
    fewer_than_k_description: str
    history_items_used: int
    unknown_history_item_ids: tuple[str, ...]
    unknown_excluded_items: int
    unknown_allowed_items: int
    beam_width: int
    beam_widths: tuple[int, ...]
    seed: int | None
    statistics: Statistics

    @property
    def item_ids(self) -> list[str]:
        """Return the items, best first."""
        return [item.item_id for item in self.items]

    def to_pandas(self) -> Any:
        """Return a DataFrame with a row for each item. Needs pandas."""
        return _frame([{**item.to_dict(), "recommendation_id": self.recommendation_id} for item in self.items], Item)


@dataclass(frozen=True, slots=True)
class History(Reply):
    """Stored events of a user, oldest first."""

    events: tuple[Event, ...]
    request_id: str

    @property
    def item_ids(self) -> list[str]:
        """Return the items, oldest first."""
        return [event.item_id for event in self.events]

    def __iter__(self) -> Iterator[Event]:
        return iter(self.events)

    def __len__(self) -> int:
        return len(self.events)

    def to_pandas(self) -> Any:
        """Return a DataFrame with a row for each event. Needs pandas."""
        rows = [{one.name: getattr(event, one.name) for one in fields(Event)} for event in self.events]
        return _frame(rows, Event)


@dataclass(frozen=True, slots=True)
class Recorded(Reply):
    """Result of a call that stores events."""

    history_length: int
    unknown_item_ids: tuple[str, ...]
    duplicate_events: int
    expired_events: int
    request_id: str


@dataclass(frozen=True, slots=True)
class Backend(Reply):
    """Service behind the one that is called."""

    name: str
    available: bool
    model_version: str


@dataclass(frozen=True, slots=True)
class ServiceInfo(Reply):
    """Versions, limits and state of a service. `to_dict` has every field of the contract."""

    service_version: str
    bundle_name: str
    versions: Versions
    scoring_rule: ScoringRule
    catalogue_items: int
    levels: int
    max_k: int
    max_beam_width: int
    max_history_items: int
    max_candidate_items: int
    max_batch: int
    history_window: int
    allows_empty_history: bool
    modes: tuple[Mode, ...]
    started_at: datetime
    running_recommendations: int
    waiting_recommendations: int
    backends: tuple[Backend, ...]
    message: pb.GetServiceInfoResponse = field(repr=False, compare=False)

    def to_dict(self) -> dict[str, Any]:
        """Return all fields of the contract's reply, in the JSON form of protobuf."""
        from google.protobuf.json_format import MessageToDict

        return MessageToDict(self.message, preserving_proto_field_name=True, always_print_fields_with_no_presence=True)


def _plain(value: Any) -> Any:
    if is_dataclass(value):
        return {one.name: _plain(getattr(value, one.name)) for one in fields(value)}
    if isinstance(value, tuple):
        return [_plain(one) for one in value]
    if isinstance(value, Mapping):
        return dict(value)
    if isinstance(value, str):  # enums too
        return str(value)
    return value.isoformat() if isinstance(value, datetime) else value


def _frame(rows: list[dict[str, Any]], kind: type[Any]) -> Any:
    try:
        import pandas as pd
    except ImportError:
        raise ImportError("to_pandas() needs pandas: pip install pandas") from None
    columns = [one.name for one in fields(kind)]
    return pd.DataFrame(rows, columns=[*columns, "recommendation_id"] if kind is Item else columns)
