"""Recommendations into public replies."""

from __future__ import annotations

from google.protobuf.timestamp_pb2 import Timestamp

from atspeed.rpc import wire
from atspeed.v1 import recommendation_pb2 as pb
from orchestrator.recommendation import ColdStart, Item, Origin, Recommendation
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


def to_reply(recommendation: Recommendation, snapshot: Snapshot, options: pb.ReplyOptions) -> pb.RecommendResponse:
    """The reply that carries a recommendation. snapshot: what it was made with."""
    order, manifest = recommendation.order, snapshot.manifest
    return pb.RecommendResponse(
        items=[_item(rank, item, options) for rank, item in enumerate(recommendation.items, start=1)],
        versions=pb.Versions(
            target_model=recommendation.target.model_version,
            draft_model=recommendation.draft.model_version,
            catalogue=manifest.catalogue_version,
            bundle=snapshot.version,
        ),
        scoring_rule=wire.to_scoring_rule(manifest.scoring_rule),
        mode=wire.to_mode(order.mode),
        exactness=pb.Exactness(exact=recommendation.exact, largest_slack=recommendation.memo.largest_slack),
        degraded=bool(recommendation.degraded),
        degraded_reasons=recommendation.degraded,
        unknown_history_item_ids=recommendation.history.unknown,
        history_items_used=recommendation.history_items_used,
        fewer_than_k_reason=recommendation.fewer_than_k_reason,
        seed=recommendation.seed,
        statistics=None if options.omit_statistics else _statistics(recommendation),
        beam_width=order.beam_width,
        cold_start=_COLD_STARTS[recommendation.cold_start],
        unknown_excluded_items=recommendation.unknown_excluded,
        unknown_allowed_items=recommendation.unknown_allowed,
    )


def to_versions(snapshot: Snapshot) -> pb.Versions:
    """What a snapshot's requests are served by."""
    manifest = snapshot.manifest
    return pb.Versions(
        target_model=manifest.model_version("target"),
        draft_model=manifest.model_version("draft") if snapshot.draft is not None else "",
        catalogue=manifest.catalogue_version,
        bundle=snapshot.version,
    )


def to_timestamp(seconds: float) -> Timestamp:
    """Unix time as a message."""
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
    )


def _statistics(recommendation: Recommendation) -> pb.Statistics:
    memo, target, draft, times = (
        recommendation.memo,
        recommendation.target,
        recommendation.draft,
        recommendation.times,
    )
    nodes, planning = recommendation.nodes, recommendation.planning
    return pb.Statistics(
        target_passes=memo.passes,
        accepted_levels=recommendation.accepted_levels,
        draft_passes=draft.passes,
        nodes_drafted=nodes.drafted,
        nodes_used=nodes.used,
        nodes_forced=nodes.forced,
        nodes_recovered=nodes.recovered,
        nodes_spared=memo.spared,
        nodes_prefetched=nodes.prefetched,
        nodes_prefetched_used=nodes.prefetched_used,
        prompt_tokens=recommendation.prompt_tokens,
        memory_cached_tokens=target.cost.memory_cached_tokens,
        redis_cached_tokens=target.cost.redis_cached_tokens,
        target_retries=target.retries,
        nodes_asked=planning.nodes_asked,
        nodes_proposed=planning.nodes_proposed,
        expected_passes=planning.expected_passes or 0.0,
        expected_ns=planning.expected_ns or 0.0,
        target_predicted_ns=planning.target_predicted_ns or 0.0,
        draft_predicted_ns=planning.draft_predicted_ns or 0.0,
        stage_times=pb.StageTimes(
            history_ns=times.history_ns,
            draft_ns=draft.wait_ns,
            target_ns=target.wait_ns,
            target_forward_ns=target.cost.forward_ns,
            draft_forward_ns=draft.cost.forward_ns,
            selection_ns=times.selection_ns,
            total_ns=times.total_ns,
        ),
    )
