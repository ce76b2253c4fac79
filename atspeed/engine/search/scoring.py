"""Scoring: from code logits to the best children of trie nodes."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from functools import cached_property

import numpy as np
import numpy.typing as npt

from atspeed.engine.arrays import Float32, Float64, Int64
from atspeed.engine.errors import NoNumbersError
from atspeed.engine.search.sampling import Stream, gumbel
from atspeed.engine.search.trie import ENDED, Pruning, Trie


class ScoringRule(StrEnum):
    """The normalisation of a code's log-probability. A bundle declares it and every reply names it."""

    VOCAB = "vocab"  # over the whole vocabulary; invalid children removed, no renormalisation (Hugging Face, AtSpeed)
    TRIE = "trie"  # over the children in the catalogue only; a single child scores exactly 0
    CODES = "codes"  # over the code tokens of all levels, tails included; invalid children removed, no renormalisation


@dataclass(frozen=True)
class Perturbation:
    """Gumbel noise on every child's log-probability at a temperature (stochastic beam search, arXiv 1903.06059).

    Attributes:
        seed: the seed of the noise.
        temperature: the divisor of the log-probabilities, above 0.
    """

    seed: int
    temperature: float


@dataclass(frozen=True)
class Children:
    """The best live children of one node.

    Attributes:
        node: int64 [m], best first.
        logp: log-probability under the scoring rule, never perturbed, float32 [m].
        log_mass: log of the sum of exp(logp / temperature) over *all* live children; temperature 1 unless perturbed.
    """

    node: Int64
    logp: Float32
    log_mass: float

    @classmethod
    def certain(cls, trie: Trie, node: int) -> Children:
        """Return the only child of a node, which scores 0."""
        return cls(trie.children(node), np.zeros(1, dtype=np.float32), 0.0)


@dataclass(frozen=True)
class Evaluation:
    """The best live children of several nodes, as flat arrays.

    Attributes:
        node: int32 [n], ascending.
        child_start: int64 [n + 1]. The children of node[i] are child[child_start[i] : child_start[i + 1]].
        child: int32 [m], best first within a node.
        logp: as in `Children`, float32 [m].
        log_mass: as in `Children`, float32 [n].
    """

    node: npt.NDArray[np.int32]
    child_start: Int64
    child: npt.NDArray[np.int32]
    logp: Float32
    log_mass: Float32

    @classmethod
    def of(cls, children: Mapping[int, Children]) -> Evaluation:
        """Build the flat form of some nodes' children."""
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

    @classmethod
    def joined(cls, parts: Sequence[Evaluation]) -> Evaluation:
        """Join evaluations whose nodes follow each other, one or more."""
        if len(parts) == 1:
            return parts[0]
        ends = np.cumsum([0, *(len(part.child) for part in parts)])
        return cls(
            node=np.concatenate([part.node for part in parts]),
            child_start=np.append(
                np.concatenate([part.child_start[:-1] + end for part, end in zip(parts, ends[:-1], strict=True)]),
                ends[-1],
            ),
            child=np.concatenate([part.child for part in parts]),
            logp=np.concatenate([part.logp for part in parts]),
            log_mass=np.concatenate([part.log_mass for part in parts]),
        )

    def items(self) -> Iterator[tuple[int, Children]]:
        """Iterate over the nodes with their children."""
        return iter(self._by_node.items())

    @cached_property
    def _by_node(self) -> dict[int, Children]:
        """Return the children of each node. Kept, since in one process two searches read the same evaluation."""
        child, logp, start = self.child.astype(np.int64), self.logp, self.child_start.tolist()
        return {
            node: Children(child[first:end], logp[first:end], log_mass)
            for node, first, end, log_mass in zip(
                self.node.tolist(), start[:-1], start[1:], self.log_mass.tolist(), strict=True
            )
        }

    def with_ended(self, trie: Trie, nodes: Int64) -> Evaluation:
        """Return the evaluation of ascending `nodes`, of which this one lacks those above an ended place."""
        ended = nodes[trie.ends[nodes]].tolist()
        if not ended:
            return self
        return Evaluation.of(dict(self.items()) | {node: Children.certain(trie, node) for node in ended})

    def last(self, count: int) -> Evaluation:
        """Return the evaluation of the last `count` nodes."""
        if count == len(self.node):
            return self
        first = len(self.node) - count
        child = int(self.child_start[first])
        starts = self.child_start[first:] - child
        return Evaluation(self.node[first:], starts, self.child[child:], self.logp[child:], self.log_mass[first:])

    def validate(self, trie: Trie) -> None:
        """Raise ValueError unless a correct model over `trie` could have made this. Cheap enough for every reply."""
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
        """Check the children; there is at least one."""
        ascending = np.sort(self.child)
        if not (ascending[0] > 0 and ascending[-1] < trie.nodes):
            raise ValueError("evaluation.child: not a trie node")
        if (trie.parent[self.child] != self.node.repeat(counts)).any():
            raise ValueError("evaluation.child: not a child of its node")
        if (ascending[1:] == ascending[:-1]).any():
            raise ValueError("evaluation.child: a child occurs twice")
        if not (self.logp.min() > -np.inf and self.logp.max() <= 1e-3):  # NaN fails both comparisons
            raise ValueError("evaluation.logp: not log-probabilities")
        if self.logp[trie.code[self.child] == ENDED].any():
            raise ValueError("evaluation.logp: an ended place does not score 0")


