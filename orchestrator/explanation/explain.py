"""Explains a list: its search, its time and the places of other items."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from atspeed.concurrency.deadline import Deadline
from orchestrator.explanation.absent_items import AbsentItems, Slot, with_wider_ranks
from orchestrator.explanation.explanation import Explanation, ItemOutcome
from orchestrator.explanation.recording import RecordedSearch
from orchestrator.explanation.search_tree import search_tree
from orchestrator.recommend import Recommender
from orchestrator.recommendation import Recommendation, RecommendParams

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

    @property
    def narrowed_width(self) -> int:
        """Return the width of a wider list that had to wait: narrowed in the ratio of `least_beam_width` to the beam width."""
        largest = self.request.beam_widths.largest
        least = self.request.least_beam_width or largest
        return max(largest, self.wider_beam_width * least // largest)


async def explain(
    recommender: Recommender,
    params: ExplainParams,
    recommendation: Recommendation,
    recorded: RecordedSearch,
    slot: Slot,
    deadline: Deadline,
) -> Explanation:
    """Return a list with its explanation. Raises what `Recommender.recommend` raises, and ResourceExhaustedError.

    Each search for absent items waits for a slot of its own, like a further call.

    Args:
        params: the request, of which `recommendation` is the list.
        recorded: the search for the list.
        slot: gives a place among the running requests, or raises ResourceExhaustedError.
    """
    tree = search_tree(recommendation, recorded, recommender.catalogue)
    items = await AbsentItems(recommender, recommendation, recorded.session.prompts, slot).explain(params.item_ids)
    width = 0
    if any(item.outcome not in _FINAL for item in items):
        async with slot() as admitted:
            width = params.narrowed_width if admitted.waited else params.wider_beam_width
            items = await with_wider_ranks(recommender, recommendation, items, width, deadline)
    history = recommender.window(recommendation.history)
    titles = recommender.catalogue.titles_of(
        {*history, *(item.item_id for item in recommendation.items), *params.item_ids}
    )
    return Explanation(recommendation, tree, recorded.stages, items, width, history, titles)
