"""Tests of frequencies. Every caller fixes its seeds and its statistics before it looks, so that a result never flickers."""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable, Mapping
from typing import TypeVar

import numpy as np
from scipy import optimize, stats

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
    return float(stats.chisquare(counts, expected * counts.sum() / expected.sum()).pvalue)


def same_law_p(first: Counter[Outcome], second: Counter[Outcome]) -> float:
    """p-value of two samples coming from one law; outcomes seen fewer than 10 times in all are pooled."""
    outcomes = first.keys() | second.keys()
    common = [outcome for outcome in outcomes if first[outcome] + second[outcome] >= 10]
    table = [[sample[outcome] for outcome in common] for sample in (first, second)]
    for row, sample in zip(table, (first, second), strict=True):
        row.append(sample.total() - sum(row))
    columns = np.array(table)
    return float(stats.chi2_contingency(columns[:, columns.sum(axis=0) > 0]).pvalue)


def detectable_effect(draws: int, outcomes: int, significance: float, power: float = 0.99) -> float:
    """The least effect size that `chi_square_p` finds with this power: Cohen's w, sqrt(sum((p' - p)^2 / p)).

    A law that differs by w from the expected one makes the statistic noncentral by draws * w^2.
    """
    freedom = outcomes - 1
    threshold = stats.chi2.isf(significance, freedom)
    noncentrality = optimize.brentq(lambda value: stats.ncx2.sf(threshold, freedom, value) - power, 1e-6, 1e6)
    return float(np.sqrt(noncentrality / draws))
