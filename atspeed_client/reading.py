"""Messages of the contract, read as the values of `atspeed_client.replies`."""

from __future__ import annotations

from dataclasses import fields
from datetime import UTC

from atspeed_client.enums import COLD_STARTS, DEGRADED_REASONS, FEWER_THAN_K, MODES, ORIGINS, SCORING_RULES
from atspeed_client.replies import (
    Backend,
    Exactness,
    History,
    Item,
    Recommendation,
    Recorded,
    ServiceInfo,
    StageTimes,
    Statistics,
    Versions,
)
from atspeed_client.requests import Event
from atspeed_client.v1 import recommendation_pb2 as pb


def to_recommendation(reply: pb.RecommendResponse, request_id: str) -> Recommendation:
    """Return a reply as a value."""
    return Recommendation(
        items=tuple(_item(item) for item in reply.items),
        recommendation_id=reply.recommendation_id,
        request_id=request_id,
        versions=_versions(reply.versions),
        scoring_rule=SCORING_RULES.value(reply.scoring_rule),
        mode=MODES.value(reply.mode),
        exactness=Exactness(reply.exactness.exact, reply.exactness.largest_slack),
        degraded=reply.degraded,
        degraded_reasons=tuple(map(DEGRADED_REASONS.value, reply.degraded_reasons)),
        degraded_descriptions=tuple(reply.degraded_descriptions),
        cold_start=COLD_STARTS.value(reply.cold_start) if reply.cold_start else None,
        cold_start_description=reply.cold_start_description,
        fewer_than_k_reasons=tuple(map(FEWER_THAN_K.value, reply.fewer_than_k_reasons)),
        fewer_than_k_description=reply.fewer_than_k_description,
        history_items_used=reply.history_items_used,
        unknown_history_item_ids=tuple(reply.unknown_history_item_ids),
        unknown_excluded_items=reply.unknown_excluded_items,
        unknown_allowed_items=reply.unknown_allowed_items,
        beam_width=reply.beam_width,
        beam_widths=tuple(reply.beam_widths),
        seed=reply.seed if reply.HasField("seed") else None,
        statistics=_statistics(reply.statistics),
    )


def to_history(reply: pb.GetHistoryResponse, request_id: str) -> History:
    """Return a reply as a value."""
    return History(tuple(map(Event.of, reply.events)), request_id)


def to_recorded(reply: pb.RecordEventsResponse, request_id: str) -> Recorded:
    """Return a reply as a value."""
    return Recorded(
        history_length=reply.history_length,
        unknown_item_ids=tuple(reply.unknown_item_ids),
        duplicate_events=reply.duplicate_events,
        expired_events=reply.expired_events,
        request_id=request_id,
    )


def to_info(reply: pb.GetServiceInfoResponse, _request_id: str) -> ServiceInfo:
    """Return a reply as a value."""
    plain = {one.name for one in fields(ServiceInfo)}
    plain -= {"versions", "scoring_rule", "modes", "started_at", "backends", "message"}
    return ServiceInfo(
        **{name: getattr(reply, name) for name in plain},
        versions=_versions(reply.versions),
        scoring_rule=SCORING_RULES.value(reply.scoring_rule),
        modes=tuple(map(MODES.value, reply.modes)),
        started_at=reply.started_at.ToDatetime(tzinfo=UTC),
        backends=tuple(Backend(one.name, one.available, one.model.model_version) for one in reply.backends),
        message=reply,
    )


def _item(item: pb.RecommendedItem) -> Item:
    return Item(
        rank=item.rank,
        item_id=item.item_id,
        score=item.score,
        code_path=tuple(item.code_path),
        origin=ORIGINS.value(item.origin),
        path_items=item.path_items,
    )


def _versions(versions: pb.Versions) -> Versions:
    return Versions(**{one.name: getattr(versions, one.name) for one in fields(Versions)})


def _statistics(statistics: pb.Statistics) -> Statistics:
    times = StageTimes(**{name: getattr(statistics.stage_times, name) for name in _STAGES})
    counts = {name: getattr(statistics, name) for name in _COUNTS}
    return Statistics(**counts, cached_tokens=dict(statistics.cached_tokens), stage_times=times)


_STAGES = [one.name for one in fields(StageTimes)]
_COUNTS = [one.name for one in fields(Statistics) if one.name not in {"cached_tokens", "stage_times"}]
