"""Verification policies: rules that choose the next beams from evaluated nodes.

Strict            the best of all children: the target's own beam search (method, section 5)
Tolerance         strict, but a proposed node may replace one that is better by at most `tolerance`
ExactSampling     stochastic beam search: strict on perturbed scores
RelaxedSampling   AtSpeed-R's accept and reject rule on the draft's samples
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import ClassVar, Protocol

import numpy as np

from atspeed.engine.arrays import Float64, Int64
from atspeed.engine.search.beam_widths import BeamWidths
from atspeed.engine.search.beams import Beams, children_by_score, level_log_distribution, sample_without_replacement
from atspeed.engine.search.mode import Mode
from atspeed.engine.search.plan import Proposal
from atspeed.engine.search.sampling import Stream, uniform
from atspeed.engine.search.scoring import Perturbation
from atspeed.engine.search.search_rules import TopChildren
from atspeed.engine.search.trie import Trie
from orchestrator.search.memo import Memo


class Policy(Protocol):
    """Decisions that the loop leaves to a verification policy.

    Attributes:
        proposal: how the draft chooses the nodes of a plan.
        noise: seed and temperature of a sampling policy, else None.
        perturbed: whether the target's choice of children follows the noise.
        max_children: number of children per node that the target returns; None for all.
        beam_widths: beam widths of the plain beam search that the policy equals without a draft; None if it equals none.
    """

    @property
    def proposal(self) -> Proposal: ...  # noqa: D102
    @property
    def noise(self) -> Perturbation | None: ...  # noqa: D102
    @property
    def perturbed(self) -> bool: ...  # noqa: D102
    @property
    def max_children(self) -> int | None: ...  # noqa: D102
    @property
    def beam_widths(self) -> BeamWidths | None: ...  # noqa: D102

    def missing(self, beams: Beams, memo: Memo) -> Int64:
        """Return the rows of the beams that must be evaluated before the next level can be chosen."""

    def to_plan(self, beams: Beams, missing: Int64) -> Beams:
        """Return the beams below which the draft proposes nodes when the rows `missing` must be evaluated."""

    def select(self, beams: Beams, memo: Memo) -> Beams:
        """Return the beams of the next level, at most its width. The memo knows all of `beams`."""

    def final(self, beams: Beams) -> Beams:
        """Return the leaves in the order of the list."""


@dataclass(frozen=True)
class Strict:
    """The best of all valid children of the beams, as many as the width: exactly the target's beam search."""

    widths: BeamWidths
    noise: Perturbation | None = field(default=None, init=False)

    proposal: ClassVar[Proposal] = Proposal.TOP
    perturbed: ClassVar[bool] = False

    @property
    def max_children(self) -> int | None:
        """Return the largest width: a level of n beams holds at most n children of a node."""
        return self.widths.largest

    @property
    def beam_widths(self) -> BeamWidths | None:
        """Return the widths."""
        return self.widths

    def missing(self, beams: Beams, memo: Memo) -> Int64:
        """Return the rows whose children could be among the best."""
        return TopChildren(self.widths, self.noise).missing(beams, memo)

    def to_plan(self, beams: Beams, missing: Int64) -> Beams:
        """Return the missing beams only: a plan below the others was made before."""
        return beams.take(missing)

    def select(self, beams: Beams, memo: Memo) -> Beams:
        """Return the best children."""
        return TopChildren(self.widths, self.noise).select(beams, memo)

    def final(self, beams: Beams) -> Beams:
        """Return the leaves in the order of their selection."""
        return beams


@dataclass(frozen=True)
class Tolerance(Strict):
    """Strict with slack: an evaluated node may replace a missing one whose score is higher by at most `tolerance`.

    The memo keeps the largest gap used: 0 while the list is the strict one.
    """

    tolerance: float = 0.0

    @property
    def max_children(self) -> int | None:
        """Return twice the largest width: the runners-up are the substitutes."""
        return 2 * self.widths.largest

    @property
    def beam_widths(self) -> BeamWidths | None:
        """Return None: an evaluated node may replace a beam, so the policy equals no plain beam search."""
        return None

    def select(self, beams: Beams, memo: Memo) -> Beams:
        """Return the strict choice, with missing nodes replaced by the best evaluated runners-up within the tolerance."""
        if self.tolerance == 0:
            return super().select(beams, memo)
        width = self.widths.below(memo.trie, beams.node)
        ranked = TopChildren(BeamWidths.of(2 * width)).select(beams, memo)
        rows = list(range(min(width, len(ranked))))
        if memo.trie.depth(ranked.node[:1]).tolist() == [memo.trie.levels]:
            return ranked.take(np.asarray(rows))  # leaves are never evaluated, so none is missing
        spare = [row for row in range(len(rows), len(ranked)) if memo.knows(int(ranked.node[row]))]
        # The lowest missing node has the smallest gap to any substitute, so most misses are removed from that end.
        for row in [row for row in reversed(rows) if not memo.knows(int(ranked.node[row]))]:
            if not spare or (slack := float(ranked.score[row] - ranked.score[spare[0]])) > self.tolerance:
                break
            memo.substitute(slack)
            rows[row] = spare.pop(0)
        return ranked.take(np.asarray(rows, dtype=np.int64)).best(width)


