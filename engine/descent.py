"""Plain beam search one pass at a time: what it evaluates next, decided beside the model."""

from __future__ import annotations

import numpy as np

from engine.beams import Beams, children_by_gumbel, children_by_score
from engine.scoring import Children, Evaluation, Perturbation, ScoringRule
from engine.tree_evaluator import Steps
from engine.trie import Int64, Trie


class Descent:
    """A beam search from the root to the leaves that asks for each of its passes.

    It evaluates, pass by pass, what the orchestrator's loop asks for where nothing is drafted: no node that under rule `trie` is
    its parent's word for certain, and no beam below which nothing can be chosen. noise: of exact sampling.
    """

    def __init__(self, trie: Trie, rule: ScoringRule, width: int, noise: Perturbation | None = None) -> None:
        self._trie, self._rule, self._width, self._noise = trie, rule, width, noise
        self._beams, self._level = Beams.root(), 0
        self._evaluated: dict[int, Children] = {}

    def steps(self, nodes: Int64) -> Steps[list[Evaluation]]:
        """From a first pass over these nodes on, the root among them, down to the last inner level: what every pass says."""
        passes: list[Evaluation] = []
        while len(nodes):
            evaluation = yield nodes
            passes.append(evaluation)
            self._evaluated.update(evaluation.items())
            nodes = self._next_nodes()
        return passes

    def _next_nodes(self) -> Int64:
        """The ascending nodes [n] of the next pass; none once what is left to choose are leaves."""
        while self._level < self._trie.levels:
            known = np.array([self._knows(node) for node in self._beams.node.tolist()], dtype=bool)
            children = self._children(self._beams.take(np.flatnonzero(known)))
            missing = ~known & (self._beams.priority >= children.threshold(self._width))
            if missing.any():
                return np.sort(self._beams.node[missing])
            self._beams, self._level = children.best(self._width), self._level + 1
        return np.empty(0, dtype=np.int64)

    def _knows(self, node: int) -> bool:
        if node in self._evaluated:
            return True
        if self._rule is ScoringRule.TRIE and self._trie.child_count[node] == 1:
            self._evaluated[node] = Children(self._trie.children(node), np.zeros(1, dtype=np.float32), 0.0)
            return True
        return False

    def _children(self, beams: Beams) -> Beams:
        if self._noise is None:
            return children_by_score(beams, self._evaluated)
        return children_by_gumbel(self._trie, beams, self._evaluated, self._noise)
