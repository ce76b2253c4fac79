"""Grows a plan: beam search with the draft model, level by level, inside one call."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from atspeed.engine.arrays import Int64
from atspeed.engine.kv.memory_cache import NO_OWNER
from atspeed.engine.model.pass_stats import PassStats
from atspeed.engine.model.tree_evaluator import PassProgram, Selection, TreeEvaluator
from atspeed.engine.search.beams import (
    Beams,
    children_by_gumbel,
    children_by_score,
    level_log_distribution,
    sample_without_replacement,
)
from atspeed.engine.search.plan import Plan, PlanSize, Proposal, Shortlist, free_nodes
from atspeed.engine.search.sampling import Stream
from atspeed.engine.search.scoring import Children, Evaluation, Perturbation, ScoringRule
from atspeed.engine.search.trie import ROOT, Pruning, Trie, among


@dataclass(frozen=True)
class DraftRequest:
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
    owner: bytes = NO_OWNER


@dataclass(frozen=True)
class Drafted:
    """A plan and what it took."""

    plan: Plan
    cost: PassStats
    passes: int


class Drafter:
    """Proposes the nodes that the target's search will ask for."""

    def __init__(self, evaluator: TreeEvaluator) -> None:
        self._evaluator = evaluator
        self._trie = evaluator.trie
        self._free = free_nodes(evaluator.trie, evaluator.rule)
        self._scale = evaluator.entry.plan_scale or (1.0,) * (evaluator.trie.levels - 1)

    async def plan(self, order: DraftRequest) -> Drafted:
        """One draft pass for each level that is planned, over the nodes of the level above that are still in the plan.

        Raises PromptError or CapacityError when the prompt or the beams do not fit the model, OverloadedError when it is busy.
        """
        growth = _Growth(order, self._trie, self._free, self._scale)
        tree = await self._evaluator.open(order.prompt, tenant=order.tenant, owner=order.owner)
        try:
            plan, cost = await self._evaluator.run_steps(tree, growth.steps(), self._selection(order))
        finally:
            self._evaluator.end(tree)
        return Drafted(plan, cost, growth.passes)

    def _selection(self, order: DraftRequest) -> Selection:
        limit = max(order.size.width, order.size.beam_width)
        # Under rule `trie` any number of a node's children may be free and better than the first that is planned.
        if order.with_evaluation or self._evaluator.rule is ScoringRule.TRIE:
            limit = max(self._trie.codebook_sizes)
        return Selection(order.pruning, limit, order.noise if order.proposal is Proposal.PERTURBED else None)


class _Growth:
    """A plan as it grows. free, scale: of the draft, see `Shortlist.grown`. passes: those that it took so far."""

    def __init__(self, order: DraftRequest, trie: Trie, free: npt.NDArray[np.bool_], scale: tuple[float, ...]) -> None:
        self._order = order
        self._trie = trie
        self._free = free
        self._scale = scale
        self._listed = Shortlist.of(order.below)
        self._evaluated = dict[int, Children]()
        self.passes = 0

    def steps(self) -> PassProgram[Plan]:
        """Level by level, from the beams down."""
        trie, order = self._trie, self._order
        start = int(trie.depth(order.below.node[:1])[0])
        frontier = self._listed.beams
        asked = np.append(ROOT, trie.with_ancestors(frontier.node)).astype(np.int64) if start else frontier.node
        for depth in range(start, order.size.last_depth(trie, start)):
            evaluation = yield asked
            self.passes += 1
            if order.with_evaluation:
                self._evaluated.update(evaluation.items())
            self._listed = self._grown(frontier, evaluation.last(len(frontier)), depth)
            frontier = self._frontier(depth + 1)
            asked = frontier.node
            if not len(asked):
                break
        return self._plan(start)

    def _plan(self, start: int) -> Plan:
        listed = self._listed
        planned = slice(np.searchsorted(listed.beams.node, self._trie.level_start[start + 1]), None)
        node, score = listed.beams.node[planned], listed.beams.score[planned]
        return Plan(self._order.below, node, score, listed.margin[planned], self._evaluated)

    def _grown(self, frontier: Beams, evaluation: Evaluation, depth: int) -> Shortlist:
        """The list with what is wanted of the level below the frontier, which is at `depth`, without what no longer fits."""
        listed, order, noise = self._listed, self._order, self._order.noise
        most = order.size.max_nodes + len(order.below)
        if noise is None or order.proposal is Proposal.TOP:
            children = children_by_score(frontier, evaluation)
        elif order.proposal is Proposal.PERTURBED:
            children = children_by_gumbel(self._trie, frontier, evaluation, noise)
        else:
            drawn = self._sample(children_by_score(frontier, evaluation), most - len(listed.beams), noise)
            # Of the accepted the first K drawn survive, so these are nearly all among the first 2K.
            likely = np.sort(drawn.node[: 2 * order.size.beam_width])
            return replace(listed.with_level(self._trie, drawn), deepest=likely)
        return listed.grown(self._trie, children, order.size, self._scale[depth], self._free).cut(self._trie, most)

    def _frontier(self, depth: int) -> Beams:
        """The nodes of a depth that are expanded: all that are listed; of a sample those that may well survive."""
        level = self._listed.level(self._trie, depth)
        if self._order.proposal is not Proposal.SAMPLE:
            return level
        return level.take(np.flatnonzero(among(self._listed.deepest, level.node)))

    def _sample(self, candidates: Beams, room: int, noise: Perturbation) -> Beams:
        """One level's draws, in order. As a sample cannot be cut to its best, every level has its share."""
        size = self._order.size
        share = min(size.width, room, max(1, size.max_nodes // size.last_depth(self._trie, ROOT)))
        log_q = level_log_distribution(candidates, noise.temperature)
        seed, stream = noise.seed, Stream.PROPOSAL
        drawn = sample_without_replacement(self._trie, candidates.node, log_q, share, seed=seed, stream=stream)
        return candidates.take(drawn)
