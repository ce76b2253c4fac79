"""Prior over prefixes: plans without a draft, from past target probabilities."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from atspeed.engine.arrays import Float64, Int64
from atspeed.engine.ewma import MEMORY
from atspeed.engine.search.beam_widths import BeamWidths
from atspeed.engine.search.beams import Beams
from atspeed.engine.search.plan import Plan, free_nodes
from atspeed.engine.search.scoring import Children, ScoringRule
from atspeed.engine.search.trie import Pruning, Trie


class PrefixPrior:
    """Decayed mean of each node's probability below its parent, over all requests that evaluated the parent.

    It works like an n-gram drafter. The codes after an item's first ones hardly depend on the user. For the last levels of a
    search it therefore plans as well as a draft, without a pass. It holds means over requests, and no data of a single one.
    """

    def __init__(self, trie: Trie, rule: ScoringRule) -> None:
        self._trie = trie
        self._free = free_nodes(trie, rule)
        # Ids of the parents, from first to end. Leaves are never planned, and the root's children depend on the user.
        self._parents = trie.level_start[1], trie.level_start[max(1, trie.levels - 1)]
        self._mean = np.zeros(trie.level_start[trie.levels], dtype=np.float32)
        # Requests that evaluated each parent, up to the memory of an `Ewma`, which fits a byte.
        self._seen = np.zeros(self._parents[1], dtype=np.uint8)

    def learn(self, evaluated: Mapping[int, Children], pruning: Pruning) -> None:
        """Learn from the nodes that one request evaluated. pruning: the request's; nothing is learned of pruned nodes."""
        first, end = self._parents
        parents = np.array(sorted(node for node in evaluated if first <= node < end), dtype=np.int64)
        if not len(parents):
            return
        returned = [evaluated[node] for node in parents.tolist()]
        row, child = self._trie.children_of(parents)
        # A child that was not returned is below all that were: its probability counts as 0.
        probability = np.zeros(len(child))
        at = np.searchsorted(child, np.concatenate([children.node for children in returned]))
        probability[at] = np.exp(np.concatenate([children.logp for children in returned]))
        if not pruning.is_none:
            live = pruning.live(child)
            row, child, probability = row[live], child[live], probability[live]
        # The step of `Ewma`, for all children of a parent by the parent's count.
        seen = np.minimum(self._seen[parents] + 1.0, MEMORY)
        self._mean[child] += (probability - self._mean[child]) / seen[row]
        self._seen[parents] = seen

    def knows_most(self, beams: Beams) -> bool:
        """Return true if past requests evaluated more than half of these beams; of others only the counts of paths are known."""
        return 2 * int(np.count_nonzero(self._seen[beams.node])) > len(beams)

    def plan(
        self, beams: Beams, evaluated: Mapping[int, Children], widths: BeamWidths, max_nodes: int, pruning: Pruning
    ) -> Plan:
        """Return a plan of at most `max_nodes` nodes below the beams of an inner level, with the margins of a draft's plan.

        evaluated: nodes of this search, whose children are taken as they are; they are not planned again.
        """
        levels = []
        level = _Level.of(beams)
        for depth in range(self._trie.depth_of(int(beams.node[0])), self._trie.levels - 1):
            level = self._expanded(level, evaluated, pruning).best(widths.at(depth + 1), max_nodes)
            levels.append(level)
        node = np.concatenate([level.node for level in levels])
        score = np.concatenate([level.score for level in levels])
        margin = np.concatenate([level.margin for level in levels])
        wanted = np.flatnonzero(~self._free[node] & ~_is_evaluated(evaluated, node))
        # The nodes of the highest margins, ties by id; then in ascending order.
        order = wanted[np.lexsort((node[wanted], -margin[wanted]))][:max_nodes]
        rows = order[np.argsort(node[order])]
        return Plan(beams, node[rows], score[rows], margin[rows])

    def _expanded(self, level: _Level, evaluated: Mapping[int, Children], pruning: Pruning) -> _Level:
        """Return all children of a level's nodes, each with its parent's margin."""
        row, child = self._trie.children_of(level.node)
        if not pruning.is_none:
            live = pruning.live(child)
            row, child = row[live], child[live]
        # Mean of the requests seen and of one imagined request, whose probability is the child's share of the paths below.
        seen = self._seen[level.node].astype(np.float64)[row]
        share_of_paths = self._paths(child) / self._paths(level.node)[row]
        logp = np.log((seen * self._mean[child] + share_of_paths) / (seen + 1.0))
        # Children of evaluated nodes get the log-probability of this search; those not returned get -inf.
        for at in np.flatnonzero(_is_evaluated(evaluated, level.node)).tolist():
            returned = evaluated[int(level.node[at])]
            first, end = np.searchsorted(row, at), np.searchsorted(row, at, side="right")
            logp[first:end] = -np.inf
            logp[first + np.searchsorted(child[first:end], returned.node)] = returned.logp
        return _Level(child, level.score[row] + logp, level.margin[row], level.own[row])

    def _paths(self, nodes: Int64) -> Int64:
        """Return the number of paths below each of these nodes of one level [n]."""
        first, end = nodes, nodes + 1
        for _ in range(self._trie.levels - self._trie.depth_of(int(nodes[0])) if len(nodes) else 0):
            first, end = self._trie.child_start[first], self._trie.child_start[end]
        return end - first


@dataclass(frozen=True)
class _Level:
    """Nodes of one depth, ascending [n].

    Attributes:
        node: int64 [n].
        score: float64 [n], cumulative log-probability.
        margin: float64 [n], of the node; before `best`, of its parent.
        own: bool [n], true for the K best of the level; before `best`, for their children.
    """

    node: Int64
    score: Float64
    margin: Float64
    own: npt.NDArray[np.bool_]

    @classmethod
    def of(cls, beams: Beams) -> _Level:
        """Return the level of a search's beams."""
        beams = beams.by_node()
        return cls(beams.node, beams.score, np.full(len(beams), np.inf), np.ones(len(beams), dtype=bool))

    def best(self, beam_width: int, max_nodes: int) -> _Level:
        """Return the nodes of the highest margins: a score less the K-th best score below the K best nodes above."""
        own = self.score[self.own]
        threshold = -np.inf
        if len(own) >= beam_width:
            threshold = np.partition(own, len(own) - beam_width)[len(own) - beam_width]
        margin = np.minimum(self.margin, self.score - threshold)
        rows = np.flatnonzero(self.score > -np.inf)
        if len(rows) > max_nodes:
            rows = np.sort(rows[np.argpartition(-margin[rows], max_nodes)[:max_nodes]])
        own_rows = self.own[rows] & (self.score[rows] >= threshold)
        return _Level(self.node[rows], self.score[rows], margin[rows], own_rows)


def _is_evaluated(evaluated: Mapping[int, Children], nodes: Int64) -> npt.NDArray[np.bool_]:
    """Return true for the nodes [n] that are evaluated."""
    return np.fromiter((node in evaluated for node in nodes.tolist()), dtype=bool, count=len(nodes))
