"""A plan: the nodes that the draft expects the target's search to ask for."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum

import numpy as np

from engine.beams import Beams, Float64, children_by_score, level_log_distribution
from engine.scoring import Children
from engine.trie import Int64, Trie


class Proposal(StrEnum):
    """How the draft chooses among the candidates of a level."""

    TOP = "top"  # the best by cumulative log-probability
    PERTURBED = "perturbed"  # the best by Gumbel-perturbed score, with the target's noise (exact sampling)
    SAMPLE = "sample"  # a sample without replacement of the level's softmax (AtSpeed-R)


@dataclass(frozen=True)
class PlanSize:
    """How much to plan. width: `N`, most nodes per level. max_nodes: most nodes in all."""

    width: int
    max_nodes: int


@dataclass(frozen=True)
class Plan:
    """Nodes below some beams, breadth-first and closed under ancestors down to the beams.

    start: the beams that the plan hangs below. node: int64 [n], ascending. score: float64 [n], cumulative log-probability.
    evaluated: what the draft itself knows of each node that it expanded; only relaxed sampling asks for it.
    """

    start: Beams
    node: Int64
    score: Float64
    evaluated: Mapping[int, Children] = field(default_factory=dict)

    @classmethod
    def empty(cls, start: Beams) -> Plan:
        """No plan: the search is then the target's own."""
        return cls(start, np.empty(0, dtype=np.int64), np.empty(0))

    def check(self, trie: Trie, limit: int) -> None:
        """Raise ValueError unless this is a plan over `trie` of at most `limit` nodes. A draft is never trusted."""
        if len(self.node) > limit or len(self.score) != len(self.node):
            raise ValueError(f"plan: {len(self.node)} nodes with {len(self.score)} scores, at most {limit} allowed")
        if len(self.node) == 0:
            return
        if (np.diff(self.node) <= 0).any() or self.node[0] <= 0 or self.node[-1] >= trie.level_start[trie.levels]:
            raise ValueError("plan.nodes: not ascending inner nodes")
        if not np.isin(trie.parent[self.node], np.concatenate([self.start.node, self.node])).all():
            raise ValueError("plan.nodes: not closed under ancestors down to the beams")
        if not np.isfinite(self.score).all():
            raise ValueError("plan.scores: not finite")

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
