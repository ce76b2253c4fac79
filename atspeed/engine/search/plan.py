"""A plan: the nodes that the draft expects the target's search to ask for."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from enum import StrEnum

import numpy as np
import numpy.typing as npt

from atspeed.engine.arrays import Float64, Int64
from atspeed.engine.search.beams import Beams, children_by_score, level_log_distribution
from atspeed.engine.search.scoring import Children, ScoringRule
from atspeed.engine.search.trie import Trie, among


class Proposal(StrEnum):
    """How the draft chooses among the candidates of a level."""

    TOP = "top"  # the best by cumulative log-probability
    PERTURBED = "perturbed"  # the best by Gumbel-perturbed score, with the target's noise (exact sampling)
    SAMPLE = "sample"  # a sample without replacement of the level's softmax (AtSpeed-R)


@dataclass(frozen=True)
class PlanSize:
    """How much to plan.

    beam_width: `K` of the search. width: `N`, most nodes per level. max_nodes: most nodes in all. With max_nodes of at
    least width * (L-1) the plan is N per level, as the paper's; with a width of at least max_nodes it is best-first alone.
    levels: most levels below the beams; all of them where it is None.
    """

    beam_width: int
    width: int
    max_nodes: int
    levels: int | None = None

    def last_depth(self, trie: Trie, start: int) -> int:
        """The depth of the deepest nodes to plan below beams of depth `start`."""
        deepest = trie.levels - 1
        return deepest if self.levels is None else min(start + self.levels, deepest)


def free_nodes(trie: Trie, rule: ScoringRule) -> npt.NDArray[np.bool_]:
    """bool [n]: nodes that no search ever asks the target for: under rule `trie`, those with one path below them.

    A node with one child and a choice further down is not among them: what is below it stands on its keys and values.
    """
    if rule is ScoringRule.VOCAB:
        return np.zeros(trie.nodes, dtype=bool)
    free = trie.child_count <= 1
    for depth in reversed(range(trie.levels)):
        nodes = trie.level(depth)
        free[nodes] &= free[trie.child_start[nodes]]
    return free


@dataclass(frozen=True)
class Shortlist:
    """The nodes that a plan may hold, as the draft grows it level by level: the best-first cut (method, section 7).

    A strict search misses a level when one of its K beams there is not planned, so a node is worth as much as it is likely to
    be one of them. First come the draft's own K beams of each level, so that a draft that agrees with the target is never
    wrong. Then the others by margin: how far a node falls short of the last of these beams at its level, in units of that
    level's scale, or the margin of its parent, if that is lower. A child then never outranks its parent, and
    the first nodes of the order are closed under ancestors.

    beams: ascending, of several depths, the start beams included. margin: float64 [b], +inf for the start beams.
    own: int64, the start beams and the draft's own K beams of every level so far. deepest: the latter at the deepest level; of a
    sample, the first 2K draws there. Both ascending.
    free: nodes of the deepest level that compete for places among its K best, but are never evaluated: see `free_nodes`.
    """

    beams: Beams
    margin: Float64
    own: Int64
    deepest: Int64
    free: Beams

    @classmethod
    def of(cls, start: Beams) -> Shortlist:
        """The start beams alone."""
        start = start.by_node()
        return cls(start, np.full(len(start), np.inf), start.node, start.node, start.take(slice(0)))

    def level(self, trie: Trie, depth: int) -> Beams:
        """The nodes of a depth, ascending."""
        begin, end = np.searchsorted(self.beams.node, trie.level_start[depth : depth + 2])
        return self.beams.take(slice(begin, end))

    def with_level(self, trie: Trie, level: Beams, threshold: float = -np.inf, scale: float = 1.0) -> Shortlist:
        """With nodes of the next level; their parents are in the list. Without a threshold each is as sure as its parent."""
        level = level.by_node()
        above = self.margin[np.searchsorted(self.beams.node, trie.parent[level.node])]
        margin = np.minimum(above, (level.priority - threshold) / scale)
        return replace(self, beams=Beams.joined([self.beams, level]), margin=np.append(self.margin, margin))

    def grown(
        self, trie: Trie, children: Beams, size: PlanSize, scale: float, free: npt.NDArray[np.bool_]
    ) -> Shortlist:
        """One level more: of these children [m] of the deepest level, and of those below `self.free`, the draft's own beams
        and the best others, `size.width` together.

        scale: the unit of the margins at the children's level, nats.
        """
        candidates = children
        if len(self.free):
            forced = Beams(trie.child_start[self.free.node], self.free.score, self.free.weight, self.free.priority)
            candidates = Beams.joined([children, forced])
        below_own = np.flatnonzero(among(self.deepest, trie.parent[candidates.node]))
        beam = candidates.best_among(below_own, size.beam_width)
        threshold = candidates.priority[beam].min() if len(below_own) >= size.beam_width else -np.inf
        own, costs_nothing = np.zeros(len(candidates), dtype=bool), free[candidates.node]
        own[beam] = True
        level = _best_own_first(candidates, ~costs_nothing, own, size.width)
        # Below the best K of the free ones lie all of them that can be among the K best of a deeper level.
        unpaid = _best_own_first(candidates, costs_nothing, own, size.beam_width)
        deepest = np.sort(candidates.node[beam])
        grown = self.with_level(trie, candidates.take(level), float(threshold), scale)
        return replace(grown, own=np.append(self.own, deepest), deepest=deepest, free=candidates.take(unpaid))

    def cut(self, trie: Trie, count: int) -> Shortlist:
        """The first `count`: own beams, then by margin, then depth, then the declared order, as siblings often share a margin."""
        if len(self.beams) <= count:
            return self
        own = among(self.own, self.beams.node)
        first, others = np.flatnonzero(own), np.flatnonzero(~own)
        if len(first) >= count:
            kept = self._surest(trie, first, count)
        else:
            kept = np.concatenate([first, self._surest(trie, others, count - len(first))])
        kept.sort()
        return replace(self, beams=self.beams.take(kept), margin=self.margin[kept])

    def _surest(self, trie: Trie, rows: Int64, count: int) -> Int64:
        """The first `count` of these rows by margin, then depth, then the declared order. Only what decides a tie is sorted."""
        margin, rest = self.margin[rows], len(rows) - count
        least = np.partition(margin, rest)[rest]
        surer, ties = rows[margin > least], rows[margin == least]
        node, priority = self.beams.node[ties], self.beams.priority[ties]
        order = np.lexsort((node, -priority, trie.depth(node)))
        return np.concatenate([surer, ties[order[: count - len(surer)]]])


def _best_own_first(candidates: Beams, wanted: npt.NDArray[np.bool_], own: npt.NDArray[np.bool_], width: int) -> Int64:
    """Rows of the `width` best that are wanted, in any order: the best of one's own, and others where there is room."""
    first = candidates.best_among(np.flatnonzero(wanted & own), width)
    others = candidates.best_among(np.flatnonzero(wanted & ~own), width - len(first))
    return np.concatenate([first, others])


