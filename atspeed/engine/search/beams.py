"""Beams, and the step of beam search from one level to the next.

The draft grows its plan with these functions, and the orchestrator selects beams with them. Their order is: priority
descending, then code path ascending. Within a level, code path ascending is node id ascending.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from atspeed.engine.arrays import Float64, Int64
from atspeed.engine.search.sampling import Stream, gumbel
from atspeed.engine.search.scoring import Children, Evaluation, Perturbation
from atspeed.engine.search.trie import ROOT, Trie

Evaluated = Mapping[int, Children] | Evaluation
"""Evaluated nodes: any nodes by id, or exactly the beams in question, in their order."""


@dataclass(frozen=True)
class Beams:
    """Beams of one level: trie nodes of one depth. All arrays have the shape [b].

    Attributes:
        node: node ids, int64.
        score: cumulative log-probability under the scoring rule, float64.
        weight: cumulative log-probability under the sampling law (phi in stochastic beam search); else the score.
        priority: the key of the order: the score, or a perturbed one.
    """

    node: Int64
    score: Float64
    weight: Float64
    priority: Float64

    @classmethod
    def root(cls) -> Beams:
        """Return the start of a search: the root with score 0 and perturbed score 0 (arXiv 1903.06059, algorithm 1)."""
        zero = np.zeros(1)
        return cls(np.array([ROOT], dtype=np.int64), zero, zero, zero)

    @classmethod
    def joined(cls, parts: Sequence[Beams]) -> Beams:
        """Concatenate groups of beams, in the given order."""
        return cls(
            np.concatenate([part.node for part in parts]),
            np.concatenate([part.score for part in parts]),
            np.concatenate([part.weight for part in parts]),
            np.concatenate([part.priority for part in parts]),
        )

    def __len__(self) -> int:
        """Return the number of beams."""
        return len(self.node)

    def take(self, rows: npt.NDArray[np.integer] | slice) -> Beams:
        """Return the beams of these rows, in this order."""
        return Beams(self.node[rows], self.score[rows], self.weight[rows], self.priority[rows])

    def best(self, width: int) -> Beams:
        """Return the `width` beams of the highest priority, in the declared order."""
        return self.take(np.lexsort((self.node, -self.priority))[:width])

    def best_among(self, rows: Int64, width: int) -> Int64:
        """Return the rows [<= width] that `best` would choose among `rows`, in any order. Sorts only the rows of a tie."""
        if len(rows) <= width:
            return rows
        priority, rest = self.priority[rows], len(rows) - width
        # The priority of the last chosen row: all above it are chosen, the lowest ids among the equal ones fill the rest.
        least = np.partition(priority, rest)[rest] if width else np.inf
        better, ties = rows[priority > least], rows[priority == least]
        if len(better) + len(ties) > width:
            ties = ties[np.argsort(self.node[ties])[: width - len(better)]]
        return np.concatenate([better, ties])

    def threshold(self, width: int) -> float:
        """Return the lowest priority among the best `width`; -inf when there are fewer beams."""
        if len(self) < width:
            return -np.inf
        return float(np.partition(self.priority, len(self) - width)[len(self) - width])

    def by_node(self) -> Beams:
        """Return the beams in ascending order of their ids."""
        return self.take(np.argsort(self.node))

    def by_score(self) -> Beams:
        """Return the beams in order of their scores."""
        return self.take(np.lexsort((self.node, -self.score)))


@dataclass(frozen=True)
class _FlatChildren:
    """The evaluated children of b beams as flat arrays.

    Attributes:
        count: children of each beam, int64 [b].
        node: the children, beam by beam, int64 [m].
        logp: their log-probabilities, float32 [m].
        log_mass: log-sum over all live children of each beam, float64 [b].
    """

    count: Int64
    node: Int64
    logp: npt.NDArray[np.floating]
    log_mass: Float64

    @classmethod
    def of(cls, beams: Beams, evaluated: Evaluated) -> _FlatChildren:
        """Return the children of the beams, in the order of the beams."""
        if isinstance(evaluated, Evaluation):
            count, log_mass = np.diff(evaluated.child_start), evaluated.log_mass.astype(np.float64)
            return cls(count, evaluated.child.astype(np.int64), evaluated.logp, log_mass)
        children = [evaluated[node] for node in beams.node.tolist()]
        return cls(
            np.array([len(c.node) for c in children], dtype=np.int64),
            np.concatenate([c.node for c in children]) if children else np.empty(0, dtype=np.int64),
            np.concatenate([c.logp for c in children]) if children else np.empty(0),
            np.array([c.log_mass for c in children]),
        )


def children_by_score(beams: Beams, evaluated: Evaluated) -> Beams:
    """Return all evaluated children of the beams, [m], with their cumulative log-probability as priority."""
    known = _FlatChildren.of(beams, evaluated)
    score = np.repeat(beams.score, known.count) + known.logp
    return Beams(known.node, score, score, score)


def children_by_gumbel(trie: Trie, beams: Beams, evaluated: Evaluated, noise: Perturbation) -> Beams:
    """Return all evaluated children of the beams, [m], with perturbed scores as priority: stochastic beam search.

    Each step follows p at the temperature, over the live children. The perturbed scores of a node's children are conditioned on
    their maximum, which is the node's own perturbed score (arXiv 1903.06059, section 4.1 and appendix B.3, the numerically
    stable form). So the best nodes of every level are a sample without replacement. Draft and target compute the same one.
    """
    known = _FlatChildren.of(beams, evaluated)
    # phi of each child: the parent's phi plus the child's normalised log-probability at the temperature.
    row, node, logp = np.repeat(np.arange(len(beams)), known.count), known.node, known.logp.astype(np.float64)
    weight = beams.weight[row] + logp / noise.temperature - known.log_mass[row]
    # G of each child, and Z of each parent: the maximum over its children.
    unconditioned = weight + gumbel(noise.seed, Stream.GUMBEL, trie.path_hash(node))
    peak = np.full(len(beams), -np.inf)
    np.maximum.at(peak, row, unconditioned)
    # v = G_parent - G + log(1 - exp(G - Z)); the conditioned score is G_parent - max(0, v) - log(1 + exp(-|v|)).
    with np.errstate(divide="ignore"):  # for the best child v = log1p(-1) = -inf, so it inherits its parent's score
        above = beams.priority[row] - unconditioned + np.log1p(-np.exp(unconditioned - peak[row]))
    priority = beams.priority[row] - np.maximum(0.0, above) - np.log1p(np.exp(-np.abs(above)))
    return Beams(node, beams.score[row] + logp, weight, priority)


def level_log_distribution(beams: Beams, temperature: float) -> Float64:
    """Return the log-softmax of one level's scores at a temperature, [m]: the logs of p and q in AtSpeed-R.

    Logs, because at a low temperature the probabilities of all but the best underflow to 0 and could never be drawn.
    """
    if not len(beams):
        return np.empty(0)
    logits = (beams.score - beams.score.max()) / temperature
    return np.asarray(logits - np.log(np.exp(logits).sum()))


def sample_without_replacement(
    trie: Trie, node: Int64, log_weight: Float64, count: int, *, seed: int, stream: Stream
) -> Int64:
    """Draw rows of up to `count` nodes without replacement by exp(log_weight), [m] (Gumbel top-k). -inf is never drawn."""
    possible = np.flatnonzero(log_weight > -np.inf)
    noisy = log_weight[possible] + gumbel(seed, stream, trie.path_hash(node[possible]))
    return possible[np.argsort(-noisy, kind="stable")[:count]]
