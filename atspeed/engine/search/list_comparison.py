"""Whether two lists are the same.

Two computations of the same list round differently, so two items whose scores are closer than rounding can swap, also over
the end of the list. Such lists are near-ties and counted apart: wherever they differ, the scores are less than NEAR_TIE
apart, and so are the two scores of every item that both hold. Where the searches' levels are known, that is asked of the first
one that differs.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Protocol, Self

NEAR_TIE = 1e-4


class Verdict(StrEnum):
    """How two lists compare."""

    IDENTICAL = "identical"
    NEAR_TIE = "near-tie"
    DIFFERENT = "different"

    @property
    def answer(self) -> str:
        """To the question whether the lists are identical: yes, near-tie or NO."""
        return {Verdict.IDENTICAL: "yes", Verdict.NEAR_TIE: "near-tie", Verdict.DIFFERENT: "NO"}[self]

    @classmethod
    def worst(cls, verdicts: Iterable[Verdict]) -> Verdict:
        """The verdict on many pairs of lists: that on the pair that differs most; identical where there are none."""
        return max(verdicts, key=list(cls).index, default=cls.IDENTICAL)


class Scored(Protocol):
    """An item of a list, in a reply or before it became one."""

    @property
    def item_id(self) -> str: ...  # noqa: D102
    @property
    def score(self) -> float: ...  # noqa: D102


@dataclass(frozen=True)
class RankedList:
    """Item ids, best first, and their scores."""

    items: tuple[str, ...]
    scores: tuple[float, ...]

    @classmethod
    def of(cls, items: Iterable[Scored]) -> Self:
        """A list's items, best first."""
        listed = list(items)
        return cls(tuple(item.item_id for item in listed), tuple(item.score for item in listed))


def compare(actual: RankedList, expected: RankedList) -> Verdict:
    """Identical items in identical order, the same but for near-ties, or different."""
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
    """Two searches as what was chosen level by level, root first, the list at the end: judged by the first place where they part.

    Two beams a rounding apart may swap over the end of an inner level. What comes below them is then as different as it likes.
    """
    if actual[-1].items == expected[-1].items:
        return Verdict.IDENTICAL
    levels = zip(actual, expected, strict=False)  # one that found nothing on the way has fewer
    parted = (pair for pair in levels if set(pair[0].items) != set(pair[1].items))
    return compare(*next(parted, (actual[-1], expected[-1])))


def largest_gap(one: RankedList, other: RankedList) -> float:
    """The largest difference between the scores at the same place."""
    return max((abs(a - b) for a, b in zip(one.scores, other.scores, strict=False)), default=0.0)


def _disagreement(one: RankedList, other: RankedList) -> float:
    """The largest difference between the two scores of an item that both lists hold."""
    scores = dict(zip(other.items, other.scores, strict=True))
    both = zip(one.items, one.scores, strict=True)
    return max((abs(score - scores[item]) for item, score in both if item in scores), default=0.0)


def _distance_to_end(one: RankedList, other: RankedList) -> float:
    """How far the items that `one` alone holds are from the other's last place, over which they may have swapped."""
    shared = set(other.items)
    alone = (score for item, score in zip(one.items, one.scores, strict=True) if item not in shared)
    return max((abs(score - other.scores[-1]) for score in alone), default=0.0)
