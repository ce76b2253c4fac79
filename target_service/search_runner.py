"""Runs autonomous searches: the remaining passes of a beam search on the target."""

from __future__ import annotations

from dataclasses import dataclass

from atspeed.engine.arrays import Int64
from atspeed.engine.model.cost_curve import CostCurve
from atspeed.engine.model.pass_stats import PassStats
from atspeed.engine.model.tree_evaluator import TreeEvaluator
from atspeed.engine.model.tree_session import CompletedPass, Selection, TreeSession
from atspeed.engine.search.beam_widths import BeamWidths
from atspeed.engine.search.scoring import Evaluation
from atspeed.engine.speculation.autonomous_search import AutonomousSearch
from atspeed.engine.speculation.latency_model import LatencyModel, Pass
from atspeed.engine.speculation.target_prefetch import TargetPrefetcher


@dataclass(frozen=True)
class Search:
    """A plain beam search.

    Attributes:
        widths: the beam widths.
        prefetches: True if a pass may contain prefetched nodes.
    """

    widths: BeamWidths
    prefetches: bool


@dataclass(frozen=True)
class SearchPass:
    """One pass of a search.

    Attributes:
        evaluation: the evaluated nodes.
        cost: pass stats.
    """

    evaluation: Evaluation
    cost: PassStats


class SearchRunner:
    """Runs searches on one evaluator.

    Only the evaluator's worker thread uses the prefetcher's statistics. The event loop updates the latency model, and the worker
    thread reads it.

    Args:
        curve: cost curve of the model.
        max_nodes: maximum number of nodes in a pass.
    """

    def __init__(self, evaluator: TreeEvaluator, curve: CostCurve, max_nodes: int) -> None:
        self._evaluator = evaluator
        self._latency = LatencyModel(curve)
        self._prefetcher = TargetPrefetcher(evaluator.trie, evaluator.rule, self._latency, max_nodes)

    async def search(self, tree: TreeSession, nodes: Int64, selection: Selection, search: Search) -> list[SearchPass]:
        """Evaluate the nodes, then the remaining passes of plain beam search. Raises as `TreeEvaluator.run_steps`."""
        trie, rule, noise, made = self._evaluator.trie, self._evaluator.rule, selection.perturbation, len(tree.passes)
        prefetch = None
        if noise is None:  # the next beams of a sample depend on its noise, so the prior cannot predict them
            prompt_tokens = len(tree.tokens.prompt)
            prefetch = self._prefetcher.for_search(
                search.widths, selection.pruning, prompt_tokens, enabled=search.prefetches
            )
        steps = AutonomousSearch(trie, rule, search.widths, noise, prefetch).steps(nodes)
        evaluations, _ = await self._evaluator.run_steps(tree, steps, selection)
        passes = tree.passes[made:]
        self._observe(passes)
        return [SearchPass(evaluation, one.stats) for evaluation, one in zip(evaluations, passes, strict=True)]

    def _observe(self, passes: list[CompletedPass]) -> None:
        """Update the latency model with the passes of one search. Each pass finds the tokens of earlier ones cached."""
        cached = 0
        for one in passes:
            cost = one.stats
            cached += cost.cached_tokens
            made = Pass(cost.new_tokens, cached, one.nodes)
            self._latency.observe([made], cost, one.done_ns - one.queued_ns)
            cached += cost.new_tokens
