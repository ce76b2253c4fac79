"""Verification policies: how the next beams are chosen from what the target has evaluated (method, section 5).

Strict            the best of all children: the target's own beam search
Tolerance         strict, but a planned node may stand in for one that is at most `tolerance` better
ExactSampling     stochastic beam search: strict on perturbed scores
RelaxedSampling   AtSpeed-R's accept/reject rule on the draft's samples
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from atspeed.engine.search.beams import (
    Beams,
    Float64,
    children_by_gumbel,
    children_by_score,
    level_log_distribution,
    sample_without_replacement,
)
from atspeed.engine.search.plan import Proposal
from atspeed.engine.search.sampling import Stream, uniform
from atspeed.engine.search.scoring import Perturbation
from atspeed.engine.search.trie import Int64, Trie
from orchestrator.search.memo import Memo


class Policy(Protocol):
    """What the loop asks of a policy.

    proposal: how the draft is to choose. noise: seed and temperature of the sampling policies.
    max_children: children per node that the target has to return, 0 for all.
    perturbed: whether the target's choice of children follows the noise.
    beam_width: of the plain beam search that the policy comes to where nothing is drafted; 0 where it is none.
    """

    @property
    def proposal(self) -> Proposal: ...  # noqa: D102
    @property
    def noise(self) -> Perturbation | None: ...  # noqa: D102
    @property
    def max_children(self) -> int: ...  # noqa: D102
    @property
    def perturbed(self) -> bool: ...  # noqa: D102
    @property
    def beam_width(self) -> int: ...  # noqa: D102

    def missing(self, beams: Beams, memo: Memo) -> Int64:
        """Rows of the beams that have to be evaluated before the next level can be chosen."""

    def to_plan(self, beams: Beams, missing: Int64) -> Beams:
        """The beams below which a plan is wanted when the rows `missing` of `beams` have to be evaluated."""

    def select(self, beams: Beams, memo: Memo) -> Beams:
        """The next level's beams, at most the width; every one of `beams` is known to the memo."""

    def final(self, beams: Beams) -> Beams:
        """The leaves in the order of the list."""


@dataclass(frozen=True)
class Strict:
    """The best `width` of all valid children of the beams: exactly the target's beam search."""

    width: int

    proposal = Proposal.TOP
    noise = None
    perturbed = False

    @property
    def max_children(self) -> int:
        """No node can have more than `width` of its children among the best `width`."""
        return self.width

    @property
    def beam_width(self) -> int:
        """The width."""
        return self.width

    def missing(self, beams: Beams, memo: Memo) -> Int64:
        """Those whose children could be among the best."""
        return _undecided(beams, memo, self.width, lambda known: children_by_score(known, memo.evaluated))

    def to_plan(self, beams: Beams, missing: Int64) -> Beams:
        """Below the missing ones only: what hangs below the others was planned before."""
        return beams.take(missing)

    def select(self, beams: Beams, memo: Memo) -> Beams:
        """The best by score."""
        return children_by_score(beams, memo.evaluated).best(self.width)

    def final(self, beams: Beams) -> Beams:
        """By score, as they are."""
        return beams


@dataclass(frozen=True)
class Tolerance(Strict):
    """Strict with slack: a node that no plan foresaw is replaced by a foreseen one whose score is lower by at most `tolerance`.

    The memo keeps the largest gap used: 0 as long as the list is the strict one.
    """

    tolerance: float = 0.0

    @property
    def max_children(self) -> int:
        """Stand-ins are looked for among the runners-up too."""
        return 2 * self.width

    @property
    def beam_width(self) -> int:
        """None: what needs no pass may stand in for a beam that does."""
        return 0

    def select(self, beams: Beams, memo: Memo) -> Beams:
        """The strict choice, its unforeseen nodes exchanged for the best foreseen runners-up within the tolerance."""
        if self.tolerance == 0:
            return super().select(beams, memo)
        ranked = children_by_score(beams, memo.evaluated).best(2 * self.width)
        rows = list(range(min(self.width, len(ranked))))
        if memo.trie.depth(ranked.node[:1]).tolist() == [memo.trie.levels]:
            return ranked.take(np.asarray(rows))  # leaves are never evaluated, so none is missing
        spare = [row for row in range(len(rows), len(ranked)) if memo.knows(int(ranked.node[row]))]
        # The lowest missing one has the smallest gap to any stand-in: begin there, and most misses are mended.
        for row in [row for row in reversed(rows) if not memo.knows(int(ranked.node[row]))]:
            if not spare or (slack := float(ranked.score[row] - ranked.score[spare[0]])) > self.tolerance:
                break
            memo.substitute(slack)
            rows[row] = spare.pop(0)
        return ranked.take(np.asarray(rows, dtype=np.int64)).best(self.width)


