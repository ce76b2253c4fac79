"""Held-out cases of a data set, and the quality of lists for them.

The protocol is that of `atspeed.training.evaluate`, with the same users by the same seed, but without the training extra.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from atspeed.benchmarks.results import BenchmarkError
from atspeed.engine.bundle.catalogue import Catalogue
from atspeed.training.data import Dataset


@dataclass(frozen=True)
class HeldOutCase:
    """One user, in item indices: `history` oldest first, `answers` the next items. seed: seed of the user's sampled lists."""

    history: tuple[int, ...]
    answers: tuple[int, ...]
    seed: int


@dataclass(frozen=True)
class Quality:
    """Recall and NDCG of a list at a cutoff."""

    recall: float
    ndcg: float


def choose_cases(
    dataset: Dataset, catalogue: Catalogue, *, allow_empty: bool, users: int, seed: int
) -> list[HeldOutCase]:
    """Draw at most `users` of the test cases by the seed; cases without a history only where the model allows them.

    Raises BenchmarkError if there are none, or if one holds an item that the catalogue does not know.
    """
    answerable = [case for case in dataset.cases("test") if case.targets and (case.history or allow_empty)]
    if not answerable:
        raise BenchmarkError(f"data set {dataset.name}: no user with test items")
    rng = np.random.default_rng(seed)
    if len(answerable) > users:
        chosen = np.sort(rng.choice(len(answerable), size=users, replace=False))
        answerable = [answerable[index] for index in chosen]
    seeds = rng.integers(2**63, size=len(answerable))
    return [
        HeldOutCase(_known(catalogue, case.history), _known(catalogue, case.targets), int(own))
        for case, own in zip(answerable, seeds, strict=True)
    ]


def quality(ranking: Sequence[int], answers: Sequence[int], cutoff: int) -> Quality:
    """Return the quality of the first `cutoff` of a ranking (item indices, best first).

    recall = found answers / answers. ndcg = DCG over the DCG of a list that begins with the answers.
    """
    discount = 1 / np.log2(np.arange(2, cutoff + 2))
    hits = np.zeros(cutoff)
    hits[: len(ranking)] = [item in answers for item in ranking[:cutoff]]
    best = discount[: min(cutoff, len(answers))].sum()
    return Quality(float(hits.sum() / len(answers)), float(hits @ discount / best))


def _known(catalogue: Catalogue, items: Sequence[str]) -> tuple[int, ...]:
    index = catalogue.find(items).tolist()
    unknown = next((item for item, found in zip(items, index, strict=True) if found < 0), None)
    if unknown is not None:
        raise BenchmarkError(f"item {unknown!r} of the data set is not in the bundle's catalogue")
    return tuple(index)
