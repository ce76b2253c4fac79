"""Explains a list: its search, its time and the places of other items."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from atspeed.concurrency.deadline import Deadline
from orchestrator.explanation.absent_items import AbsentItems, with_wider_ranks
from orchestrator.explanation.explanation import Explanation, ItemOutcome
from orchestrator.explanation.recording import Recording
from orchestrator.explanation.search_tree import search_tree
from orchestrator.recommend import Recommender
from orchestrator.recommendation import RecommendParams

# Outcomes that a wider beam cannot change.
_FINAL = {
    ItemOutcome.IN_LIST,
    ItemOutcome.UNKNOWN_ITEM,
    ItemOutcome.EXCLUDED,
    ItemOutcome.SEEN,
    ItemOutcome.NOT_ALLOWED,
}


@dataclass(frozen=True)
class ExplainParams:
    """Checked parameters of a request for an explanation.

    Attributes:
        request: the request for the list.
        item_ids: items whose absence is to be explained.
        wider_beam_width: beam width of the wider list, at least the largest one of the request.
    """

    request: RecommendParams
    item_ids: Sequence[str]
    wider_beam_width: int


async def explain(
    recommender: Recommender, params: ExplainParams, request: RecommendParams, recording: Recording, deadline: Deadline
) -> Explanation:
    """Return the list of `request` with its explanation. Raises what `Recommender.recommend` raises.

    request: that of `params`, or a narrowed one.
    """
    recording.admitted()
    recommendation = await recommender.recommend(request, deadline, opened=recording.opened)
    recorded = recording.ended()
    tree = search_tree(recommendation, recorded, recommender.catalogue)
    items = await AbsentItems(recommender, recommendation, recorded.session.prompts).explain(params.item_ids)
    width = params.wider_beam_width if any(item.outcome not in _FINAL for item in items) else 0
    if width:
        items = await with_wider_ranks(recommender, recommendation, items, width, deadline)
    history = recommender.window(recommendation.history)
    titles = recommender.catalogue.titles_of(
        {*history, *(item.item_id for item in recommendation.items), *params.item_ids}
    )
    return Explanation(recommendation, tree, recorded.stages, items, width, history, titles)
