"""What one request knows so far: the nodes that the target has evaluated, and how it came to them."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from atspeed.engine.search.beams import Beams
from atspeed.engine.search.plan import Plan
from atspeed.engine.search.scoring import Children, Evaluation, ScoringRule
from atspeed.engine.search.trie import ROOT, Int64, Trie, among


@dataclass(frozen=True)
class NodeCounts:
    """How many nodes: drafted, evaluated because a plan held them; used, those of them that became beams; recovered, beams
    that no plan held; forced, beams that were their parent's only child; foreseen, evaluated by the target before it was asked;
    prefetched_used, those of them that became beams.
    """

    drafted: int
    used: int
    recovered: int
    forced: int
    foreseen: int
    prefetched_used: int


class Memo:
    """Evaluated nodes of one request. A hit is a speculation that came true; a miss costs a target pass.

    evaluated: node -> its best live children. plan: the newest plan, which relaxed sampling takes q from.
    pass_levels: the level of the beams that each target pass was made for.
    levels: the beams of every level that the search has come to, root first.
    foreseen: nodes that the target evaluated unasked, as it expected them to be asked for.
    spared: beams that were never evaluated, because nothing below them could be chosen.
    substitutions, largest_slack: how often the tolerance policy stood one node in for another, and the largest score gap.
    """

    def __init__(self, trie: Trie, rule: ScoringRule) -> None:
        self.trie, self.rule = trie, rule
        self.evaluated: dict[int, Children] = {}
        self.plan = Plan.empty(Beams.root())
        self.drafted: set[int] = set()
        self.recovered: set[int] = set()
        self.foreseen: set[int] = set()
        self.used: set[int] = set()
        self.passes = 0
        self.pass_levels: list[int] = []
        self._asked = np.empty(0, dtype=np.int64)
        self.levels: list[Beams] = []
        self.spared = 0
        self.substitutions = 0
        self.largest_slack = 0.0

    def knows(self, node: int) -> bool:
        """Whether a node needs no target pass."""
        if node in self.evaluated:
            return True
        if self.is_certain(node):
            self.evaluated[node] = Children(self.trie.children(node), np.zeros(1, dtype=np.float32), 0.0)
            return True
        return False

    def is_certain(self, node: int) -> bool:
        """Whether a node never needs one: under rule `trie`, where it has a single child."""
        return self.rule is ScoringRule.TRIE and int(self.trie.child_count[node]) == 1

    def certain(self, nodes: Int64) -> npt.NDArray[np.bool_]:
        """`is_certain` of nodes [n]."""
        return np.asarray((self.trie.child_count[nodes] == 1) & (self.rule is ScoringRule.TRIE))

    def missing(self, beams: Beams) -> Int64:
        """Rows of the beams that are not evaluated."""
        return np.flatnonzero([not self.knows(node) for node in beams.node.tolist()])

    def known(self, beams: Beams) -> Beams:
        """The beams that are evaluated."""
        return beams.take(np.flatnonzero([self.knows(node) for node in beams.node.tolist()]))

    def wanted(self, missing: Beams, plan: Plan) -> Int64:
        """The nodes of one target pass: the missing ones, what is planned below, nothing that is known already."""
        self.plan = plan
        self.pass_levels.append(int(self.trie.depth(missing.node[:1])[0]))
        planned = [node for node in plan.node.tolist() if not self.knows(node)]
        self.recovered.update(node for node in missing.node.tolist() if node != ROOT)
        self.drafted.update(node for node in planned if node not in self.recovered)
        self._asked = np.unique(np.concatenate([missing.node, np.asarray(planned, dtype=np.int64)]))
        return self._asked

    def add(self, evaluation: Evaluation) -> None:
        """Take a target pass's result. What was known stays as it was, so that a request sees one value per node."""
        self.passes += 1
        if len(evaluation.node) > len(self._asked):
            unasked = evaluation.node[~among(self._asked, evaluation.node)].astype(np.int64)
            # A pass also holds ancestors that are certain, and on a second stream those that were evaluated on the first.
            self.foreseen.update(set(unasked[~self.certain(unasked)].tolist()) - self.evaluated.keys())
        for node, children in evaluation.items():
            self.evaluated.setdefault(node, children)

    def use(self, beams: Beams) -> Beams:
        """Note that the search goes on through these beams, those of them that are evaluated; these."""
        self.levels.append(beams)
        known = self.known(beams)
        self.used.update(known.node.tolist())
        self.spared += len(beams) - len(known)
        return known

    def substitute(self, slack: float) -> None:
        """Note that a node stands in for one that is better by `slack`."""
        self.substitutions += 1
        self.largest_slack = max(self.largest_slack, slack)

    def counts(self) -> NodeCounts:
        """What became of the nodes so far."""
        forced = sum(self.is_forced(node) for node in self.used)
        return NodeCounts(
            drafted=len(self.drafted),
            used=len(self.used & self.drafted),
            recovered=len(self.recovered),
            forced=forced,
            foreseen=len(self.foreseen),
            prefetched_used=len(self.used & self.foreseen),
        )

    def is_forced(self, node: int) -> bool:
        """Whether a node is the only continuation of its parent in the catalogue."""
        return node != ROOT and self.trie.child_count[self.trie.parent[node]] == 1

    def was_recovered(self, leaf: int) -> bool:
        """Whether a prefix of a leaf needed a pass that no plan had foreseen."""
        node = int(self.trie.parent[leaf])
        while node != ROOT:
            if node in self.recovered:
                return True
            node = int(self.trie.parent[node])
        return False
