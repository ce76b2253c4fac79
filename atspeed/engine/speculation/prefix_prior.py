"""What the target said of prefixes, to anyone: plans without a draft, where little depends on who asks (method, section 7)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from atspeed.engine.search.beams import Beams, Float64
from atspeed.engine.search.plan import Plan, free_nodes
from atspeed.engine.search.scoring import Children, ScoringRule
from atspeed.engine.search.trie import Int64, Pruning, Trie

_MEMORY = 100
"""Requests that the mean of a node remembers at most; below 256, the most that is counted."""


class PrefixPrior:
    """For every planned node the decaying mean of its probability below its parent, over all requests that had it computed.

    What follows the first codes of an item is hardly a question of the user any more, so this foresees the last levels of a
    search as well as a draft, for nothing. It holds means over requests alone, and nothing of any of them.
    """

    def __init__(self, trie: Trie, rule: ScoringRule) -> None:
        self._trie, self._free = trie, free_nodes(trie, rule)
        # Leaves are never planned, and the root's children are each user's own.
        self._parents = trie.level_start[1], trie.level_start[max(1, trie.levels - 1)]
        self._mean = np.zeros(trie.level_start[trie.levels], dtype=np.float32)
        self._seen = np.zeros(self._parents[1], dtype=np.uint8)

    def learn(self, evaluated: Mapping[int, Children], pruning: Pruning) -> None:
        """Learn from the nodes that one request had evaluated. pruning: what it took out of the trie, of that it says nothing."""
        first, end = self._parents
        parents = np.array(sorted(node for node in evaluated if first <= node < end), dtype=np.int64)
        if not len(parents):
            return
        said = [evaluated[node] for node in parents.tolist()]
        row, child = self._trie.children_of(parents)
        probability = np.zeros(len(child))  # of what was not returned, as it is below all that was
        at = np.searchsorted(child, np.concatenate([children.node for children in said]))
        probability[at] = np.exp(np.concatenate([children.logp for children in said]))
        if not pruning.is_none:
            left = pruning.live(child)
            row, child, probability = row[left], child[left], probability[left]
        seen = np.minimum(self._seen[parents] + 1.0, _MEMORY)
        self._mean[child] += (probability - self._mean[child]) / seen[row]
        self._seen[parents] = seen

    def knows(self, beams: Beams) -> bool:
        """Whether others had most of these evaluated before; of the rest little more is known than how many items are below."""
        return 2 * int(np.count_nonzero(self._seen[beams.node])) > len(beams)

    def plan(
        self, beams: Beams, evaluated: Mapping[int, Children], beam_width: int, most: int, pruning: Pruning
    ) -> Plan:
        """At most so many nodes below the beams that a search has come to, as a draft would plan them.

        beams: of one inner level. evaluated: what the search knows, which is taken as it is and not planned again.
        """
        levels, level = [], _Level.of(beams)
        for _ in range(int(self._trie.depth(beams.node[:1])[0]), self._trie.levels - 1):
            level = self._expanded(level, evaluated, pruning).best(beam_width, most)
            levels.append(level)
        node, score, margin = (
            np.concatenate([getattr(level, name) for level in levels]) for name in ("node", "score", "margin")
        )
        wanted = np.flatnonzero(~self._free[node] & ~_known(evaluated, node))
        order = wanted[np.lexsort((node[wanted], -margin[wanted]))][:most]
        rows = order[np.argsort(node[order])]
        return Plan(beams, node[rows], score[rows], margin[rows])

    def _expanded(self, level: _Level, evaluated: Mapping[int, Children], pruning: Pruning) -> _Level:
        """All children of a level's nodes."""
        row, child = self._trie.children_of(level.node)
        if not pruning.is_none:
            left = pruning.live(child)
            row, child = row[left], child[left]
        seen = self._seen[level.node].astype(np.float64)[row]
        prior = self._paths(child) / self._paths(level.node)[row]
        logp = np.log((seen * self._mean[child] + prior) / (seen + 1.0))
        for at in np.flatnonzero(_known(evaluated, level.node)).tolist():
            said = evaluated[int(level.node[at])]
            first = int(np.searchsorted(row, at))
            logp[first : int(np.searchsorted(row, at, side="right"))] = -np.inf
            logp[first + np.searchsorted(child[row == at], said.node)] = said.logp
        return _Level(child, level.score[row] + logp, level.margin[row], level.own[row])

    def _paths(self, nodes: Int64) -> Int64:
        """Paths below nodes of one level: what is expected of one of which nothing was heard."""
        first, end = nodes, nodes + 1
        for _ in range(self._trie.levels - int(self._trie.depth(nodes[:1])[0]) if len(nodes) else 0):
            first, end = self._trie.child_start[first], self._trie.child_start[end]
        return end - first


@dataclass(frozen=True)
class _Level:
    """Nodes of one depth, ascending [n]. margin: of a plan's node, or above its parent; own: of the K best, or below them."""

    node: Int64
    score: Float64
    margin: Float64
    own: npt.NDArray[np.bool_]

    @classmethod
    def of(cls, beams: Beams) -> _Level:
        """What a search has come to."""
        beams = beams.by_node()
        return cls(beams.node, beams.score, np.full(len(beams), np.inf), np.ones(len(beams), dtype=bool))

    def best(self, beam_width: int, most: int) -> _Level:
        """The most promising, with their margins: by how much they clear the last of the K best below the K best above them."""
        own = self.score[self.own]
        threshold = (
            np.partition(own, len(own) - beam_width)[len(own) - beam_width] if len(own) >= beam_width else -np.inf
        )
        margin = np.minimum(self.margin, self.score - threshold)
        rows = np.flatnonzero(self.score > -np.inf)
        if len(rows) > most:
            rows = np.sort(rows[np.argpartition(-margin[rows], most)[:most]])
        own_rows = self.own[rows] & (self.score[rows] >= threshold)
        return _Level(self.node[rows], self.score[rows], margin[rows], own_rows)


def _known(evaluated: Mapping[int, Children], nodes: Int64) -> npt.NDArray[np.bool_]:
    """Which nodes [n] are evaluated."""
    return np.fromiter((node in evaluated for node in nodes.tolist()), dtype=bool, count=len(nodes))
