"""Simulated users: log-probabilities of a target and of a draft.

A child's logit is a part that all users share and a part of the user's own. Deeper levels share more, so that target prefetch
works as on real data. The draft has the target's logits and noise. `SHAPE` is chosen so that plans of the recorded sizes need the
recorded numbers of target passes (docs/benchmarks/acceptance.json); the page compares both.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import lru_cache

import numpy as np

from atspeed.engine.arrays import Float64, Int64
from atspeed.engine.bundle.catalogue import Catalogue
from atspeed.engine.search.scoring import Evaluation
from atspeed.engine.search.trie import Trie

_ITEMS, _CODES = 12_035, (256, 256, 256, 256)  # as many as Amazon Beauty


@dataclass(frozen=True)
class Shape:
    """Distribution of logits, by level.

    Attributes:
        spread: standard deviation of a child's logit.
        shared: share of its variance that all users share.
        noise: standard deviation of the draft's noise.
        crowding: exponent of the codes' distribution; 1 is uniform, more puts more items below the first codes.
    """

    spread: tuple[float, ...] = (2.2, 2.2, 2.2, 2.2)
    shared: tuple[float, ...] = (0.5, 0.9, 0.95, 0.98)
    noise: tuple[float, ...] = (0.4, 0.35, 0.3, 0.3)
    crowding: float = 2.0


SHAPE = Shape()


@dataclass(frozen=True)
class Model:
    """Log-probabilities of one model for one user.

    Attributes:
        trie: the catalogue's trie.
        logp: of each node below its parent, float32 [nodes].
    """

    trie: Trie
    logp: np.ndarray
    _evaluated: dict[tuple[bytes, int], Evaluation] = field(default_factory=dict)

    def evaluate(self, nodes: Int64, limit: int) -> Evaluation:
        """Return the best `limit` children of each node. Candidates ask for the same nodes, so answers are kept."""
        key = nodes.tobytes(), limit
        if key not in self._evaluated:
            self._evaluated[key] = self._best_children(nodes, limit)
        return self._evaluated[key]

    def _best_children(self, nodes: Int64, limit: int) -> Evaluation:
        row, child = self.trie.children_of(nodes)
        order = np.lexsort((child, -self.logp[child], row))
        count = np.bincount(row, minlength=len(nodes))
        place = np.arange(len(row)) - np.repeat(np.cumsum(count) - count, count)
        best = child[order[place < limit]].astype(np.int32)
        start = np.concatenate([[0], np.cumsum(np.minimum(count, limit))]).astype(np.int64)
        unused = np.zeros(len(nodes), dtype=np.float32)  # the mass matters to sampling only
        return Evaluation(nodes.astype(np.int32), start, best, self.logp[best], unused)


@dataclass(frozen=True)
class User:
    """User with both models."""

    target: Model
    draft: Model


class Users:
    """Users of one seed. Each is made when it is asked for, and the latest are kept."""

    def __init__(self, seed: int, shape: Shape = SHAPE) -> None:
        self.trie = catalogue(shape.crowding).trie
        self._seed, self._shape = seed, shape
        depth = np.minimum(self.trie.depth(np.arange(self.trie.nodes)) - 1, len(shape.spread) - 1)
        depth[0] = 0
        self._spread, self._noise = np.array(shape.spread)[depth], np.array(shape.noise)[depth]
        share = np.array(shape.shared)[depth]
        self._common = np.sqrt(share) * np.random.default_rng(0).normal(size=self.trie.nodes)
        self._own = np.sqrt(1 - share)
        self.user = lru_cache(maxsize=512)(self._new)

    def _new(self, number: int) -> User:
        rng = np.random.default_rng([self._seed, number])
        own, noise = rng.normal(size=(2, self.trie.nodes))
        logits = self._spread * (self._common + self._own * own)
        return User(self._model(logits), self._model(logits + self._noise * noise))

    def _model(self, logits: Float64) -> Model:
        starts = self.trie.child_start[: self.trie.level_start[self.trie.levels]]  # of all inner nodes
        # Log-sum-exp below each parent, and a term for the codes that are no child (scoring rule vocab).
        total = np.log(np.add.reduceat(np.exp(logits[1:]), starts - 1) + 1.0)
        logp = logits.copy()
        logp[1:] -= total[self.trie.parent[1:]]
        return Model(self.trie, logp.astype(np.float32))


@lru_cache(maxsize=4)
def catalogue(crowding: float) -> Catalogue:
    """Return the catalogue: random codes, the first ones of each level more often."""
    rng = np.random.default_rng(7)
    codes = np.stack([(size * rng.random(_ITEMS) ** crowding).astype(np.int64) for size in _CODES], axis=1)
    return Catalogue.build([f"item-{number}" for number in range(_ITEMS)], codes, _CODES)
