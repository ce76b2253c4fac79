"""Rules that choose planned nodes: by margin, and by the confidence at each node.

nodes       the nodes of the highest margins, as many for every request
margin      all nodes down to a margin, the same for every request: a cut of the planner (docs/planner.md)
confidence  the draft's own beams, and of each planned node some children, fewer where the draft is surer (CaPE, arXiv
            2402.02082, whose proposal is one sequence with alternatives; the steps of the confidence are chosen here)
mass        the draft's own beams, and of each planned node its best children up to a share of their probability
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import numpy as np

from atspeed.engine.arrays import Int64
from atspeed.engine.model.tree_evaluator import TreeEvaluator
from atspeed.engine.model.tree_session import PassProgram, Selection
from atspeed.engine.search.beams import Beams, children_by_score
from atspeed.engine.search.plan import Plan
from atspeed.engine.search.scoring import Children, Evaluation
from atspeed.engine.search.trie import ROOT, among
from atspeed.engine.speculation.acceptance_model import PlanPrefixes
from draft_service.drafter import Drafted, Drafter, DraftRequest
from draft_service.language_model_drafter import LanguageModelDrafter

MOST_NODES = 600  # of any plan
RULES = {
    "nodes": (30.0, 45.0, 60.0, 75.0, 90.0, 120.0, 180.0, 240.0, 360.0),
    "margin": (-0.5, 0.0, 0.25, 0.5, 0.75, 1.0, 1.5, 2.0, 3.0, 4.0),  # depth = -margin, in units of the plan scale
    "confidence": (0.0, 0.25, 0.5, 0.75, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0),  # factor of `_STEPS`
    "mass": (0.0, 0.2, 0.4, 0.6, 0.7, 0.8, 0.9, 0.95),
}
"""The values of each rule."""
# Children of a node by the probability of its best child: (largest probability, children).
_STEPS = ((0.3, 7), (0.6, 5), (0.8, 3), (1.0, 1))


def children_by_confidence(children: Children, factor: float) -> int:
    """Return the number of children of a node to plan, by the probability of the best one."""
    confidence = float(np.exp(children.logp[0])) if len(children.node) else 1.0
    return round(factor * next((count for most, count in _STEPS if confidence <= most), _STEPS[-1][1]))


def children_by_mass(children: Children, share: float) -> int:
    """Return the least number of best children of a node whose probabilities reach `share` of those of all its children."""
    reached = np.cumsum(np.exp(children.logp.astype(np.float64)))
    return int(np.searchsorted(reached, share * reached[-1])) + 1 if share > 0 and len(reached) else 0


class MarginDrafter:
    """Drafter of the best-first cut: at most `nodes` nodes, and none below a margin of -`depth`."""

    def __init__(self, evaluator: TreeEvaluator, *, nodes: int = MOST_NODES, depth: float = np.inf) -> None:
        self._drafter = LanguageModelDrafter(evaluator)
        self._nodes = nodes
        self._depth = depth

    async def plan(self, request: DraftRequest) -> Drafted:
        """Make a plan."""
        drafted = await self._drafter.plan(request)
        order = PlanPrefixes.of(drafted.plan, complete=True).order[: self._nodes]
        kept = order[-drafted.plan.margin[order] <= self._depth]
        return Drafted(drafted.plan.take(np.sort(kept)), drafted.cost, drafted.passes)


class PerNodeDrafter:
    """Drafter of a language model whose plans have the draft's own beams, and so many children of each planned node.

    Args:
        children: number of children to plan of a node with these children, best first.
    """

    def __init__(self, evaluator: TreeEvaluator, children: Callable[[Children], int]) -> None:
        self._evaluator = evaluator
        self._children = children

    async def plan(self, request: DraftRequest) -> Drafted:
        """Make a plan."""
        everything = Selection(request.pruning, max(self._evaluator.trie.codebook_sizes))
        tree = await self._evaluator.open(request.prompt)
        try:
            plan, cost = await self._evaluator.run_steps(tree, self._steps(request), everything)
        finally:
            self._evaluator.end(tree)
        return Drafted(plan, cost, len(np.unique(self._evaluator.trie.depth(plan.node))))

    def _steps(self, request: DraftRequest) -> PassProgram[Plan]:
        """Yield the nodes of each pass. Returns the plan."""
        trie, size = self._evaluator.trie, request.size
        frontier = request.below.by_node()
        start, own, levels = trie.depth_of(int(frontier.node[0])), frontier.node, list[Beams]()
        for depth in range(start, size.last_depth(trie, start)):
            frontier = frontier.take(np.flatnonzero(~trie.ends[frontier.node]))
            if not len(frontier):
                break
            first = start and depth == start
            asked = frontier.node
            evaluation = yield np.append(ROOT, trie.with_ancestors(asked)).astype(np.int64) if first else asked
            known = evaluation.last(len(asked))
            children = children_by_score(frontier, known)
            below_own = np.flatnonzero(among(own, trie.parent[children.node]))
            best = children.best_among(below_own, size.beam_widths.at(depth + 1))
            own = np.sort(children.node[best])
            room = size.max_nodes - sum(map(len, levels))
            first_rows = children.best_among(best, room)
            others = np.setdiff1d(self._wanted(known, children), best)
            rows = np.append(first_rows, children.best_among(others, room - len(first_rows)))
            frontier = children.take(rows).by_node()
            levels.append(frontier)
        found = Beams.joined([request.below.take(slice(0)), *levels])
        return Plan(request.below, found.node, found.score, np.zeros(len(found)))

    def _wanted(self, known: Evaluation, children: Beams) -> Int64:
        """Return the rows of the children that the rule plans."""
        nodes = [child for _, below in known.items() for child in below.node[: max(0, self._children(below))].tolist()]
        return np.flatnonzero(among(np.sort(np.array(nodes, dtype=np.int64)), children.node))


def drafter_of(evaluator: TreeEvaluator, rule: str, value: float) -> Drafter:
    """Make the drafter of a rule."""
    if rule == "nodes":
        return MarginDrafter(evaluator, nodes=int(value))
    if rule == "margin":
        return MarginDrafter(evaluator, depth=value)
    by_name = {
        "confidence": partial(children_by_confidence, factor=value),
        "mass": partial(children_by_mass, share=value),
    }
    return PerNodeDrafter(evaluator, by_name[rule])
