"""Reasons why items are not in a list, with their places on every level.

The target evaluates the paths of the items once more, with all children of the search's beams, so ranks are those among all
candidates that the search compared. They are ranks by score, also where a mode samples.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass, replace
from itertools import pairwise

import numpy as np

from atspeed.concurrency.deadline import Deadline
from atspeed.engine.arrays import Int64
from atspeed.engine.search.beam_widths import BeamWidths
from atspeed.engine.search.beams import Beams, children_by_score
from atspeed.engine.search.mode import Mode
from atspeed.engine.search.scoring import Children
from atspeed.engine.search.trie import ROOT
from atspeed.rpc.admission import Admitted
from orchestrator.explanation.explanation import ItemExplanation, ItemOutcome, PathStep
from orchestrator.recommend import Recommender
from orchestrator.recommendation import Recommendation, RecommendParams
from orchestrator.request_session import PromptBuilder

Slot = Callable[[], AbstractAsyncContextManager[Admitted]]
"""Gives a place among the running requests; see `Admission.slot`."""


@dataclass(frozen=True)
class AbsentItems:
    """Items of one catalogue beside one list of it.

    Attributes:
        prompts: the builder of the request's prompts.
        slot: a place among the running requests, for the search of the items' paths.
    """

    recommender: Recommender
    recommendation: Recommendation
    prompts: PromptBuilder
    slot: Slot

    async def explain(self, item_ids: Sequence[str]) -> list[ItemExplanation]:
        """Return the explanation of each item, without its rank in a wider list. Raises what `recommend` raises."""
        index = self.recommender.catalogue.find(item_ids).tolist()
        known = [item for item in index if item >= 0]
        evaluated = await self._evaluated(known) if known else {}
        candidates = self._candidates(evaluated) if known else []
        return [
            ItemExplanation(item_id, ItemOutcome.UNKNOWN_ITEM)
            if item < 0
            else self._explained(item_id, item, evaluated, candidates)
            for item_id, item in zip(item_ids, index, strict=True)
        ]

    def _path(self, item: int) -> list[int]:
        """Return the nodes of an item's path, from the root to its leaf."""
        trie, node = self.recommender.catalogue.trie, int(self.recommender.catalogue.leaf_of(np.array([item]))[0])
        path = [node]
        while node != ROOT:
            node = int(trie.parent[node])
            path.append(node)
        return path[::-1]

    async def _evaluated(self, items: Sequence[int]) -> Mapping[int, Children]:
        """Return all children of the beams and of the items' prefixes."""
        trie = self.recommender.catalogue.trie
        paths = np.array([self._path(item)[:-1] for item in items])
        beams = [level.node for level in self.recommendation.diagnostics.memo.levels]
        beams += [np.empty(0, dtype=np.int64)] * (trie.levels - len(beams))
        wanted = [np.unique([*level, *of_items]) for level, of_items in zip(beams, paths.T, strict=True)]
        # Ended places have no token; their only child is certain.
        certain = {int(node): Children.certain(trie, int(node)) for level in wanted for node in level[trie.ends[level]]}
        asked = [level[~trie.ends[level]] for level in wanted]
        async with self.slot():
            found = await self.recommender.evaluate(self.prompts.unpruned(), [level for level in asked if len(level)])
        return found | certain

    def _candidates(self, evaluated: Mapping[int, Children]) -> list[Beams]:
        """Return the candidates that the search compared for each level, from the first code on."""
        pruning, levels = self.prompts.candidates.pruning, []
        for beams in self.recommendation.diagnostics.memo.levels:
            children = children_by_score(beams, evaluated)
            levels.append(children.take(np.flatnonzero(pruning.live(children.node))))
        return levels

    def _explained(
        self, item_id: str, item: int, evaluated: Mapping[int, Children], candidates: Sequence[Beams]
    ) -> ItemExplanation:
        path = self._path(item)
        lost, memo = self._lost_level(path), self.recommendation.diagnostics.memo
        steps, score = list[PathStep](), 0.0
        for level, (above, node) in enumerate(pairwise(path), start=1):
            log_p = _log_p(evaluated[above], node)
            score += log_p
            compared = bool(memo.levels) and (not lost or level <= lost)
            rank = _rank(candidates[level - 1], node, score) if compared else 0
            steps.append(PathStep(int(memo.trie.code[node]), log_p, score, rank, self._width(above)))
        limit = self.recommendation.items_per_path
        rank = 0 if lost else self._rank_in_list(item, limit)
        outcome = self._outcome(item, lost, rank)
        return ItemExplanation(item_id, outcome, steps, lost, rank, items_per_path=limit)

    def _width(self, above: int) -> int:
        trie = self.recommender.catalogue.trie
        return self.recommendation.params.beam_widths.below(trie, np.array([above]))

    def _lost_level(self, path: Sequence[int]) -> int:
        """Return the level on which the search kept other prefixes, from 1; 0 if the leaf is a beam."""
        diagnostics = self.recommendation.diagnostics
        levels = [*diagnostics.memo.levels, diagnostics.leaves] if diagnostics.memo.levels else []
        return next((level for level, beams in enumerate(levels) if path[level] not in beams.node), 0)

    def _rank_in_list(self, item: int, limit: int | None) -> int:
        """Return the item's rank in the list without a limit k; 0 if the limit of items per path leaves it out."""
        rank, allowed = 0, self.prompts.candidates
        for leaf in self.recommendation.diagnostics.leaves.node.tolist():
            permitted = [one for one in self.recommender.catalogue.items_of(leaf) if one in allowed][:limit]
            if item in permitted:
                return rank + permitted.index(item) + 1
            rank += len(permitted)
        return 0

    def _outcome(self, item: int, lost: int, rank: int) -> ItemOutcome:
        candidates, history = self.prompts.candidates, self.recommendation.history
        if item not in candidates:
            if candidates.allowed is not None and item not in candidates.allowed:
                return ItemOutcome.NOT_ALLOWED
            named = self.recommender.catalogue.find(self.recommendation.params.excluded)
            return ItemOutcome.SEEN if item in history.known and item not in named else ItemOutcome.EXCLUDED
        if lost:
            return ItemOutcome.OUTSIDE_BEAM
        if not rank:
            return ItemOutcome.ITEMS_PER_PATH
        return ItemOutcome.IN_LIST if rank <= self.recommendation.params.k else ItemOutcome.BEYOND_K


