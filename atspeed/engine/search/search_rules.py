"""The rules of beam search that the loop and the autonomous search share.

Two searches take the same decisions: the orchestrator's loop, and the target's autonomous search, which makes the loop's next
passes in advance. This module decides for both which nodes are missing and which children are chosen.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from atspeed.engine.arrays import Int64
from atspeed.engine.search.beam_widths import BeamWidths
from atspeed.engine.search.beams import Beams, Evaluated, children_by_gumbel, children_by_score
from atspeed.engine.search.scoring import Children, Perturbation, ScoringRule, certain
from atspeed.engine.search.trie import Trie


class EvaluatedNodes:
    """The evaluated nodes of one search, together with the nodes that never need an evaluation.

    Attributes:
        trie: the catalogue's trie.
        rule: the scoring rule of the bundle.
        evaluated: node -> its best live children.
    """

    def __init__(self, trie: Trie, rule: ScoringRule) -> None:
        self.trie = trie
        self.rule = rule
        self.evaluated: dict[int, Children] = {}

    def knows(self, node: int) -> bool:
        """Return whether a node needs no target pass."""
        if node in self.evaluated:
            return True
        # As `certain`, without arrays: a search asks for every beam of every level.
        if self.trie.ends[node] or (self.rule is ScoringRule.TRIE and self.trie.child_count[node] == 1):
            self.evaluated[node] = Children.certain(self.trie, node)
            return True
        return False

    def certain(self, nodes: Int64) -> npt.NDArray[np.bool_]:
        """Return which of the nodes [n] never need a pass."""
        return certain(self.trie, self.rule, nodes)

    def missing(self, beams: Beams) -> Int64:
        """Return the rows of the beams that are not evaluated."""
        return np.array([row for row, node in enumerate(beams.node.tolist()) if not self.knows(node)], dtype=np.int64)

    def known(self, beams: Beams) -> Beams:
        """Return the beams that are evaluated."""
        rows = [row for row, node in enumerate(beams.node.tolist()) if self.knows(node)]
        return beams if len(rows) == len(beams) else beams.take(np.array(rows, dtype=np.int64))


@dataclass(frozen=True)
class TopChildren:
    """The choice of beam search: the best children of all beams of a level, as many as the width of the next level.

    Attributes:
        widths: the beam widths.
        noise: None for the order by score; else the order by perturbed score (stochastic beam search, arXiv 1903.06059).
    """

    widths: BeamWidths
    noise: Perturbation | None = None

    def missing(self, beams: Beams, nodes: EvaluatedNodes) -> Int64:
        """Return the rows of the beams that are not evaluated and whose children could be chosen, ties included.

        No child has a higher priority than its parent. So a beam that enough known children exceed needs no evaluation.
        """
        missing = nodes.missing(beams)
        # The usual case, when a plan covered the level: `select` builds the children, and no comparison is needed.
        if not len(missing):
            return missing
        children = self._children(nodes.known(beams), nodes.evaluated, nodes.trie)
        return missing[beams.priority[missing] >= children.threshold(self.widths.below(nodes.trie, beams.node))]

    def select(self, beams: Beams, nodes: EvaluatedNodes) -> Beams:
        """Return the beams of the next level. All of `beams` are evaluated."""
        children = self._children(beams, nodes.evaluated, nodes.trie)
        return children.best(self.widths.below(nodes.trie, beams.node))

    def _children(self, beams: Beams, evaluated: Evaluated, trie: Trie) -> Beams:
        if self.noise is None:
            return children_by_score(beams, evaluated)
        return children_by_gumbel(trie, beams, evaluated, self.noise)
