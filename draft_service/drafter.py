"""Grows a plan: beam search with the draft model, level by level, inside one call."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from engine.beams import (
    Beams,
    children_by_gumbel,
    children_by_score,
    level_log_distribution,
    sample_without_replacement,
)
from engine.cost import PassCost
from engine.plan import Plan, PlanSize, Proposal
from engine.sampling import Stream
from engine.scoring import Children, Perturbation
from engine.tree_evaluator import Selection, TreeEvaluator
from engine.trie import ROOT, Int64, Pruning


@dataclass(frozen=True)
class PlanOrder:
    """What is asked of the draft. prompt: int64 [prompt], in the draft's vocabulary. below: beams of one depth.

    noise: seed and temperature; needed by the proposals PERTURBED and SAMPLE.
    """

    prompt: Int64
    below: Beams
    size: PlanSize
    proposal: Proposal
    pruning: Pruning
    noise: Perturbation | None = None
    with_evaluation: bool = False
    tenant: str = ""


@dataclass(frozen=True)
class Drafted:
    """A plan and what it took."""

    plan: Plan
    cost: PassCost
    passes: int


class Drafter:
    """Proposes the nodes that the target's search will ask for."""

    def __init__(self, evaluator: TreeEvaluator) -> None:
        self._evaluator, self._trie = evaluator, evaluator.trie

    async def plan(self, order: PlanOrder) -> Drafted:
        """One draft pass per level from the beams down to depth L-2; their best children are the plan.

        Raises PromptError or CapacityError when the prompt or the beams do not fit the model.
        """
        tree = await self._evaluator.open(order.prompt, tenant=order.tenant)
        selection = self._selection(order)
        evaluated: dict[int, Children] = {}
        frontier, levels, cost, passes = order.below, [], PassCost(), 0
        depth = int(self._trie.depth(frontier.node[:1])[0])
        asked = np.append(ROOT, self._trie.with_ancestors(frontier.node.tolist()))
        for _ in range(depth, self._trie.levels - 1):
            evaluation, pass_cost = await self._evaluator.evaluate(tree, asked.astype(np.int64), selection)
            evaluated.update(evaluation.items())
            frontier = self._step(frontier, evaluated, order)
            levels.append(frontier)
            asked, cost, passes = np.sort(frontier.node), cost + pass_cost, passes + 1
            if not len(frontier):
                break
        return Drafted(self._assemble(order, levels, evaluated), cost, passes)

    def _selection(self, order: PlanOrder) -> Selection:
        everything = max(self._trie.codebook_sizes)
        limit = everything if order.with_evaluation else order.size.width
        return Selection(order.pruning, limit, order.noise if order.proposal is Proposal.PERTURBED else None)

    def _step(self, beams: Beams, evaluated: dict[int, Children], order: PlanOrder) -> Beams:
        """The next level's nodes, at most the width."""
        if order.proposal is Proposal.TOP or order.noise is None:
            return children_by_score(beams, evaluated).best(order.size.width)
        if order.proposal is Proposal.PERTURBED:
            return children_by_gumbel(self._trie, beams, evaluated, order.noise).best(order.size.width)
        # A sample cannot be cut to its best afterwards, so every level gets its share of the nodes beforehand.
        width = max(1, min(order.size.width, order.size.max_nodes // (self._trie.levels - 1)))
        candidates = children_by_score(beams, evaluated)
        log_q = level_log_distribution(candidates, order.noise.temperature)
        seed = order.noise.seed
        return candidates.take(
            sample_without_replacement(self._trie, candidates.node, log_q, width, seed=seed, stream=Stream.PROPOSAL)
        )

    def _assemble(self, order: PlanOrder, levels: list[Beams], evaluated: dict[int, Children]) -> Plan:
        """All levels as one plan, cut to the nodes of the highest priority.

        A child's priority is never above its parent's, and its id is higher, so what is left is closed under ancestors.
        """
        if not levels:
            return Plan.empty(order.below)
        node = np.concatenate([level.node for level in levels])
        score = np.concatenate([level.score for level in levels])
        priority = np.concatenate([level.priority for level in levels])
        if order.proposal is not Proposal.SAMPLE:
            kept = np.lexsort((node, -priority))[: order.size.max_nodes]
            node, score = node[kept], score[kept]
        ascending = np.argsort(node)
        shown = evaluated if order.with_evaluation else {}
        return Plan(order.below, node[ascending], score[ascending], shown)