async def with_wider_ranks(
    recommender: Recommender,
    recommendation: Recommendation,
    items: Sequence[ItemExplanation],
    width: int,
    deadline: Deadline,
) -> list[ItemExplanation]:
    """Return the explanations with the ranks in the list of the target alone that is `width` items long."""
    wider = await recommender.recommend(_wider_params(recommender, recommendation, width), deadline)
    ranks = {item.item_id: rank for rank, item in enumerate(wider.items, start=1)}
    return [replace(item, wider_rank=ranks.get(item.item_id, 0)) for item in items]


def _wider_params(recommender: Recommender, recommendation: Recommendation, width: int) -> RecommendParams:
    """Return the same request for the target alone, with the history as it was read."""
    history = [recommender.catalogue.id_of(int(item)) for item in recommendation.history.known]
    return replace(
        recommendation.params,
        k=width,
        beam_widths=BeamWidths.of(width),
        mode=Mode.TARGET_ONLY,
        history=history,
        tolerance=0.0,
        least_beam_width=None,
        requested_beam_widths=None,
    )


def _log_p(children: Children, node: int) -> float:
    return float(children.logp[np.flatnonzero(children.node == node)[0]])


def _rank(candidates: Beams, node: int, score: float) -> int:
    """Return the rank of a node among the candidates, from 1, by the declared order.

    A pruned node is no candidate. Its rank is the one that it would have by its score.
    """
    own = np.flatnonzero(candidates.node == node)
    priority = float(candidates.priority[own[0]]) if len(own) else score
    better: Int64 = candidates.node[candidates.priority >= priority]
    ties = candidates.node[candidates.priority == priority]
    return 1 + len(better) - int((ties >= node).sum())
