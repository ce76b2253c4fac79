"""Whether two lists are the same.

Two computations of the same list round differently, so two items whose scores are closer than rounding can swap. Such
lists are counted apart as near-ties: at every place the two scores are closer than NEAR_TIE, an item of both lists has the same
score in both, and one that is in a single list lies that close to the other list's last place.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from enum import StrEnum
from typing import Self

from atspeed.v1 import recommendation_pb2 as pb

NEAR_TIE = 1e-4


class Verdict(StrEnum):
    """How two lists compare."""

    IDENTICAL = "identical"
    NEAR_TIE = "near-tie"
    DIFFERENT = "different"


@dataclass(frozen=True)
class RankedList:
    """Item ids, best first, and their scores."""

    items: tuple[str, ...]
    scores: tuple[float, ...]

    @classmethod
    def of(cls, reply: pb.RecommendResponse) -> Self:
        """A reply's list."""
        return cls(tuple(item.item_id for item in reply.items), tuple(item.score for item in reply.items))


def compare(actual: RankedList, expected: RankedList) -> Verdict:
    """Identical items in identical order, the same but for near-ties, or different."""
    if actual.items == expected.items:
        return Verdict.IDENTICAL
    if len(actual.items) != len(expected.items) or largest_gap(actual, expected) >= NEAR_TIE:
        return Verdict.DIFFERENT
    swapped_in, swapped_out = _gaps_of_items(actual, expected), _gaps_of_items(expected, actual)
    close = all(gap < NEAR_TIE for gap in (*swapped_in, *swapped_out))
    return Verdict.NEAR_TIE if close else Verdict.DIFFERENT


def largest_gap(one: RankedList, other: RankedList) -> float:
    """The largest difference between the scores at the same place."""
    return max((abs(a - b) for a, b in zip(one.scores, other.scores, strict=False)), default=0.0)


def _gaps_of_items(one: RankedList, other: RankedList) -> Iterable[float]:
    """How far each item's score is from its score in the other list, or from that list's end where it is not there."""
    scores = dict(zip(other.items, other.scores, strict=True))
    return (abs(score - scores.get(item, other.scores[-1])) for item, score in zip(one.items, one.scores, strict=True))
