"""The memo: the nodes that the target has evaluated for one request."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from atspeed.engine.arrays import Int64
from atspeed.engine.search.beams import Beams
from atspeed.engine.search.plan import Plan
from atspeed.engine.search.scoring import Evaluation, ScoringRule
from atspeed.engine.search.search_rules import EvaluatedNodes
from atspeed.engine.search.trie import ROOT, Trie, among


@dataclass(frozen=True)
class NodeCounts:
    """Numbers of nodes of one search.

    Attributes:
        drafted: evaluated because a plan held them.
        used: drafted nodes that became beams.
        recovered: beams that no plan held.
        forced: beams that were their parent's only child.
        prefetched: evaluated by the target before the search asked for them.
        prefetched_used: prefetched nodes that became beams.
    """

    drafted: int
    used: int
    recovered: int
    forced: int
    prefetched: int
    prefetched_used: int


class Memo(EvaluatedNodes):
    """The evaluated nodes of one request. A hit is a beam that is here already; a miss costs a target pass.

    Attributes:
        plan: the newest plan; relaxed sampling takes q from it.
        drafted: nodes that were evaluated because a plan held them.
        recovered: beams that no plan held.
        prefetched: nodes that the target evaluated before the search asked for them.
        used: evaluated beams.
        passes: number of target passes.
        pass_levels: the level of the beams that each target pass was made for.
        levels: the beams of every level so far, root first.
        spared: number of beams that were never evaluated, because nothing below them could be chosen.
        substitutions: number of nodes that the tolerance policy replaced.
        largest_slack: the largest score gap of a substitution.
    """

    def __init__(self, trie: Trie, rule: ScoringRule) -> None:
        super().__init__(trie, rule)
        self.plan = Plan.empty(Beams.root())
        self.drafted: set[int] = set()
        self.recovered: set[int] = set()
        self.prefetched: set[int] = set()
        self.used: set[int] = set()
        self.passes = 0
        self.pass_levels: list[int] = []
        self._asked = np.empty(0, dtype=np.int64)
        self.levels: list[Beams] = []
        self.spared = 0
        self.substitutions = 0
        self.largest_slack = 0.0

    def wanted(self, missing: Beams, plan: Plan) -> Int64:
        """Return the nodes of one target pass: the missing beams and the plan, without nodes that are known."""
        self.plan = plan
        self.pass_levels.append(self.trie.depth_of(int(missing.node[0])))
        planned = [node for node in plan.node.tolist() if not self.knows(node)]
        self.recovered.update(node for node in missing.node.tolist() if node != ROOT)
        self.drafted.update(node for node in planned if node not in self.recovered)
        self._asked = np.array(sorted({*missing.node.tolist(), *planned}), dtype=np.int64)
        return self._asked

    def add(self, evaluation: Evaluation) -> None:
        """Add the result of a target pass. Known nodes keep their values, so that a request sees one value per node."""
        self.passes += 1
        if len(evaluation.node) > len(self._asked):
            unasked = evaluation.node[~among(self._asked, evaluation.node)].astype(np.int64)
            # A pass also holds certain ancestors and, on a second stream, nodes that were evaluated on the first one.
            self.prefetched.update(set(unasked[~self.certain(unasked)].tolist()) - self.evaluated.keys())
        for node, children in evaluation.items():
            self.evaluated.setdefault(node, children)

    def use(self, beams: Beams) -> Beams:
        """Record the beams of a level, and return those that are evaluated."""
        self.levels.append(beams)
        known = self.known(beams)
        self.used.update(known.node.tolist())
        self.spared += len(beams) - len(known)
        return known

    def substitute(self, slack: float) -> None:
        """Record that a node replaces one that is better by `slack`."""
        self.substitutions += 1
        self.largest_slack = max(self.largest_slack, slack)

    def counts(self) -> NodeCounts:
        """Return the numbers of nodes so far."""
        forced = sum(self.is_forced(node) for node in self.used)
        return NodeCounts(
            drafted=len(self.drafted),
            used=len(self.used & self.drafted),
            recovered=len(self.recovered),
            forced=forced,
            prefetched=len(self.prefetched),
            prefetched_used=len(self.used & self.prefetched),
        )

    def is_forced(self, node: int) -> bool:
        """Return whether a node is the only child of its parent in the catalogue."""
        return node != ROOT and self.trie.child_count[self.trie.parent[node]] == 1

    def was_recovered(self, leaf: int) -> bool:
        """Return whether a prefix of a leaf was a recovered beam."""
        node = int(self.trie.parent[leaf])
        while node != ROOT:
            if node in self.recovered:
                return True
            node = int(self.trie.parent[node])
        return False
