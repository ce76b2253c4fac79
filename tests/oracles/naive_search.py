"""Beam search and sampling from their definitions, over paths in place of node ids."""

from __future__ import annotations

import itertools
import math
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from typing import TypeVar

import numpy as np
import numpy.typing as npt

from atspeed.engine.search.scoring import ScoringRule
from tests.oracles.naive_trie import NaiveTrie, Path

Key = TypeVar("Key", int, Path)
Law = dict[Key, float]
LogProb = Callable[[Path, int], float]
"""Log-probability of a code after a path."""
Alive = Callable[[Path], bool]


class NaiveModel:
    """Log-probabilities of codes from a table of logits [nodes, C] and their normalizers over the vocabulary [nodes].

    tokens: the token of each code column, [C].
    """

    def __init__(
        self,
        trie: NaiveTrie,
        logits: npt.NDArray[np.float32],
        log_normalizer: npt.NDArray[np.float32],
        rule: ScoringRule,
        tokens: Sequence[int],
    ) -> None:
        self.trie, self._rule, self._tokens = trie, rule, tokens
        self._logits, self._log_normalizer = logits, log_normalizer

    def __call__(self, path: Path, code: int) -> float:
        """Rounded to float32 and never positive, as an evaluation declares its log-probabilities."""
        children = self.trie.children(path)
        if code < 0 or (self._rule is ScoringRule.TRIE and len(children) == 1):
            return 0.0
        node = self.trie.id_of[path]
        if self._rule is ScoringRule.TRIE:
            normalizer = math.log(math.fsum(math.exp(self._logit(path, child)) for child in children))
        elif self._rule is ScoringRule.CODES:
            logits = dict(zip(self._tokens, self._logits[node].tolist(), strict=True)).values()
            most = max(logits)  # so that a single token scores exactly 0
            normalizer = most + math.log(math.fsum(math.exp(logit - most) for logit in logits))
        else:
            normalizer = float(self._log_normalizer[node])
        return min(0.0, float(np.float32(self._logit(path, code) - normalizer)))

    def _logit(self, path: Path, code: int) -> float:
        column = sum(self.trie.codebook_sizes[: len(path)]) + code
        return float(self._logits[self.trie.id_of[path], column])


def naive_beam_search(trie: NaiveTrie, logp: LogProb, width: int, alive: Alive) -> list[list[tuple[Path, float]]]:
    """The beams (path, score) of every level from the root's to the leaves'."""
    levels: list[list[tuple[Path, float]]] = [[((), 0.0)]]
    for _ in range(trie.levels):
        candidates = [
            ((*path, code), score + logp(path, code))
            for path, score in levels[-1]
            for code in trie.children(path)
            if alive((*path, code))
        ]
        levels.append(sorted(candidates, key=lambda beam: (-beam[1], beam[0]))[:width])
    return levels


def path_law(trie: NaiveTrie, logp: LogProb, temperature: float, alive: Alive) -> Law[Path]:
    """Each live path's probability: at every step, p at the temperature, renormalised over the live children."""
    law: Law[Path] = {(): 1.0}
    for _ in range(trie.levels):
        law = {
            (*path, code): above * share
            for path, above in law.items()
            for code, share in _step_law(trie, logp, path, temperature, alive).items()
        }
    return law


def _step_law(trie: NaiveTrie, logp: LogProb, path: Path, temperature: float, alive: Alive) -> Law[int]:
    codes = [code for code in trie.children(path) if alive((*path, code))]
    return normalised({code: math.exp(logp(path, code) / temperature) for code in codes})


def draws_without_replacement(law: Mapping[Path, float], count: int) -> dict[tuple[Path, ...], float]:
    """The probability of every ordered draw of `count` paths, each by its share of what is left."""
    return {draw: _probability_of(draw, law) for draw in itertools.permutations(law, min(count, len(law)))}


def _probability_of(draw: Sequence[Path], law: Mapping[Path, float]) -> float:
    left, probability = 1.0, 1.0
    for path in draw:
        probability *= law[path] / left
        left -= law[path]
    return probability


def level_by_level_sets(trie: NaiveTrie, logp: LogProb, temperature: float, width: int) -> dict[frozenset[Path], float]:
    """The law of the leaves when every level draws `width` without replacement from the softmax of its scores."""
    beams: dict[frozenset[Path], float] = {frozenset([()]): 1.0}
    scores: dict[Path, float] = {(): 0.0}
    for _ in range(trie.levels):
        after: dict[frozenset[Path], float] = defaultdict(float)
        for kept, probability in beams.items():
            below = {(*path, code): scores[path] + logp(path, code) for path in kept for code in trie.children(path)}
            scores |= below
            law = normalised({path: math.exp(score / temperature) for path, score in below.items()})
            for draw, share in draws_without_replacement(law, width).items():
                after[frozenset(draw)] += probability * share
        beams = dict(after)
    return beams


def relaxed_rule(
    rng: np.random.Generator, p: npt.NDArray[np.float64], q: npt.NDArray[np.float64], proposals: int, width: int
) -> frozenset[int]:
    """One level of AtSpeed-R's written rule: draw from q, accept by u <= p / q, else fill up; of too many the first stay."""
    drawn: list[int] = []
    while len(drawn) < proposals:
        left = q.copy()
        left[drawn] = 0
        drawn.append(int(rng.choice(len(q), p=left / left.sum())))
    accepted = [int(y) for y in drawn if rng.random() <= p[y] / q[y]]
    if len(accepted) >= width:
        return frozenset(accepted[:width])
    residual = np.maximum(p - q, 0)
    while len(accepted) < width:
        residual[accepted] = 0
        if residual.sum() == 0:
            residual = p.copy()
            continue
        accepted.append(int(rng.choice(len(p), p=residual / residual.sum())))
    return frozenset(accepted)


def normalised(weights: Law[Key]) -> Law[Key]:
    """Weights as probabilities."""
    total = math.fsum(weights.values())
    return {key: weight / total for key, weight in weights.items()}
