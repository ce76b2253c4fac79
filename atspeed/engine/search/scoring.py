"""From a model's code logits to the best children of trie nodes: scoring rules, perturbation, the declared order."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from enum import StrEnum

import numpy as np
import numpy.typing as npt

from atspeed.engine.arrays import Float32, Float64, Int64
from atspeed.engine.errors import NoNumbersError
from atspeed.engine.search.sampling import Stream, gumbel
from atspeed.engine.search.trie import Pruning, Trie


class ScoringRule(StrEnum):
    """How a code's log-probability is normalised. A bundle declares one and every reply names it."""

    VOCAB = "vocab"  # over the whole vocabulary; invalid children removed, no renormalisation (Hugging Face, AtSpeed)
    TRIE = "trie"  # over the children in the catalogue only; a single child scores exactly 0


@dataclass(frozen=True)
class Perturbation:
    """Gumbel noise on every child's log-probability at a temperature (stochastic beam search, arXiv 1903.06059)."""

    seed: int
    temperature: float


@dataclass(frozen=True)
class Children:
    """The best live children of one node.

    node: int64 [m], best first. logp: float32 [m], under the scoring rule, never perturbed.
    log_mass: the log-sum of exp(logp / temperature) over *all* live children, returned or not; temperature 1 unless perturbed.
    """

    node: Int64
    logp: Float32
    log_mass: float


@dataclass(frozen=True)
class Evaluation:
    """The best live children of several nodes, as flat arrays.

    node: int32 [n], ascending. child_start: int64 [n + 1]. child: int32 [m]; logp: float32 [m]; log_mass: float32 [n].
    The children of node[i] are child[child_start[i] : child_start[i + 1]], best first.
    """

    node: npt.NDArray[np.int32]
    child_start: Int64
    child: npt.NDArray[np.int32]
    logp: Float32
    log_mass: Float32

    @classmethod
    def of(cls, children: Mapping[int, Children]) -> Evaluation:
        """The flat form of some nodes' children."""
        nodes = sorted(children)
        counts = [len(children[node].node) for node in nodes]
        flat = [children[node] for node in nodes]
        return cls(
            node=np.asarray(nodes, dtype=np.int32),
            child_start=np.concatenate([[0], np.cumsum(counts)]).astype(np.int64),
            child=np.concatenate([np.empty(0), *(c.node for c in flat)]).astype(np.int32),
            logp=np.concatenate([np.empty(0), *(c.logp for c in flat)]).astype(np.float32),
            log_mass=np.asarray([c.log_mass for c in flat], dtype=np.float32),
        )

    def items(self) -> Iterator[tuple[int, Children]]:
        """Each node with its children."""
        child, start = self.child.astype(np.int64), self.child_start.tolist()
        for row, (node, log_mass) in enumerate(zip(self.node.tolist(), self.log_mass.tolist(), strict=True)):
            span = slice(start[row], start[row + 1])
            yield node, Children(child[span], self.logp[span], log_mass)

    def last(self, count: int) -> Evaluation:
        """Of the last so many nodes alone."""
        if count == len(self.node):
            return self
        first = len(self.node) - count
        child = int(self.child_start[first])
        starts = self.child_start[first:] - child
        return Evaluation(self.node[first:], starts, self.child[child:], self.logp[child:], self.log_mass[first:])

    def validate(self, trie: Trie) -> None:
        """Raise ValueError unless this could have come from an honest model over `trie`. Cheap enough for every reply."""
        n, m = len(self.node), len(self.child)
        if len(self.child_start) != n + 1 or len(self.log_mass) != n or len(self.logp) != m:
            raise ValueError("evaluation: array lengths do not agree")
        if n and not (self.node[0] >= 0 and self.node[-1] < trie.nodes and (self.node[1:] > self.node[:-1]).all()):
            raise ValueError("evaluation.node: not ascending trie nodes")
        counts = self.child_start[1:] - self.child_start[:-1]
        if self.child_start[0] != 0 or self.child_start[-1] != m or (counts < 0).any():
            raise ValueError("evaluation.child_start: not a partition of the children")
        if m:
            self._validate_children(trie, counts)
        if not (np.isfinite(self.log_mass) | (np.isneginf(self.log_mass) & (counts == 0))).all():
            raise ValueError("evaluation.log_mass: neither finite nor that of a node without a live child")

    def _validate_children(self, trie: Trie, counts: Int64) -> None:
        """There are some."""
        ascending = np.sort(self.child)
        if not (ascending[0] > 0 and ascending[-1] < trie.nodes):
            raise ValueError("evaluation.child: not a trie node")
        if (trie.parent[self.child] != self.node.repeat(counts)).any():
            raise ValueError("evaluation.child: not a child of its node")
        if (ascending[1:] == ascending[:-1]).any():
            raise ValueError("evaluation.child: a child occurs twice")
        if not (self.logp.min() > -np.inf and self.logp.max() <= 1e-3):  # what is no number fails both
            raise ValueError("evaluation.logp: not log-probabilities")


