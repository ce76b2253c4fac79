"""A plan: the nodes that the draft expects the target's search to ask for."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from enum import StrEnum

import numpy as np
import numpy.typing as npt

from atspeed.engine.arrays import Float64, Int64
from atspeed.engine.search.beam_widths import BeamWidths
from atspeed.engine.search.beams import Beams, children_by_score, level_log_distribution
from atspeed.engine.search.scoring import Children, ScoringRule
from atspeed.engine.search.trie import Trie, among


class Proposal(StrEnum):
    """The draft's choice among the candidates of a level."""

    TOP = "top"  # the best by cumulative log-probability
    PERTURBED = "perturbed"  # the best by Gumbel-perturbed score, with the target's noise (exact sampling)
    SAMPLE = "sample"  # a sample without replacement of the level's softmax (AtSpeed-R)


@dataclass(frozen=True)
class PlanSize:
    """The limits of a plan.

    With max_nodes of at least width * (L - 1), the plan has N nodes per level, as in the AtSpeed paper. With a width of at least
    max_nodes, the plan is the best-first cut alone.

    Attributes:
        beam_widths: `K` of each level, the beam widths of the search.
        width: `N`, the maximum of nodes per level.
        max_nodes: the maximum of nodes in all.
        levels: the maximum of levels below the beams; None for all of them.
    """

    beam_widths: BeamWidths
    width: int
    max_nodes: int
    levels: int | None = None

    def last_depth(self, trie: Trie, start: int) -> int:
        """Return the depth of the deepest nodes to plan below beams of depth `start`."""
        deepest = trie.levels - 1
        return deepest if self.levels is None else min(start + self.levels, deepest)


def free_nodes(trie: Trie, rule: ScoringRule) -> npt.NDArray[np.bool_]:
    """Return the nodes that never need a target pass, bool [n].

    They are the nodes above ended places, and under rule `trie` all with a single path below them. A node with one child and a
    branch further down is not among them: the nodes below it need its keys and values.
    """
    if rule is not ScoringRule.TRIE:
        return trie.ends
    free = trie.child_count <= 1
    # From the deepest inner level upwards: a node is free if its only child is.
    for depth in reversed(range(trie.levels)):
        nodes = trie.level(depth)
        free[nodes] &= free[trie.child_start[nodes]]
    return free


@dataclass(frozen=True)
class Shortlist:
    """The nodes that a plan may hold, grown level by level: the best-first cut (docs/method.md, section 7).

    A strict search misses a level when one of its K beams there is not planned. So a node is worth its probability of being
    one of them. First come the draft's own K beams of each level: if draft and target agree, no level is missed. Then come the
    others by margin. The margin of a node is its score minus that of the last own beam of its level, in units of the level's
    scale. It is at most the margin of its parent, so the first nodes of the order are closed under ancestors.

    Attributes:
        beams: the nodes in ascending order, of several depths, the start beams included.
        margin: their margins, float64 [b]; +inf for the start beams.
        own: the start beams and the draft's own K beams of every level so far, int64, ascending.
        deepest: the own beams of the deepest level, int64, ascending; for a sample, the first 2K draws there.
        free: nodes of the deepest level that compete for the K best places but never need a pass, see `free_nodes`.
    """

    beams: Beams
    margin: Float64
    own: Int64
    deepest: Int64
    free: Beams

    @classmethod
    def of(cls, start: Beams) -> Shortlist:
        """Return the start beams alone."""
        start = start.by_node()
        return cls(start, np.full(len(start), np.inf), start.node, start.node, start.take(slice(0)))

    def level(self, trie: Trie, depth: int) -> Beams:
        """Return the nodes of a depth, ascending."""
        begin, end = np.searchsorted(self.beams.node, trie.level_start[depth : depth + 2])
        return self.beams.take(slice(begin, end))

    def with_level(self, trie: Trie, level: Beams, threshold: float = -np.inf, scale: float = 1.0) -> Shortlist:
        """Add nodes of the next level; their parents are in the list. Without a threshold each has its parent's margin."""
        level = level.by_node()
        # The margin of each node's parent, which limits its own.
        above = self.margin[np.searchsorted(self.beams.node, trie.parent[level.node])]
        margin = np.minimum(above, (level.priority - threshold) / scale)
        return replace(self, beams=Beams.joined([self.beams, level]), margin=np.append(self.margin, margin))

    def grown(
        self, trie: Trie, children: Beams, size: PlanSize, scale: float, free: npt.NDArray[np.bool_]
    ) -> Shortlist:
        """Add one level: the draft's own beams and the best others, `size.width` together.

        Args:
            trie: the catalogue's trie.
            children: the children of the deepest level, [m]. Those below `self.free` are added here.
            size: the limits of the plan.
            scale: the unit of the margins at the children's level, in nats.
            free: from `free_nodes`.
        """
        candidates = children
        if len(self.free):
            # A free node has a single child, with log-probability 0: the child inherits its score.
            forced = Beams(trie.child_start[self.free.node], self.free.score, self.free.weight, self.free.priority)
            candidates = Beams.joined([children, forced])
        # The draft's own K beams of this level are the best below its own beams of the level above. The last is the threshold.
        below_own = np.flatnonzero(among(self.deepest, trie.parent[candidates.node]))
        beam_width = size.beam_widths.below(trie, self.deepest)
        beam = candidates.best_among(below_own, beam_width)
        threshold = candidates.priority[beam].min() if len(below_own) >= beam_width else -np.inf
        own, costs_nothing = np.zeros(len(candidates), dtype=bool), free[candidates.node]
        own[beam] = True
        # The plan's nodes of this level: those that need a pass.
        level = _best_own_first(candidates, ~costs_nothing, own, size.width)
        # Only children of the K best free nodes can be among the K best of a deeper level.
        unpaid = _best_own_first(candidates, costs_nothing, own, beam_width)
        deepest = np.sort(candidates.node[beam])
        grown = self.with_level(trie, candidates.take(level), float(threshold), scale)
        return replace(grown, own=np.append(self.own, deepest), deepest=deepest, free=candidates.take(unpaid))

    def cut(self, trie: Trie, count: int) -> Shortlist:
        """Return the first `count` nodes: own beams first, then by margin, depth and the declared order."""
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
        """Return the first `count` of these rows by margin, depth and the declared order. Sorts only the rows of a tie."""
        margin, rest = self.margin[rows], len(rows) - count
        least = np.partition(margin, rest)[rest]  # the margin of the last chosen row
        surer, ties = rows[margin > least], rows[margin == least]
        node, priority = self.beams.node[ties], self.beams.priority[ties]
        order = np.lexsort((node, -priority, trie.depth(node)))
        return np.concatenate([surer, ties[order[: count - len(surer)]]])