def certain(trie: Trie, rule: ScoringRule, nodes: npt.NDArray[np.integer]) -> npt.NDArray[np.bool_]:
    """Return which nodes, [n], never need a pass: those above an ended place, and under rule `trie` those with one child."""
    return np.asarray(trie.child_count[nodes] == 1 if rule is ScoringRule.TRIE else trie.ends[nodes])


def codes_normalizer(logits: Float32, columns: npt.NDArray[np.integer]) -> Float64:
    """Return the log-sum-exp over the distinct code tokens, float64 [n]; for rule `codes`.

    logits: float32 [n, C]. columns: one column of each token.
    """
    # `take` lays out row after row, unlike an index: so a node's sum does not depend on the other nodes of the pass.
    logits = logits.take(columns, axis=1)
    peak = logits.max(axis=1, keepdims=True).astype(np.float64)
    with np.errstate(invalid="ignore"):  # inf - inf is NaN, which `best_children` refuses
        return np.asarray(peak[:, 0] + np.log(np.exp(logits - peak).sum(axis=1)))


def best_children(
    trie: Trie,
    nodes: Int64,
    logits: Float32,
    log_normalizer: Float32 | Float64,
    *,
    rule: ScoringRule,
    pruning: Pruning,
    limit: int,
    perturbation: Perturbation | None = None,
) -> Evaluation:
    """Return the best `limit` live children of each node.

    Best means the highest log-probability, or the highest perturbed one; the lower code wins a tie. Pruning never changes a
    score. Raises NoNumbersError when the score of a child, pruned or not, is NaN, or when that of a live child is infinite.

    Args:
        trie: the catalogue's trie.
        nodes: ascending inner nodes, int64 [n].
        logits: the model's code logits, float32 [n, C].
        log_normalizer: log-sum-exp over the whole vocabulary, or over the code tokens under rule `codes`, floats [n].
        rule: the scoring rule.
        pruning: the nodes that the request removes.
        limit: children per node.
        perturbation: None for the order by log-probability.
    """
    row, child = trie.children_of(nodes)
    logp = _log_probabilities(trie, nodes, row, child, logits, log_normalizer, rule)
    # Rounding may leave a near-certain code slightly above 0; a log-probability is never positive.
    rounded: Float32 = np.minimum(logp, 0.0).astype(np.float32)

    if not pruning.is_none:
        live = pruning.live(child)
        row, child, rounded = row[live], child[live], rounded[live]
    if len(rounded) and rounded.min() == -np.inf:
        raise NoNumbersError(f"evaluation: some of {len(nodes)} nodes have children of probability 0")
    # The key of the order: the log-probability at the temperature, perturbed by the noise of the child's path.
    counts = np.bincount(row, minlength=len(nodes))
    order_by = rounded.astype(np.float64) / (perturbation.temperature if perturbation else 1.0)
    log_mass = _segment_logsumexp(order_by, counts)
    if perturbation:
        order_by = order_by + gumbel(perturbation.seed, Stream.GUMBEL, trie.path_hash(child))
    kept = _first_of_rows(order_by, counts, limit)
    child_start = np.concatenate([[0], np.cumsum(np.minimum(counts, limit))]).astype(np.int64)
    with np.errstate(over="ignore"):  # near temperature 0 the mass exceeds float32
        mass = log_mass.astype(np.float32)
    return Evaluation(
        node=nodes.astype(np.int32),
        child_start=child_start,
        child=child[kept].astype(np.int32),
        logp=rounded[kept],
        log_mass=mass,
    )