def best_children(
    trie: Trie,
    nodes: Int64,
    logits: Float32,
    log_normalizer: Float32,
    *,
    rule: ScoringRule,
    pruning: Pruning,
    limit: int,
    perturbation: Perturbation | None = None,
) -> Evaluation:
    """The best `limit` live children of each of `nodes` [n] (ascending, inner nodes), from the model's output for them.

    logits: float32 [n, C]; log_normalizer: float32 [n], the log-sum-exp over the whole vocabulary.
    Best = highest log-probability, or highest perturbed one; ties go to the lower code. Pruning never changes a score.
    Raises NoNumbersError when a child's score, pruned or not, is NaN, or that of a live one infinite.
    """
    row, child = trie.children_of(nodes)
    first_column = trie.codebook_offset[trie.depth(nodes)] + np.arange(0, logits.size, logits.shape[1])
    value = logits.take(first_column[row] + trie.code[child]).astype(np.float64)
    with np.errstate(invalid="ignore"):  # infinities, which become NaN
        if rule is ScoringRule.VOCAB:
            logp = value - log_normalizer[row]
        else:
            logp = value - _segment_logsumexp(value, trie.child_count[nodes])[row]
    # Of all children: what is no number in one row of a pass may be so in what the cache would keep of the others.
    if np.isnan(logp).any():
        raise NoNumbersError(f"evaluation: of {len(nodes)} nodes, some have scores that are no numbers")
    if rule is ScoringRule.TRIE:
        logp[trie.child_count[nodes][row] == 1] = 0.0
    # Rounding may leave a near-certain code a hair above 0; a log-probability is never positive.
    rounded: Float32 = np.minimum(logp, 0.0).astype(np.float32)

    if not pruning.is_none:
        live = pruning.live(child)
        row, child, rounded = row[live], child[live], rounded[live]
    if len(rounded) and rounded.min() == -np.inf:
        raise NoNumbersError(f"evaluation: of {len(nodes)} nodes, some have children of probability 0")
    counts = np.bincount(row, minlength=len(nodes))
    order_by = rounded.astype(np.float64) / (perturbation.temperature if perturbation else 1.0)
    log_mass = _segment_logsumexp(order_by, counts)
    if perturbation:
        order_by = order_by + gumbel(perturbation.seed, Stream.GUMBEL, trie.path_hash(child))
    kept = _first_of_rows(order_by, counts, limit)
    child_start = np.concatenate([[0], np.cumsum(np.minimum(counts, limit))]).astype(np.int64)
    with np.errstate(over="ignore"):  # at a temperature next to 0 it is beyond float32
        mass = log_mass.astype(np.float32)
    return Evaluation(
        node=nodes.astype(np.int32),
        child_start=child_start,
        child=child[kept].astype(np.int32),
        logp=rounded[kept],
        log_mass=mass,
    )


def _first_of_rows(values: Float64, counts: npt.NDArray[np.integer], limit: int) -> Int64:
    """Places of the `limit` highest values of each row, highest first, ties in order. values: [m], rows of lengths `counts` [n].

    What is below a long row's own threshold is dropped before anything is sorted: a level of 256 codes has far more children
    than anybody wants. To find it the rows are padded to the longest, which is no more than the logits that they come from.
    """
    longest, candidates = int(counts.max(initial=0)), np.arange(len(values))
    if longest > limit:
        padded = np.full((len(counts), longest), -np.inf)
        padded[np.arange(longest) < counts[:, None]] = values
        least = np.partition(padded, longest - limit, axis=1)[:, longest - limit]
        candidates = np.flatnonzero(values >= np.repeat(least, counts))
    # Of a small type, as numpy sorts 8 and 16 bits by radix.
    row = np.repeat(np.arange(len(counts), dtype=np.min_scalar_type(len(counts))), counts)[candidates]
    by_value = np.argsort(-values[candidates], kind="stable")
    by_row = by_value[np.argsort(row[by_value], kind="stable")]
    found = np.bincount(row, minlength=len(counts))
    rank = np.arange(len(by_row)) - np.repeat(np.cumsum(found) - found, found)
    return candidates[by_row[rank < limit]]


def _segment_logsumexp(values: Float64, counts: npt.NDArray[np.integer]) -> Float64:
    """Log-sum-exp of consecutive segments of `values` [m] with lengths `counts` [n]; -inf for an empty one."""
    result = np.full(len(counts), -np.inf)
    filled = counts > 0
    if not filled.any():
        return result
    starts = (np.cumsum(counts) - counts)[filled]
    peak = np.maximum.reduceat(values, starts)
    shifted = np.exp(values - np.repeat(peak, counts[filled]))
    result[filled] = peak + np.log(np.add.reduceat(shifted, starts))
    return result
