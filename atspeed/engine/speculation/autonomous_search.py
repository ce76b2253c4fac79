"""Plain beam search one pass at a time: what it evaluates next, decided beside the model."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from atspeed.engine.model.tree_evaluator import PassProgram
from atspeed.engine.search.beams import Beams, children_by_gumbel, children_by_score
from atspeed.engine.search.scoring import Children, Evaluation, Perturbation, ScoringRule
from atspeed.engine.search.trie import Int64, Trie
from atspeed.engine.speculation.target_prefetch import SearchPrefetcher


class AutonomousSearch:
    """A beam search from the root to the leaves that asks for each of its passes.

    It evaluates, pass by pass, what the orchestrator's loop asks for where nothing is drafted: no node that under rule `trie` is
    its parent's word for certain, and no beam below which nothing can be chosen. noise: of exact sampling. ahead: adds to a pass
    what the next ones are likely to need.
    """

    def __init__(
        self,
        trie: Trie,
        rule: ScoringRule,
        width: int,
        noise: Perturbation | None = None,
        ahead: SearchPrefetcher | None = None,
    ) -> None:
        self._trie, self._rule, self._width, self._noise, self._ahead = trie, rule, width, noise, ahead
        self._beams, self._level = Beams.root(), 0
        self._used: list[Int64] = []
        self._computed: set[int] = set()
        self._evaluated: dict[int, Children] = {}

    @property
    def beams(self) -> Beams:
        """Those of the level that the search has come to; in the end, its list."""
        return self._beams

    def steps(self, nodes: Int64) -> PassProgram[list[Evaluation]]:
        """From a first pass over these nodes on, the root among them, down to the last inner level: what every pass says."""
        passes: list[Evaluation] = []
        while len(nodes) or not passes:  # of the first, whether they can be evaluated is for who does it to say
            evaluation = yield nodes
            passes.append(evaluation)
            self._computed.update(evaluation.node.tolist())
            self._evaluated.update(evaluation.items())
            nodes = self._closed(self._next_nodes())
        return passes

    def _closed(self, nodes: Int64) -> Int64:
        """With those ancestors that no pass has evaluated, since they are certain: what is below them stands on their keys."""
        if self._rule is ScoringRule.VOCAB or not len(nodes):
            return nodes
        closed = self._trie.with_ancestors(nodes).tolist()
        return np.array([node for node in closed if node not in self._computed], dtype=np.int64)

    def _next_nodes(self) -> Int64:
        """The ascending nodes [n] of the next pass; none once what is left to choose are leaves."""
        while self._level < self._trie.levels:
            known = np.array([self._knows(node) for node in self._beams.node.tolist()], dtype=bool)
            through = self._beams.take(np.flatnonzero(known))
            children = self._children(through)
            missing = ~known & (self._beams.priority >= children.threshold(self._width))
            if missing.any():
                return self._nodes(
                    self._beams.take(np.flatnonzero(known | missing)), np.sort(self._beams.node[missing])
                )
            self._used.append(np.sort(through.node[~self._certain(through.node)]))
            self._beams, self._level = children.best(self._width), self._level + 1
        if self._ahead is not None:
            self._ahead.learn(self._used, self._evaluated)
        return np.empty(0, dtype=np.int64)

    def _nodes(self, beams: Beams, missing: Int64) -> Int64:
        return missing if self._ahead is None else self._ahead.nodes(beams, missing, self._evaluated)

    def _knows(self, node: int) -> bool:
        if node in self._evaluated:
            return True
        if self._rule is ScoringRule.TRIE and self._trie.child_count[node] == 1:
            self._evaluated[node] = Children(self._trie.children(node), np.zeros(1, dtype=np.float32), 0.0)
            return True
        return False

    def _certain(self, nodes: Int64) -> npt.NDArray[np.bool_]:
        return np.asarray((self._trie.child_count[nodes] == 1) & (self._rule is ScoringRule.TRIE))

    def _children(self, beams: Beams) -> Beams:
        if self._noise is None:
            return children_by_score(beams, self._evaluated)
        return children_by_gumbel(self._trie, beams, self._evaluated, self._noise)
