"""Growth of a plan, level by level, from evaluated nodes."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from atspeed.engine.model.tree_evaluator import TreeEvaluator
from atspeed.engine.model.tree_session import PassProgram, Selection
from atspeed.engine.search.beams import (
    Beams,
    children_by_gumbel,
    children_by_score,
    level_log_distribution,
    sample_without_replacement,
)
from atspeed.engine.search.plan import Plan, Proposal, Shortlist, free_nodes
from atspeed.engine.search.sampling import Stream
from atspeed.engine.search.scoring import Children, Evaluation, Perturbation
from atspeed.engine.search.trie import ROOT, Trie, among
from draft_service.drafter import DraftRequest


@dataclass(frozen=True)
class PlanRules:
    """The rules of a draft's plans.

    Attributes:
        trie: the catalogue's trie.
        free: bool [nodes], the forced nodes.
        has_free: whether a node that may be planned is forced.
        scale: plan scale of each level, see `Shortlist.grown`.
    """

    trie: Trie
    free: npt.NDArray[np.bool_]
    has_free: bool
    scale: tuple[float, ...]

    @classmethod
    def of(cls, evaluator: TreeEvaluator) -> PlanRules:
        """Return the rules of a draft's evaluator."""
        trie = evaluator.trie
        free = free_nodes(trie, evaluator.rule)
        has_free = bool(free[: trie.level_start[trie.levels]].any())
        return cls(trie, free, has_free, evaluator.entry.plan_scale or (1.0,) * (trie.levels - 1))

    def growth(self, request: DraftRequest) -> PlanGrowth:
        """Begin a plan."""
        return PlanGrowth(request, self.trie, self.free, self.scale)

    def selection(self, request: DraftRequest) -> Selection:
        """Return the children of a node that a plan needs."""
        limit = max(request.size.width, request.size.beam_widths.largest)
        # Any number of a node's children may be free and better than the first planned one.
        if request.with_evaluation or self.has_free:
            limit = max(self.trie.codebook_sizes)
        return Selection(request.pruning, limit, request.noise if request.proposal is Proposal.PERTURBED else None)


class PlanGrowth:
    """A plan that grows level by level.

    Args:
        free: bool [nodes], the forced nodes.
        scale: plan scale of each level, see `Shortlist.grown`.

    Attributes:
        passes: number of passes so far.
    """

    def __init__(
        self, request: DraftRequest, trie: Trie, free: npt.NDArray[np.bool_], scale: tuple[float, ...]
    ) -> None:
        self._request = request
        self._trie = trie
        self._free = free
        self._scale = scale
        self._shortlist = Shortlist.of(request.below)
        self._evaluated = dict[int, Children]()
        self.passes = 0

    def steps(self) -> PassProgram[Plan]:
        """Yield the nodes of each pass, from the beams downwards. Returns the plan."""
        trie, request = self._trie, self._request
        start = trie.depth_of(int(request.below.node[0]))
        frontier = self._shortlist.beams
        for depth in range(start, request.size.last_depth(trie, start)):
            evaluation = Evaluation.of({})
            if len(asked := frontier.node[~trie.ends[frontier.node]]):
                first = start and not self.passes
                evaluation = yield np.append(ROOT, trie.with_ancestors(asked)).astype(np.int64) if first else asked
                self.passes += 1
            expanded = evaluation.last(len(asked)).with_ended(trie, frontier.node)
            if request.with_evaluation:
                self._evaluated.update(evaluation.items())
                self._evaluated.update(expanded.items())
            self._shortlist = self._grown(frontier, expanded, depth)
            frontier = self._frontier(depth + 1)
            if not len(frontier):
                break
        return self._plan(start)

    def _plan(self, start: int) -> Plan:
        shortlist = self._shortlist
        planned = slice(np.searchsorted(shortlist.beams.node, self._trie.level_start[start + 1]), None)
        node, score = shortlist.beams.node[planned], shortlist.beams.score[planned]
        return Plan(self._request.below, node, score, shortlist.margin[planned], self._evaluated)

    def _grown(self, frontier: Beams, evaluation: Evaluation, depth: int) -> Shortlist:
        """Return the shortlist with the nodes of the next level, cut to the plan's size. The frontier is at `depth`."""
        shortlist, request, noise = self._shortlist, self._request, self._request.noise
        most = request.size.max_nodes + len(request.below)
        if noise is None or request.proposal is Proposal.TOP:
            children = children_by_score(frontier, evaluation)
        elif request.proposal is Proposal.PERTURBED:
            children = children_by_gumbel(self._trie, frontier, evaluation, noise)
        else:
            drawn = self._sample(children_by_score(frontier, evaluation), most - len(shortlist.beams), noise)
            # The first K accepted draws survive, and nearly all of them are among the first 2K draws.
            likely = np.sort(drawn.node[: 2 * request.size.beam_widths.at(depth + 1)])
            return replace(shortlist.with_level(self._trie, drawn), deepest=likely)
        return shortlist.grown(self._trie, children, request.size, self._scale[depth], self._free).cut(self._trie, most)

    def _frontier(self, depth: int) -> Beams:
        """Return the nodes of a depth to expand: all listed ones, or for a sample those that probably survive."""
        level = self._shortlist.level(self._trie, depth)
        if self._request.proposal is not Proposal.SAMPLE:
            return level
        return level.take(np.flatnonzero(among(self._shortlist.deepest, level.node)))

    def _sample(self, candidates: Beams, room: int, noise: Perturbation) -> Beams:
        """Draw the sample of one level. A sample cannot be cut to its best nodes, so every level has a fixed share."""
        size = self._request.size
        share = min(size.width, room, max(1, size.max_nodes // size.last_depth(self._trie, ROOT)))
        log_q = level_log_distribution(candidates, noise.temperature)
        seed, stream = noise.seed, Stream.PROPOSAL
        drawn = sample_without_replacement(self._trie, candidates.node, log_q, share, seed=seed, stream=stream)
        return candidates.take(drawn)
