"""A model that goes on with a beam search by itself, from a pass that the orchestrator asked for to the last inner level."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from engine.beams import Float64
from engine.cost import PassCost
from engine.cost_curve import CostCurve
from engine.descent import Descent
from engine.foresight.decayed import Decayed
from engine.foresight.lookahead import Lookahead
from engine.scoring import Evaluation
from engine.tree_evaluator import OpenTree, Selection, TreeEvaluator
from engine.trie import Int64

_BUSY = 2
"""Passes that wait: then a search that begins foresees nothing."""
_LOAD_MEMORY = 20
"""Passes that the mean number of requests in one remembers: load changes soon."""


@dataclass(frozen=True)
class Search:
    """A plain beam search. looks_ahead: whether a pass may hold what the next ones are likely to need."""

    width: int
    looks_ahead: bool


@dataclass(frozen=True)
class Found:
    """A pass of a search."""

    evaluation: Evaluation
    cost: PassCost


class Searcher:
    """Makes whole searches on one evaluator. What they teach of the next ones is touched by its worker thread alone.

    curve: what passes cost. max_nodes: most nodes of a pass.
    """

    def __init__(self, evaluator: TreeEvaluator, curve: CostCurve, max_nodes: int) -> None:
        self._evaluator, self._curve = evaluator, curve
        self._together, self._besides = Decayed(1.0, _LOAD_MEMORY), Decayed(0.0)
        self._lookahead = Lookahead(evaluator.trie, evaluator.rule, self._pass_ns, max_nodes)

    async def search(self, tree: OpenTree, nodes: Int64, selection: Selection, search: Search) -> list[Found]:
        """A pass over these nodes and those that plain beam search makes from there on; raises as `TreeEvaluator.follow`."""
        trie, noise, made = self._evaluator.trie, selection.perturbation, len(tree.passes)
        ahead = None
        if noise is None:  # a sample's next beams follow its noise, and so do the children that are chosen for it
            prompt_tokens = len(tree.tokens.prompt)
            # Where passes wait for each other what counts is the work, and what is foreseen in vain is more of it.
            foresees = search.looks_ahead and self._evaluator.waiting_passes < _BUSY
            ahead = self._lookahead.of_search(search.width, selection.pruning, prompt_tokens, foresees=foresees)
        descent = Descent(trie, self._evaluator.rule, search.width, noise, ahead)
        evaluations, _ = await self._evaluator.follow(tree, descent.steps(nodes), selection)
        passes = tree.passes[made:]
        for one in passes:
            self._together.add(max(1, one.cost.batch_requests))
            # Without the queue: what all wait for are each other's passes, and longer ones would be no cure.
            self._besides.add(one.done_ns - one.queued_ns - one.cost.queue_ns - one.cost.forward_ns)
        self._lookahead.together = self._together.value
        return [Found(evaluation, one.cost) for evaluation, one in zip(evaluations, passes, strict=True)]

    def _pass_ns(self, new_tokens: npt.ArrayLike, cached_tokens: float) -> Float64:
        tokens = self._together.value * np.asarray(new_tokens, dtype=np.float64)
        return np.asarray(self._curve.predict(tokens, cached_tokens) + self._besides.value)