def _best_own_first(candidates: Beams, wanted: npt.NDArray[np.bool_], own: npt.NDArray[np.bool_], width: int) -> Int64:
    """Return rows of the `width` best wanted candidates, in any order: own beams first, then others."""
    first = candidates.best_among(np.flatnonzero(wanted & own), width)
    others = candidates.best_among(np.flatnonzero(wanted & ~own), width - len(first))
    return np.concatenate([first, others])


@dataclass(frozen=True)
class Plan:
    """The nodes that the draft proposes: below some beams, breadth-first, closed under ancestors down to the beams.

    The nodes of the highest margins are a plan too.

    Attributes:
        start: the beams above the plan.
        node: int64 [n], ascending.
        score: cumulative log-probability under the draft, float64 [n].
        margin: margin of each node (see `Shortlist`), float64 [n]; at most its parent's, +inf if unknown.
        evaluated: the draft's evaluation of each node that it expanded; only relaxed sampling uses it.
    """

    start: Beams
    node: Int64
    score: Float64
    margin: Float64
    evaluated: Mapping[int, Children] = field(default_factory=dict)

    @classmethod
    def empty(cls, start: Beams) -> Plan:
        """Return the plan without nodes: the search is then plain beam search."""
        return cls(start, np.empty(0, dtype=np.int64), np.empty(0), np.empty(0))

    def down_to(self, trie: Trie, depth: int) -> Plan:
        """Return the plan without the nodes below `depth`."""
        return self.take(np.arange(np.searchsorted(self.node, trie.level_start[depth + 1])))

    def take(self, rows: Int64) -> Plan:
        """Return the plan of these rows, ascending."""
        return replace(self, node=self.node[rows], score=self.score[rows], margin=self.margin[rows])

    def check(self, trie: Trie, limit: int) -> None:
        """Raise ValueError unless this is a plan over `trie` of at most `limit` nodes. Plans of a draft are never trusted."""
        if len(self.node) > limit:
            raise ValueError(f"plan: {len(self.node)} nodes, at most {limit} allowed")
        if len(self.score) != len(self.node) or len(self.margin) != len(self.node):
            raise ValueError(f"plan: {len(self.node)} nodes, {len(self.score)} scores and {len(self.margin)} margins")
        if len(self.node) == 0:
            return
        if (np.diff(self.node) <= 0).any() or self.node[0] <= 0 or self.node[-1] >= trie.level_start[trie.levels]:
            raise ValueError("plan.nodes: not ascending inner nodes")
        # Where each node's parent is in the plan; the other parents must be start beams.
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
        """Return the planned nodes of a depth, start beams included, with the draft's cumulative scores."""
        node = np.concatenate([self.start.node, self.node])
        score = np.concatenate([self.start.score, self.score])
        here = trie.depth(node) == depth
        return Beams(node[here], score[here], score[here], score[here])

    def proposals(self, trie: Trie, candidates: Int64, temperature: float) -> tuple[Int64, Float64]:
        """Return the rows of `candidates` that the draft proposed, and log q of each candidate, [m]; for relaxed sampling.

        q is the softmax of the draft's cumulative scores over all children of the nodes that it expanded one level up. A
        candidate below another parent has q = 0.
        """
        log_q = np.full(len(candidates), -np.inf)
        if not len(candidates):
            return np.empty(0, dtype=np.int64), log_q
        depth = trie.depth_of(int(candidates[0]))
        # The draft's whole distribution over this level: the children of all nodes that it expanded.
        parents = self.level(trie, depth - 1)
        parents = parents.take(np.flatnonzero([node in self.evaluated for node in parents.node.tolist()]))
        level = children_by_score(parents, self.evaluated)
        # Each candidate's place in that distribution.
        by_node = np.argsort(level.node)
        position = np.searchsorted(level.node[by_node], candidates)
        found = position < len(level)
        found[found] = level.node[by_node[position[found]]] == candidates[found]
        log_q[found] = level_log_distribution(level, temperature)[by_node[position[found]]]
        return np.flatnonzero(np.isin(candidates, self.node) & (log_q > -np.inf)), log_q
