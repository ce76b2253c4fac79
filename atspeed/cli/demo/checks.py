"""The comparisons of the demo that must hold."""

from __future__ import annotations

from dataclasses import dataclass, field

from atspeed.engine.search.list_comparison import RankedList
from atspeed_client import Recommendation

# An inflated model computes the same, but for rounding: 1e-5 in a score when tried.
_ROUNDING = 1e-3


@dataclass
class Checks:
    """The comparisons that must hold.

    Attributes:
        made: the number of comparisons.
        failed: descriptions of those that failed.
    """

    made: int = 0
    failed: list[str] = field(default_factory=list)

    def same(self, what: str, actual: Recommendation, expected: Recommendation) -> bool:
        """Count a comparison of two lists. It holds if items, order and scores are equal, bit for bit."""
        return self.that(what, same_list(actual, expected))

    def alike(self, what: str, actual: Recommendation, expected: Recommendation) -> bool:
        """Count a comparison of two lists. It holds if they are equal but for rounding and near-ties."""
        return self.that(what, alike(actual, expected))

    def that(self, what: str, holds: bool) -> bool:
        """Count a check."""
        self.made += 1
        if not holds:
            self.failed.append(what)
        return holds


def same_list(one: Recommendation, other: Recommendation) -> bool:
    """Return whether items, order and scores are equal, bit for bit."""
    return RankedList.of(one.items) == RankedList.of(other.items)


def alike(one: Recommendation, other: Recommendation) -> bool:
    """Return whether two lists have the same scores but for rounding, at every place and for every shared item.

    An item of one list alone then has a near-tie at the end of the other.
    """
    if len(one.items) != len(other.items):
        return False
    scores = {item.item_id: item.score for item in other.items}
    by_place = (abs(a.score - b.score) for a, b in zip(one.items, other.items, strict=True))
    by_item = (abs(item.score - scores[item.item_id]) for item in one.items if item.item_id in scores)
    end = other.items[-1].score if other.items else 0.0
    alone = (abs(item.score - end) for item in one.items if item.item_id not in scores)
    return all(gap <= _ROUNDING for gaps in (by_place, by_item, alone) for gap in gaps)
