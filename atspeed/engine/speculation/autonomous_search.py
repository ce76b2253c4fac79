"""The target's own beam search: the passes that the loop would ask for.

It takes every decision by the rules that the loop uses (`search_rules`), so the loop finds its next passes already made.
"""

from __future__ import annotations

import numpy as np

from atspeed.engine.arrays import Int64
from atspeed.engine.model.tree_session import PassProgram
from atspeed.engine.search.beams import Beams
from atspeed.engine.search.scoring import Evaluation, Perturbation, ScoringRule
from atspeed.engine.search.search_rules import EvaluatedNodes, TopChildren
from atspeed.engine.search.trie import Trie
from atspeed.engine.speculation.target_prefetch import SearchPrefetcher


class AutonomousSearch:
    """A plain beam search from the root to the leaves that asks for its passes one by one.

    Args:
        trie: the catalogue's trie.
        rule: the scoring rule of the bundle.
        width: the beam width.
        noise: the perturbation of exact sampling.
        prefetcher: adds the nodes to a pass that the next passes probably need.
    """

    def __init__(
        self,
        trie: Trie,
        rule: ScoringRule,
        width: int,
        noise: Perturbation | None = None,
        prefetcher: SearchPrefetcher | None = None,
    ) -> None:
        self._nodes = EvaluatedNodes(trie, rule)
        self._choice = TopChildren(width, noise)
        self._prefetcher = prefetcher
        self._beams = Beams.root()
        self._level = 0
        self._used: list[Int64] = []
        self._computed: set[int] = set()

    @property
    def beams(self) -> Beams:
        """The beams of the current level; after the last level, the list."""
        return self._beams

    def steps(self, nodes: Int64) -> PassProgram[list[Evaluation]]:
        """Yield the nodes of each pass, and return all evaluations.

        nodes: of the first pass, with the root among them. The evaluator checks whether they can be evaluated.
        """
        passes: list[Evaluation] = []
        while len(nodes) or not passes:
            evaluation = yield nodes
            passes.append(evaluation)
            self._computed.update(evaluation.node.tolist())
            self._nodes.evaluated.update(evaluation.items())
            nodes = self._with_ancestors(self._next_nodes())
        return passes

    def _with_ancestors(self, nodes: Int64) -> Int64:
        """Add the ancestors that no pass has computed, since they are certain: their descendants attend to their keys."""
        if self._nodes.rule is not ScoringRule.TRIE or not len(nodes):
            return nodes
        closed = self._nodes.trie.with_ancestors(nodes).tolist()
        return np.array([node for node in closed if node not in self._computed], dtype=np.int64)

    def _next_nodes(self) -> Int64:
        """Return the ascending nodes [n] of the next pass; none when only leaves are left to choose."""
        while self._level < self._nodes.trie.levels:
            missing = self._choice.missing(self._beams, self._nodes)
            if len(missing):
                return self._with_prefetch(missing)
            known = self._nodes.known(self._beams)
            self._used.append(np.sort(known.node[~self._nodes.certain(known.node)]))
            self._beams = self._choice.select(known, self._nodes)
            self._level += 1
        if self._prefetcher is not None:
            self._prefetcher.learn(self._used, self._nodes.evaluated)
        return np.empty(0, dtype=np.int64)

    def _with_prefetch(self, missing: Int64) -> Int64:
        """Return the nodes of the missing rows and those to prefetch below the beams that the search goes through."""
        nodes = np.sort(self._beams.node[missing])
        if self._prefetcher is None:
            return nodes
        spared = np.ones(len(self._beams), dtype=bool)  # beams below which nothing can be chosen
        spared[[self._nodes.knows(node) for node in self._beams.node.tolist()]] = False
        spared[missing] = False
        return self._prefetcher.nodes(self._beams.take(np.flatnonzero(~spared)), nodes, self._nodes.evaluated)