@dataclass(frozen=True)
class ExactSampling:
    """An exact sample without replacement (arXiv 1903.06059): the strict rule on Gumbel-perturbed scores."""

    width: int
    noise: Perturbation

    proposal = Proposal.PERTURBED
    perturbed = True

    @property
    def max_children(self) -> int:
        """As in the strict rule: siblings are ordered by the noise alone, whatever their parent's score."""
        return self.width

    @property
    def beam_width(self) -> int:
        """The width."""
        return self.width

    def missing(self, beams: Beams, memo: Memo) -> Int64:
        """Those whose children could be among the best: a child's perturbed score never exceeds its parent's."""
        return _undecided(
            beams, memo, self.width, lambda known: children_by_gumbel(memo.trie, known, memo.evaluated, self.noise)
        )

    def to_plan(self, beams: Beams, missing: Int64) -> Beams:
        """Below the missing ones only."""
        return beams.take(missing)

    def select(self, beams: Beams, memo: Memo) -> Beams:
        """The best by perturbed score."""
        return children_by_gumbel(memo.trie, beams, memo.evaluated, self.noise).best(self.width)

    def final(self, beams: Beams) -> Beams:
        """In the order of the draw, so that every beginning of the list is itself an exact sample."""
        return beams


@dataclass(frozen=True)
class RelaxedSampling:
    """AtSpeed-R's rule (arXiv 2410.05165): a sample y of the draft stays with probability min(1, p(y) / q(y)).

    Where more than `width` stay, the first drawn go on. The paper keeps a random `width` of them, which is no sample of p even
    where q = p, since the draft's N samples hold far more of the improbable ones than K would; the first K drawn then are
    one. Where fewer stay, the rest is drawn from the residual norm(max(p - q, 0)). Accepting candidates one by one does not
    preserve the target's distribution of sets: the rule is lossy, and replies say so.
    """

    width: int
    noise: Perturbation

    proposal = Proposal.SAMPLE
    perturbed = False
    max_children = 0
    beam_width = 0

    def missing(self, beams: Beams, memo: Memo) -> Int64:
        """All that are not evaluated: p is one distribution over the whole level."""
        return memo.missing(beams)

    def to_plan(self, beams: Beams, missing: Int64) -> Beams:  # noqa: ARG002
        """Below all beams: q is one distribution over the whole level."""
        return beams

    def select(self, beams: Beams, memo: Memo) -> Beams:
        """One level of accept, reject and draw from the residual. The last level, and one without a plan, draws from p."""
        trie, temperature = memo.trie, self.noise.temperature
        candidates = children_by_score(beams, memo.evaluated)
        log_p = level_log_distribution(candidates, temperature)
        proposed, log_q = memo.plan.proposals(trie, candidates.node, temperature)
        if not len(proposed):
            return candidates.take(self._draw(trie, candidates, log_p, self.width))
        log_ratio = log_p[proposed] - log_q[proposed]
        accepted = proposed[np.log(self._uniform(trie, candidates.node[proposed], Stream.ACCEPT)) <= log_ratio]
        if len(accepted) >= self.width:
            # The noise is that of the draft's own draw, so this is its order.
            first = self._draw(trie, candidates.take(accepted), log_q[accepted], self.width, Stream.PROPOSAL)
            return candidates.take(accepted[first])
        return candidates.take(self._fill(trie, candidates, log_p, log_q, accepted))

    def final(self, beams: Beams) -> Beams:
        """By the target's score."""
        return beams.by_score()

    def _fill(self, trie: Trie, candidates: Beams, log_p: Float64, log_q: Float64, accepted: Int64) -> Int64:
        """The accepted rows and, for the free places, draws from the residual, or from p where it is exhausted."""
        with np.errstate(divide="ignore"):  # log 0: not in the residual
            residual = np.log(np.maximum(np.exp(log_p) - np.exp(log_q), 0.0))
        rows = accepted
        for log_weight in (residual, log_p.copy()):
            log_weight[rows] = -np.inf
            rows = np.concatenate([rows, self._draw(trie, candidates, log_weight, self.width - len(rows))])
        return rows

    def _draw(
        self, trie: Trie, candidates: Beams, log_weight: Float64, count: int, stream: Stream = Stream.RESIDUAL
    ) -> Int64:
        seed = self.noise.seed
        return sample_without_replacement(trie, candidates.node, log_weight, count, seed=seed, stream=stream)

    def _uniform(self, trie: Trie, node: Int64, stream: Stream) -> Float64:
        return uniform(self.noise.seed, stream, trie.path_hash(node))


def _undecided(beams: Beams, memo: Memo, width: int, children_of: Callable[[Beams], Beams]) -> Int64:
    """Rows of the beams that are not evaluated and whose children could be among the best `width`, ties included.

    children_of: of evaluated beams. No child is above its parent, so below a beam that `width` of them exceed nothing can be
    chosen.
    """
    missing = memo.missing(beams)
    if not len(missing):  # a level that was foreseen, the usual case: `select` is about to build the same children
        return missing
    return missing[beams.priority[missing] >= children_of(memo.known(beams)).threshold(width)]
