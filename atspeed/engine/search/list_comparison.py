"""Ranked lists, equal if items, order and scores are, bit for bit."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Protocol, Self


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


def largest_gap(one: RankedList, other: RankedList) -> float:
    """Return the largest difference between the scores at the same place."""
    return max((abs(a - b) for a, b in zip(one.scores, other.scores, strict=False)), default=0.0)
