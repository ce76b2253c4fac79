"""Comparison of two lists: identical, a near-tie, or different.

Two computations of the same list round differently. So two items whose scores are closer than rounding can swap, also across
the end of the list. Such lists are near-ties: wherever they differ, the scores differ by less than NEAR_TIE, and so do the two
scores of every shared item. If the levels of the searches are known, the first level that differs is compared.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Protocol, Self

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


class Scored(Protocol):
    """An item of a list, in a reply or in the service."""

    @property
    def item_id(self) -> str: ...  # noqa: D102
    @property
    def score(self) -> float: ...  # noqa: D102


@dataclass(frozen=True)
class RankedList:
    """A list, best item first.

    Attributes:
        items: item ids.
        scores: their scores.
    """

    items: tuple[str, ...]
    scores: tuple[float, ...]

    @classmethod
    def of(cls, items: Iterable[Scored]) -> Self:
        """Build a list from its items, best first."""
        listed = list(items)
        return cls(tuple(item.item_id for item in listed), tuple(item.score for item in listed))


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


def compare_searches(actual: Sequence[RankedList], expected: Sequence[RankedList]) -> Verdict:
    """Compare two searches by the first level whose beams differ. Each is a sequence of levels, root first, the list last.

    Two beams that differ by rounding may swap across the end of an inner level. The lists below them can then differ freely.
    """
    if actual[-1].items == expected[-1].items:
        return Verdict.IDENTICAL
    levels = zip(actual, expected, strict=False)  # a search that found no more beams has fewer levels
    differing = (pair for pair in levels if set(pair[0].items) != set(pair[1].items))
    return compare(*next(differing, (actual[-1], expected[-1])))


def largest_gap(one: RankedList, other: RankedList) -> float:
    """Return the largest difference between the scores at the same place."""
    return max((abs(a - b) for a, b in zip(one.scores, other.scores, strict=False)), default=0.0)


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
