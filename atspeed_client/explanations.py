"""Explanations of lists, as small frozen values. The contract describes the fields of the same names."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from atspeed_client.enums import ITEM_OUTCOMES, NODE_ORIGINS, STAGES, ItemOutcome, NodeOrigin, Stage
from atspeed_client.reading import to_recommendation
from atspeed_client.replies import Recommendation, Reply
from atspeed_client.v1 import explanation_pb2
from atspeed_client.v1 import recommendation_pb2 as pb


@dataclass(frozen=True, slots=True)
class SearchNode(Reply):
    """Node of the token tree of a search."""

    parent: int
    level: int
    code: int
    origin: NodeOrigin
    used: bool
    log_p: float | None
    log_q: float | None
    score: float | None
    pass_number: int
    beam_rank: int
    item_ids: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class StageSpan(Reply):
    """Time of one stage of a request."""

    stage: Stage
    start_ms: float
    duration_ms: float
    pass_number: int
    nodes: int
    in_advance: bool
    queue_ms: float
    forward_ms: float
    selection_ms: float
    new_tokens: int


@dataclass(frozen=True, slots=True)
class PathStep(Reply):
    """Step of an item's path, with the place of the prefix up to it."""

    code: int
    log_p: float
    score: float
    rank: int
    beam_width: int


@dataclass(frozen=True, slots=True)
class ItemExplanation(Reply):
    """Answer to why an item is not in the list."""

    item_id: str
    outcome: ItemOutcome
    description: str
    score: float | None
    path: tuple[PathStep, ...]
    lost_level: int
    rank: int
    wider_rank: int


@dataclass(frozen=True, slots=True)
class Explanation(Reply):
    """List with its explanation."""

    response: Recommendation
    nodes: tuple[SearchNode, ...]
    nodes_left_out: int
    stages: tuple[StageSpan, ...]
    items: tuple[ItemExplanation, ...]
    wider_beam_width: int
    history_item_ids: tuple[str, ...]
    titles: Mapping[str, str]


def to_explanation(reply: pb.ExplainResponse, request_id: str) -> Explanation:
    """Return a reply as a value."""
    return Explanation(
        response=to_recommendation(reply.response, request_id),
        nodes=tuple(map(_node, reply.nodes)),
        nodes_left_out=reply.nodes_left_out,
        stages=tuple(map(_stage, reply.stages)),
        items=tuple(map(_item, reply.items)),
        wider_beam_width=reply.wider_beam_width,
        history_item_ids=tuple(reply.history_item_ids),
        titles=dict(reply.titles),
    )


def _node(node: explanation_pb2.SearchNode) -> SearchNode:
    return SearchNode(
        parent=node.parent,
        level=node.level,
        code=node.code,
        origin=NODE_ORIGINS.value(node.origin),
        used=node.used,
        log_p=node.log_p if node.HasField("log_p") else None,
        log_q=node.log_q if node.HasField("log_q") else None,
        score=node.score if node.HasField("score") else None,
        pass_number=node.pass_number,
        beam_rank=node.beam_rank,
        item_ids=tuple(node.item_ids),
    )


def _stage(span: explanation_pb2.StageSpan) -> StageSpan:
    return StageSpan(
        stage=STAGES.value(span.stage),
        start_ms=span.start_ms,
        duration_ms=span.duration_ms,
        pass_number=span.pass_number,
        nodes=span.nodes,
        in_advance=span.in_advance,
        queue_ms=span.queue_ms,
        forward_ms=span.forward_ms,
        selection_ms=span.selection_ms,
        new_tokens=span.new_tokens,
    )


def _item(item: explanation_pb2.ItemExplanation) -> ItemExplanation:
    return ItemExplanation(
        item_id=item.item_id,
        outcome=ITEM_OUTCOMES.value(item.outcome),
        description=item.description,
        score=item.score if item.HasField("score") else None,
        path=tuple(PathStep(step.code, step.log_p, step.score, step.rank, step.beam_width) for step in item.path),
        lost_level=item.lost_level,
        rank=item.rank,
        wider_rank=item.wider_rank,
    )
