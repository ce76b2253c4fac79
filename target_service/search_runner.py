"""A model that goes on with a beam search by itself, from a pass that the orchestrator asked for to the last inner level."""

from __future__ import annotations

from dataclasses import dataclass

from atspeed.engine.arrays import Int64
from atspeed.engine.model.cost_curve import CostCurve
from atspeed.engine.model.pass_stats import PassStats
from atspeed.engine.model.tree_evaluator import OpenTree, PassRecord, Selection, TreeEvaluator
from atspeed.engine.search.scoring import Evaluation
from atspeed.engine.speculation.autonomous_search import AutonomousSearch
from atspeed.engine.speculation.latency_model import LatencyModel, Pass
from atspeed.engine.speculation.target_prefetch import TargetPrefetcher


@dataclass(frozen=True)
class Search:
    """A plain beam search. prefetches: whether a pass may hold what the next ones are likely to need."""

    width: int
    prefetches: bool


@dataclass(frozen=True)
class SearchPass:
    """A pass of a search."""

    evaluation: Evaluation
    cost: PassStats


class Searcher:
    """Makes whole searches on one evaluator. What they teach of the next ones is touched by its worker thread alone; what passes
    cost is noted here, and read there.

    curve: what passes cost. max_nodes: most nodes of a pass.
    """

    def __init__(self, evaluator: TreeEvaluator, curve: CostCurve, max_nodes: int) -> None:
        self._evaluator = evaluator
        self._costs = LatencyModel(curve)
        self._lookahead = TargetPrefetcher(evaluator.trie, evaluator.rule, self._costs, max_nodes)

    async def search(self, tree: OpenTree, nodes: Int64, selection: Selection, search: Search) -> list[SearchPass]:
        """A pass over these nodes and those that plain beam search makes from there on; raises as `TreeEvaluator.follow`."""
        trie, rule, noise, made = self._evaluator.trie, self._evaluator.rule, selection.perturbation, len(tree.passes)
        ahead = None
        if noise is None:  # a sample's next beams follow its noise, and so do the children that are chosen for it
            prompt_tokens = len(tree.tokens.prompt)
            ahead = self._lookahead.for_search(
                search.width, selection.pruning, prompt_tokens, enabled=search.prefetches
            )
        steps = AutonomousSearch(trie, rule, search.width, noise, ahead).steps(nodes)
        evaluations, _ = await self._evaluator.run_steps(tree, steps, selection)
        passes = tree.passes[made:]
        self._note(passes)
        return [SearchPass(evaluation, one.cost) for evaluation, one in zip(evaluations, passes, strict=True)]

    def _note(self, passes: list[PassRecord]) -> None:
        cached = 0
        for one in passes:
            cost = one.cost
            cached += cost.memory_cached_tokens + cost.redis_cached_tokens
            made = Pass(cost.new_tokens, cached, one.nodes)
            self._costs.observe([made], cost, one.done_ns - one.queued_ns)
            cached += cost.new_tokens
