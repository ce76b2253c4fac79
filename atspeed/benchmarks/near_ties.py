"""Comparison of lists whose scores differ by rounding, up to near-ties.

Other software, another device or another number format rounds differently. So two items whose scores are closer than rounding
can swap, also across the end of the list. Such lists are near-ties: wherever they differ, the scores differ by less than
NEAR_TIE, and so do the two scores of every shared item.
"""

from __future__ import annotations

from collections.abc import Iterable
from enum import StrEnum

from atspeed.engine.search.list_comparison import RankedList, largest_gap

# Ten times the rounding of a float32 pass, which is about 1e-5.
NEAR_TIE = 1e-4


class Verdict(StrEnum):
    """The result of a comparison."""

    IDENTICAL = "identical"
    NEAR_TIE = "near-tie"
    DIFFERENT = "different"

    @property
    def answer(self) -> str:
        """Return the answer to 'identical?': yes, near-tie or NO."""
        return {Verdict.IDENTICAL: "yes", Verdict.NEAR_TIE: "near-tie", Verdict.DIFFERENT: "NO"}[self]

    @classmethod
    def worst(cls, verdicts: Iterable[Verdict]) -> Verdict:
        """Return the verdict of the pair that differs most; identical without any pair."""
        return max(verdicts, key=list(cls).index, default=cls.IDENTICAL)


def compare(actual: RankedList, expected: RankedList) -> Verdict:
    """Compare two lists: identical items in identical order, a near-tie, or different."""
    if actual.items == expected.items:
        return Verdict.IDENTICAL
    if len(actual.items) != len(expected.items):
        return Verdict.DIFFERENT
    gaps = [
        largest_gap(actual, expected),
        _disagreement(actual, expected),
        _distance_to_end(actual, expected),
        _distance_to_end(expected, actual),
    ]
    return Verdict.NEAR_TIE if max(gaps) < NEAR_TIE else Verdict.DIFFERENT


def compare_bits(actual: RankedList, expected: RankedList) -> Verdict:
    """Compare two lists of one target, whose scores must be equal bit for bit; others are a near-tie at best."""
    if actual == expected:
        return Verdict.IDENTICAL
    return Verdict.worst([Verdict.NEAR_TIE, compare(actual, expected)])


def _disagreement(one: RankedList, other: RankedList) -> float:
    """Return the largest difference between the two scores of a shared item."""
    scores = dict(zip(other.items, other.scores, strict=True))
    both = zip(one.items, one.scores, strict=True)
    return max((abs(score - scores[item]) for item, score in both if item in scores), default=0.0)


def _distance_to_end(one: RankedList, other: RankedList) -> float:
    """Return the largest distance between an item that only `one` holds and the last score of `other`."""
    shared = set(other.items)
    alone = (score for item, score in zip(one.items, one.scores, strict=True) if item not in shared)
    return max((abs(score - other.scores[-1]) for score in alone), default=0.0)
