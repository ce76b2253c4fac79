"""Tests of frequencies. Every caller fixes its seeds and its statistics before it looks, so that a result never flickers."""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable, Mapping
from typing import TypeVar

import numpy as np
import numpy.typing as npt
from scipy import special

Outcome = TypeVar("Outcome", bound=Hashable)


def chi_square_p(observed: Counter[Outcome], law: Mapping[Outcome, float]) -> float:
    """p-value of the observed outcomes under a law; outcomes expected fewer than 5 times are pooled.

    An outcome that the law does not know gives 0.
    """
    if observed.keys() - law.keys():
        return 0.0
    total = observed.total()
    cells = [(observed[outcome], total * probability) for outcome, probability in law.items()]
    rare = [cell for cell in cells if cell[1] < 5]
    cells = [cell for cell in cells if cell[1] >= 5]
    if rare:
        cells.append((sum(count for count, _ in rare), sum(expected for _, expected in rare)))
    counts, expected = np.array(cells).T
    expected = expected * counts.sum() / expected.sum()
    return _chi_square_tail(((counts - expected) ** 2 / expected).sum(), len(counts) - 1)


def same_law_p(first: Counter[Outcome], second: Counter[Outcome]) -> float:
    """p-value of two samples coming from one law; outcomes seen fewer than 10 times in all are pooled."""
    outcomes = first.keys() | second.keys()
    common = [outcome for outcome in outcomes if first[outcome] + second[outcome] >= 10]
    table = [[sample[outcome] for outcome in common] for sample in (first, second)]
    for row, sample in zip(table, (first, second), strict=True):
        row.append(sample.total() - sum(row))
    columns = np.array(table, dtype=np.float64)
    columns = columns[:, columns.sum(axis=0) > 0]
    expected = np.outer(columns.sum(axis=1), columns.sum(axis=0)) / columns.sum()
    return _chi_square_tail(((columns - expected) ** 2 / expected).sum(), columns.shape[1] - 1)


def uniform_cells_p(cells: npt.NDArray[np.integer]) -> float:
    """p-value of counts whose cells are equally likely."""
    expected = cells.sum() / cells.size
    return _chi_square_tail(((cells - expected) ** 2 / expected).sum(), cells.size - 1)


def uniform_p(values: npt.NDArray[np.float64]) -> float:
    """p-value of values that are uniform in (0, 1): Kolmogorov and Smirnov's test, by its limit law."""
    ordered, ranks = np.sort(values), np.arange(len(values) + 1) / len(values)
    distance = max((ranks[1:] - ordered).max(), (ordered - ranks[:-1]).max())
    return float(special.kolmogorov(np.sqrt(len(values)) * distance))


def detectable_effect(draws: int, outcomes: int, significance: float, power: float = 0.99) -> float:
    """The least effect size that `chi_square_p` finds with this power: Cohen's w, sqrt(sum((p' - p)^2 / p)).

    A law that differs by w from the expected one makes the statistic noncentral by draws * w^2.
    """
    freedom = outcomes - 1
    threshold = special.chdtri(freedom, significance)
    noncentrality = special.chndtrinc(threshold, freedom, 1 - power)
    return float(np.sqrt(noncentrality / draws))


def _chi_square_tail(statistic: float, freedom: int) -> float:
    return float(special.chdtrc(freedom, statistic))