@dataclass(frozen=True)
class Plan:
    """Nodes below some beams, breadth-first and closed under ancestors down to the beams.

    start: the beams that the plan hangs below. node: int64 [n], ascending. score: float64 [n], cumulative log-probability.
    margin: float64 [n], how much each node clears what the search needs (see `Shortlist`), +inf where nothing says how
    much; never above its parent's. The plan's nodes of the highest margins are a plan too.
    evaluated: what the draft itself knows of each node that it expanded; only relaxed sampling asks for it.
    """

    start: Beams
    node: Int64
    score: Float64
    margin: Float64
    evaluated: Mapping[int, Children] = field(default_factory=dict)

    @classmethod
    def empty(cls, start: Beams) -> Plan:
        """No plan: the search is then the target's own."""
        return cls(start, np.empty(0, dtype=np.int64), np.empty(0), np.empty(0))

    def down_to(self, trie: Trie, depth: int) -> Plan:
        """Without the nodes that are deeper."""
        return self.take(np.arange(np.searchsorted(self.node, trie.level_start[depth + 1])))

    def take(self, rows: Int64) -> Plan:
        """These nodes alone, rows ascending."""
        return replace(self, node=self.node[rows], score=self.score[rows], margin=self.margin[rows])

    def check(self, trie: Trie, limit: int) -> None:
        """Raise ValueError unless this is a plan over `trie` of at most `limit` nodes. A draft is never trusted."""
        if len(self.node) > limit:
            raise ValueError(f"plan: {len(self.node)} nodes, at most {limit} allowed")
        if len(self.score) != len(self.node) or len(self.margin) != len(self.node):
            raise ValueError(f"plan: {len(self.node)} nodes, {len(self.score)} scores and {len(self.margin)} margins")
        if len(self.node) == 0:
            return
        if (np.diff(self.node) <= 0).any() or self.node[0] <= 0 or self.node[-1] >= trie.level_start[trie.levels]:
            raise ValueError("plan.nodes: not ascending inner nodes")
        parent = trie.parent[self.node]
        above = np.minimum(np.searchsorted(self.node, parent), len(self.node) - 1)
        inside = self.node[above] == parent
        if not among(np.sort(self.start.node), parent[~inside]).all():
            raise ValueError("plan.nodes: not closed under ancestors down to the beams")
        if not np.isfinite(self.score).all():
            raise ValueError("plan.scores: not finite")
        if np.isnan(self.margin).any():
            raise ValueError("plan.margins: not a number")
        if not (self.margin <= self.margin[above])[inside].all():
            raise ValueError("plan.margins: a node has more than its parent")

    def level(self, trie: Trie, depth: int) -> Beams:
        """The planned nodes of a depth, the start beams included, with the draft's cumulative scores."""
        node = np.concatenate([self.start.node, self.node])
        score = np.concatenate([self.start.score, self.score])
        here = trie.depth(node) == depth
        return Beams(node[here], score[here], score[here], score[here])

    def proposals(self, trie: Trie, candidates: Int64, temperature: float) -> tuple[Int64, Float64]:
        """For relaxed sampling, of one level's candidates [m]: the rows that the draft proposed, and log q of each [m].

        q is the softmax of the draft's cumulative scores over all children of the nodes that it expanded one level up; a
        candidate below another parent has q = 0.
        """
        log_q = np.full(len(candidates), -np.inf)
        if not len(candidates):
            return np.empty(0, dtype=np.int64), log_q
        depth = int(trie.depth(candidates[:1])[0])
        parents = self.level(trie, depth - 1)
        parents = parents.take(np.flatnonzero([node in self.evaluated for node in parents.node.tolist()]))
        level = children_by_score(parents, self.evaluated)
        by_node = np.argsort(level.node)
        position = np.searchsorted(level.node[by_node], candidates)
        found = position < len(level)
        found[found] = level.node[by_node[position[found]]] == candidates[found]
        log_q[found] = level_log_distribution(level, temperature)[by_node[position[found]]]
        return np.flatnonzero(np.isin(candidates, self.node) & (log_q > -np.inf)), log_q