def _log_probabilities(
    trie: Trie,
    nodes: Int64,
    row: Int64,
    child: Int64,
    logits: Float32,
    log_normalizer: Float32 | Float64,
    rule: ScoringRule,
) -> Float64:
    """Return the log-probability of every child [m], before rounding. row: its parent's place in `nodes`; see `best_children`."""
    # The logit of each child: row * C + its code column, in the flattened logits. An ended place has none, and is set to 0 below.
    first_column = trie.codebook_offset[trie.depth(nodes)] + np.arange(0, logits.size, logits.shape[1])
    value = logits.take(first_column[row] + trie.code[child]).astype(np.float64)
    with np.errstate(invalid="ignore"):  # inf - inf is NaN, which is refused below
        if rule is ScoringRule.TRIE:
            logp = value - _segment_logsumexp(value, trie.child_count[nodes])[row]
        else:
            logp = value - log_normalizer[row]
    # Checked before pruning: NaN in one row of a pass may also be in the keys and values that the cache would keep.
    if np.isnan(logp).any():
        raise NoNumbersError(f"evaluation: some of {len(nodes)} nodes have scores that are NaN")
    logp[certain(trie, rule, nodes)[row]] = 0.0
    return np.asarray(logp)


def _first_of_rows(values: Float64, counts: npt.NDArray[np.integer], limit: int) -> Int64:
    """Return the places of the `limit` highest values of each row, highest first, ties in order.

    Values below the threshold of their row are dropped before the sort: a level of 256 codes has far more children than a
    search asks for. To find the thresholds, the rows are padded to the longest, which needs no more memory than the logits.

    Args:
        values: [m], row after row.
        counts: lengths of the rows, [n].
        limit: places per row.
    """
    longest, candidates = int(counts.max(initial=0)), np.arange(len(values))
    if longest > limit:
        padded = np.full((len(counts), longest), -np.inf)
        padded[np.arange(longest) < counts[:, None]] = values
        least = np.partition(padded, longest - limit, axis=1)[:, longest - limit]
        candidates = np.flatnonzero(values >= np.repeat(least, counts))
    # A stable sort by value, then by row. Rows have a small type, as numpy sorts 8 and 16 bits by radix.
    row = np.repeat(np.arange(len(counts), dtype=np.min_scalar_type(len(counts))), counts)[candidates]
    by_value = np.argsort(-values[candidates], kind="stable")
    by_row = by_value[np.argsort(row[by_value], kind="stable")]
    # The rank of each value within its row.
    found = np.bincount(row, minlength=len(counts))
    rank = np.arange(len(by_row)) - np.repeat(np.cumsum(found) - found, found)
    return candidates[by_row[rank < limit]]


def _segment_logsumexp(values: Float64, counts: npt.NDArray[np.integer]) -> Float64:
    """Return the log-sum-exp of consecutive segments of `values`, [m], with lengths `counts`, [n]; -inf for an empty one."""
    result = np.full(len(counts), -np.inf)
    filled = counts > 0
    if not filled.any():
        return result
    # Each segment's maximum is subtracted before the exponential.
    starts = (np.cumsum(counts) - counts)[filled]
    peak = np.maximum.reduceat(values, starts)
    shifted = np.exp(values - np.repeat(peak, counts[filled]))
    result[filled] = peak + np.log(np.add.reduceat(shifted, starts))
    return result