@dataclass(frozen=True)
class ExactSampling(Strict):
    """An exact sample without replacement (arXiv 1903.06059): the strict rule on Gumbel-perturbed scores.

    A child's perturbed score never exceeds its parent's, and siblings are ordered by the noise alone. So all that holds for
    strict holds here. The order of the list is the order of the draw: every prefix of the list is itself an exact sample.
    """

    noise: Perturbation = field()

    proposal = Proposal.PERTURBED
    perturbed = True


@dataclass(frozen=True)
class RelaxedSampling:
    """AtSpeed-R's rule (arXiv 2410.05165): a sample y of the draft stays with probability min(1, p(y) / q(y)).

    If more than K samples stay, the first K drawn are kept. The paper keeps a random K of them. That is no
    sample of p even if q = p, because the draft's N samples hold more improbable nodes than K samples would; the first K
    drawn are a sample. If fewer stay, the rest is drawn from the residual norm(max(p - q, 0)). Accepting candidates one by
    one does not preserve the target's distribution of sets: the rule is lossy, and replies state it.
    """

    widths: BeamWidths
    noise: Perturbation

    proposal = Proposal.SAMPLE
    perturbed = False
    max_children = None
    beam_widths = None

    def missing(self, beams: Beams, memo: Memo) -> Int64:
        """Return all rows that are not evaluated: p is one distribution over the whole level."""
        return memo.missing(beams)

    def to_plan(self, beams: Beams, missing: Int64) -> Beams:  # noqa: ARG002
        """Return all beams: q is one distribution over the whole level."""
        return beams

    def select(self, beams: Beams, memo: Memo) -> Beams:
        """Accept, reject and draw from the residual on one level. The last level, and one without a plan, draws from p."""
        trie, temperature = memo.trie, self.noise.temperature
        width = self.widths.below(trie, beams.node)
        candidates = children_by_score(beams, memo.evaluated)
        log_p = level_log_distribution(candidates, temperature)
        proposed, log_q = memo.plan.proposals(trie, candidates.node, temperature)
        if not len(proposed):
            return candidates.take(self._draw(trie, candidates, log_p, width))
        log_ratio = log_p[proposed] - log_q[proposed]
        accepted = proposed[np.log(self._uniform(trie, candidates.node[proposed], Stream.ACCEPT)) <= log_ratio]
        if len(accepted) >= width:
            # The noise is that of the draft's draw, so this is the order of the draw.
            first = self._draw(trie, candidates.take(accepted), log_q[accepted], width, Stream.PROPOSAL)
            return candidates.take(accepted[first])
        return candidates.take(self._fill(trie, candidates, log_p, log_q, accepted, width))

    def final(self, beams: Beams) -> Beams:
        """Return the leaves in the order of the target's score."""
        return beams.by_score()

    def _fill(
        self, trie: Trie, candidates: Beams, log_p: Float64, log_q: Float64, accepted: Int64, width: int
    ) -> Int64:
        """Return the accepted rows and draws from the residual; from p when the residual is exhausted."""
        with np.errstate(divide="ignore"):  # log 0: not in the residual
            residual = np.log(np.maximum(np.exp(log_p) - np.exp(log_q), 0.0))
        rows = accepted
        for log_weight in (residual, log_p.copy()):
            log_weight[rows] = -np.inf
            rows = np.concatenate([rows, self._draw(trie, candidates, log_weight, width - len(rows))])
        return rows

    def _draw(
        self, trie: Trie, candidates: Beams, log_weight: Float64, count: int, stream: Stream = Stream.RESIDUAL
    ) -> Int64:
        seed = self.noise.seed
        return sample_without_replacement(trie, candidates.node, log_weight, count, seed=seed, stream=stream)

    def _uniform(self, trie: Trie, node: Int64, stream: Stream) -> Float64:
        return uniform(self.noise.seed, stream, trie.path_hash(node))


def _sampling(policy: Callable[[BeamWidths, Perturbation], Policy]) -> PolicyBuilder:
    def build(widths: BeamWidths, tolerance: float, noise: Perturbation | None) -> Policy:  # noqa: ARG001
        if noise is None:
            raise ValueError("noise: a sampling policy needs a seed and a temperature")
        return policy(widths, noise)

    return build


# Builds the policy of a mode from beam widths, tolerance and noise. The modes' properties are in `atspeed/engine/search/mode.py`.
PolicyBuilder = Callable[[BeamWidths, float, Perturbation | None], Policy]
POLICIES: dict[Mode, PolicyBuilder] = {
    Mode.TARGET_ONLY: lambda widths, _tolerance, _noise: Strict(widths),
    Mode.STRICT: lambda widths, _tolerance, _noise: Strict(widths),
    Mode.TOLERANCE: lambda widths, tolerance, _noise: Tolerance(widths, tolerance),
    Mode.EXACT_SAMPLING: _sampling(ExactSampling),
    Mode.RELAXED_SAMPLING: _sampling(RelaxedSampling),
}
