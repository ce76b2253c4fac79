"""Conversion of explanations to replies of the public contract."""

from __future__ import annotations

from atspeed.rpc import wire
from atspeed.v1 import explanation_pb2 as explanation
from atspeed.v1 import recommendation_pb2 as pb
from orchestrator.explanation.explanation import (
    Explanation,
    ItemExplanation,
    ItemOutcome,
    NodeOrigin,
    SearchNode,
    Stage,
    StageSpan,
)

_ORIGINS = {one: explanation.NodeOrigin.Value(f"NODE_ORIGIN_{one.name}") for one in NodeOrigin}
_STAGES = {one: explanation.Stage.Value(f"STAGE_{one.name}") for one in Stage}
_OUTCOMES = {one: explanation.ItemOutcome.Value(f"ITEM_OUTCOME_{one.name}") for one in ItemOutcome}


def to_explanation(found: Explanation, response: pb.RecommendResponse) -> pb.ExplainResponse:
    """Return the reply with an explanation. response: the reply with its list."""
    return pb.ExplainResponse(
        response=response,
        nodes=map(_node, found.tree.nodes),
        nodes_left_out=found.tree.left_out,
        stages=map(_stage, found.stages),
        items=map(_item, found.items),
        wider_beam_width=found.wider_beam_width,
        history_item_ids=found.history_item_ids,
        titles=found.titles,
    )


def _node(node: SearchNode) -> explanation.SearchNode:
    return explanation.SearchNode(
        parent=node.parent,
        level=node.level,
        code=node.code,
        origin=_ORIGINS[node.origin],
        used=node.used,
        log_p=node.log_p,
        log_q=node.log_q,
        score=node.score,
        beam_rank=node.beam_rank,
        item_ids=node.item_ids,
        pass_number=node.pass_number,
    )


def _stage(span: StageSpan) -> explanation.StageSpan:
    return explanation.StageSpan(
        stage=_STAGES[span.stage],
        start_ms=span.start_ns / wire.NS_PER_MS,
        duration_ms=span.duration_ns / wire.NS_PER_MS,
        nodes=span.nodes,
        in_advance=span.in_advance,
        queue_ms=span.queue_ns / wire.NS_PER_MS,
        forward_ms=span.forward_ns / wire.NS_PER_MS,
        selection_ms=span.selection_ns / wire.NS_PER_MS,
        new_tokens=span.new_tokens,
        pass_number=span.pass_number,
    )


def _item(item: ItemExplanation) -> explanation.ItemExplanation:
    return explanation.ItemExplanation(
        item_id=item.item_id,
        outcome=_OUTCOMES[item.outcome],
        description=item.description,
        score=item.score,
        path=[
            explanation.PathStep(
                code=step.code, log_p=step.log_p, score=step.score, rank=step.rank, beam_width=step.beam_width
            )
            for step in item.path
        ],
        lost_level=item.lost_level,
        rank=item.rank,
        wider_rank=item.wider_rank,
    )
