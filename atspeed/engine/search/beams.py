"""Beams, and the steps from one level to the next. The draft grows its plan with them and the orchestrator selects with them.

Order, everywhere: what is ordered by descending, then code path ascending; within a level, that is node id ascending.
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

# What is known of nodes: of any, or of just the beams that are asked about, in their order.
Evaluated = Mapping[int, Children] | Evaluation


@dataclass(frozen=True)
class Beams:
    """Trie nodes of one depth, in the order of their priority. All arrays [b].

    score:    cumulative log-probability under the scoring rule.
    weight:   cumulative log-probability under the sampling law, phi of stochastic beam search; the score elsewhere.
    priority: what the order follows: the score, or a perturbed one.
    """

    node: Int64
    score: Float64
    weight: Float64
    priority: Float64

    @classmethod
    def root(cls) -> Beams:
        """The start of a search: the root, certain, with its perturbed score fixed at 0 (arXiv 1903.06059, algorithm 1)."""
        zero = np.zeros(1)
        return cls(np.array([ROOT], dtype=np.int64), zero, zero, zero)

    @classmethod
    def joined(cls, parts: Sequence[Beams]) -> Beams:
        """Several groups of beams as one, in the order given."""
        return cls(
            np.concatenate([part.node for part in parts]),
            np.concatenate([part.score for part in parts]),
            np.concatenate([part.weight for part in parts]),
            np.concatenate([part.priority for part in parts]),
        )

    def __len__(self) -> int:
        """Number of beams."""
        return len(self.node)

    def take(self, rows: npt.NDArray[np.integer] | slice) -> Beams:
        """These rows, in this order."""
        return Beams(self.node[rows], self.score[rows], self.weight[rows], self.priority[rows])

    def best(self, width: int) -> Beams:
        """The `width` of the highest priority, in the declared order."""
        return self.take(np.lexsort((self.node, -self.priority))[:width])

    def best_among(self, rows: Int64, width: int) -> Int64:
        """Those of some rows that `best` would take of them, in any order. Only what decides a tie is sorted."""
        if len(rows) <= width:
            return rows
        priority, rest = self.priority[rows], len(rows) - width
        least = np.partition(priority, rest)[rest] if width else np.inf
        better, ties = rows[priority > least], rows[priority == least]
        if len(better) + len(ties) > width:
            ties = ties[np.argsort(self.node[ties])[: width - len(better)]]
        return np.concatenate([better, ties])

    def threshold(self, width: int) -> float:
        """The lowest priority among the best `width`; -inf where there are fewer, and none has to be left out."""
        if len(self) < width:
            return -np.inf
        return float(np.partition(self.priority, len(self) - width)[len(self) - width])

    def by_node(self) -> Beams:
        """The same beams in ascending order of their ids."""
        return self.take(np.argsort(self.node))

    def by_score(self) -> Beams:
        """The same beams in order of their scores."""
        return self.take(np.lexsort((self.node, -self.score)))


@dataclass(frozen=True)
class _Known:
    """The children of some beams [b]. count: int64 [b]; node: int64 [m]; logp: float32 [m]; log_mass: float64 [b]."""

    count: Int64
    node: Int64
    logp: npt.NDArray[np.floating]
    log_mass: Float64

    @classmethod
    def of(cls, beams: Beams, evaluated: Evaluated) -> _Known:
        """What is known of them, in their order."""
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
    """All known children of the beams [m], each with its cumulative log-probability as priority."""
    known = _Known.of(beams, evaluated)
    score = np.repeat(beams.score, known.count) + known.logp
    return Beams(known.node, score, score, score)


def children_by_gumbel(trie: Trie, beams: Beams, evaluated: Evaluated, noise: Perturbation) -> Beams:
    """All known children of the beams [m], with perturbed scores as priority: stochastic beam search, arXiv 1903.06059.

    The step's law is p at the temperature, over the live children. The perturbed scores of a node's children are
    conditioned on their maximum being the node's own (section 4.1 and appendix B.3, the numerically stable form), so the
    best-priority nodes of every level are a sample without replacement, the same whoever computes them.
    """
    known = _Known.of(beams, evaluated)
    row, node, logp = np.repeat(np.arange(len(beams)), known.count), known.node, known.logp.astype(np.float64)
    weight = beams.weight[row] + logp / noise.temperature - known.log_mass[row]
    unconditioned = weight + gumbel(noise.seed, Stream.GUMBEL, trie.path_hash(node))
    peak = np.full(len(beams), -np.inf)
    np.maximum.at(peak, row, unconditioned)
    with np.errstate(divide="ignore"):  # the best child's log1p(-1) = -inf, which makes it inherit its parent's score
        above = beams.priority[row] - unconditioned + np.log1p(-np.exp(unconditioned - peak[row]))
    priority = beams.priority[row] - np.maximum(0.0, above) - np.log1p(np.exp(-np.abs(above)))
    return Beams(node, beams.score[row] + logp, weight, priority)


def level_log_distribution(beams: Beams, temperature: float) -> Float64:
    """Log-softmax of the scores of one level's candidates at a temperature: [m], the logs of AtSpeed-R's p and q.

    Logs, because at a low temperature all but the best underflow to 0, and those could then never be drawn.
    """
    if not len(beams):
        return np.empty(0)
    logits = (beams.score - beams.score.max()) / temperature
    return np.asarray(logits - np.log(np.exp(logits).sum()))


def sample_without_replacement(
    trie: Trie, node: Int64, log_weight: Float64, count: int, *, seed: int, stream: Stream
) -> Int64:
    """Rows of up to `count` nodes drawn without replacement by exp(log_weight) [m] (Gumbel top-k); -inf is never drawn."""
    possible = np.flatnonzero(log_weight > -np.inf)
    noisy = log_weight[possible] + gumbel(seed, stream, trie.path_hash(node[possible]))
    return possible[np.argsort(-noisy, kind="stable")[:count]]
