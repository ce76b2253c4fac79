"""Conversion of recommendations to replies of the public contract."""

from __future__ import annotations

from typing import Protocol

from google.protobuf.timestamp_pb2 import Timestamp

from atspeed.engine.bundle.manifest import Manifest
from atspeed.rpc import wire
from atspeed.v1 import recommendation_pb2 as pb
from orchestrator.degraded_reason import DegradedReason
from orchestrator.events import StoredEvent
from orchestrator.recommendation import ColdStart, Diagnostics, FewerThanK, Item, Origin, Recommendation
from orchestrator.serving.snapshots import Snapshot

_ORIGINS = {
    Origin.DRAFTED: pb.ORIGIN_DRAFTED,
    Origin.RECOVERED: pb.ORIGIN_RECOVERED,
    Origin.FORCED: pb.ORIGIN_FORCED,
}
_COLD_STARTS = {
    None: pb.COLD_START_UNSPECIFIED,
    ColdStart.NO_STORED_HISTORY: pb.COLD_START_NO_STORED_HISTORY,
    ColdStart.EMPTY_HISTORY: pb.COLD_START_EMPTY_HISTORY,
    ColdStart.UNKNOWN_ITEMS: pb.COLD_START_UNKNOWN_ITEMS,
}

_FEWER_THAN_K = {reason: pb.FewerThanKReason.Value(f"FEWER_THAN_K_REASON_{reason.name}") for reason in FewerThanK}
_DEGRADED_REASONS = {reason: pb.DegradedReason.Value(f"DEGRADED_REASON_{reason.name}") for reason in DegradedReason}


class ServedBundle(Protocol):
    """The bundle that a list comes from; a `Snapshot` is one."""

    @property
    def manifest(self) -> Manifest: ...  # noqa: D102
    @property
    def version(self) -> str: ...  # noqa: D102


def to_reply(
    recommendation: Recommendation, recommendation_id: str, bundle: ServedBundle, options: pb.ReplyOptions
) -> pb.RecommendResponse:
    """Return the reply with a recommendation. bundle: the one that it comes from."""
    params, manifest = recommendation.params, bundle.manifest
    diagnostics, reasons = recommendation.diagnostics, recommendation.degraded_reasons
    cold_start = recommendation.cold_start
    return pb.RecommendResponse(
        recommendation_id=recommendation_id,
        items=[_item(rank, item, options) for rank, item in enumerate(recommendation.items, start=1)],
        versions=pb.Versions(
            target_model=diagnostics.target.model_version or "",
            draft_model=diagnostics.draft.model_version or "",
            catalogue=manifest.catalogue_version,
            bundle=bundle.version,
        ),
        scoring_rule=wire.to_scoring_rule(manifest.scoring_rule),
        mode=wire.to_mode(params.mode),
        exactness=pb.Exactness(exact=recommendation.exact, largest_slack=diagnostics.memo.largest_slack),
        degraded=bool(reasons),
        degraded_reasons=[_DEGRADED_REASONS[reason] for reason in reasons],
        degraded_descriptions=[reason.description for reason in reasons],
        unknown_history_item_ids=recommendation.history.unknown,
        history_items_used=recommendation.history_items_used,
        fewer_than_k_reasons=[_FEWER_THAN_K[reason] for reason in recommendation.fewer_than_k],
        fewer_than_k_description=recommendation.fewer_than_k_description,
        seed=recommendation.seed,
        statistics=None if options.omit_statistics else _statistics(diagnostics),
        beam_width=params.beam_widths.largest,
        beam_widths=params.beam_widths.per_level,
        cold_start=_COLD_STARTS[cold_start],
        cold_start_description="" if cold_start is None else cold_start.description,
        unknown_excluded_items=recommendation.unknown_excluded,
        unknown_allowed_items=recommendation.unknown_allowed,
    )


def to_versions(snapshot: Snapshot) -> pb.Versions:
    """Return the versions of a snapshot."""
    manifest = snapshot.manifest
    return pb.Versions(
        target_model=manifest.model_version("target"),
        draft_model=manifest.model_version("draft") if snapshot.draft is not None else "",
        catalogue=manifest.catalogue_version,
        bundle=snapshot.version,
    )


def to_event(event: StoredEvent) -> pb.Event:
    """Return a stored event as a message."""
    message = pb.Event(
        item_id=event.item_id,
        type=event.type,
        weight=event.weight,
        event_id=event.event_id,
        recommendation_id=event.recommendation_id,
    )
    if event.time_us is not None:
        message.time.FromMicroseconds(event.time_us)
    return message


def to_timestamp(seconds: float) -> Timestamp:
    """Return Unix time in seconds as a message."""
    timestamp = Timestamp()
    timestamp.FromNanoseconds(int(seconds * 1e9))
    return timestamp


def _item(rank: int, item: Item, options: pb.ReplyOptions) -> pb.RecommendedItem:
    return pb.RecommendedItem(
        rank=rank,
        item_id=item.item_id,
        score=item.score,
        code_path=() if options.omit_code_paths else item.path,
        origin=_ORIGINS[item.origin],
        path_items=item.path_items,
    )


def _statistics(diagnostics: Diagnostics) -> pb.Statistics:
    memo, nodes, planning = diagnostics.memo, diagnostics.nodes, diagnostics.planning
    target, draft = diagnostics.target, diagnostics.draft
    return pb.Statistics(
        target_passes=memo.passes,
        accepted_levels=diagnostics.accepted_levels,
        draft_passes=draft.passes,
        nodes_drafted=nodes.drafted,
        nodes_used=nodes.used,
        nodes_forced=nodes.forced,
        nodes_recovered=nodes.recovered,
        nodes_spared=memo.spared,
        nodes_prefetched=nodes.prefetched,
        nodes_prefetched_used=nodes.prefetched_used,
        prompt_tokens=diagnostics.prompt_tokens,
        cached_tokens=target.cost.cached_tokens_by_tier,
        target_retries=target.retries,
        nodes_asked=planning.nodes_asked,
        nodes_proposed=planning.nodes_proposed,
        expected_passes=planning.expected_passes or 0.0,
        expected_ms=_ms(planning.expected_ns or 0.0),
        target_predicted_ms=_ms(planning.target_predicted_ns or 0.0),
        draft_predicted_ms=_ms(planning.draft_predicted_ns or 0.0),
        stage_times=_stage_times(diagnostics),
    )


def _stage_times(diagnostics: Diagnostics) -> pb.StageTimes:
    times, target, draft = diagnostics.times, diagnostics.target, diagnostics.draft
    return pb.StageTimes(
        history_ms=_ms(times.history_ns),
        draft_ms=_ms(draft.wait_ns),
        target_ms=_ms(target.wait_ns),
        target_forward_ms=_ms(target.cost.forward_ns),
        draft_forward_ms=_ms(draft.cost.forward_ns),
        selection_ms=_ms(times.selection_ns),
        total_ms=_ms(times.total_ns),
    )


def _ms(nanoseconds: float) -> float:
    return nanoseconds / wire.NS_PER_MS
