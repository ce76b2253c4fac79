"""Which lists count as the same."""

from __future__ import annotations

import pytest

from client.comparison import NEAR_TIE, RankedList, Verdict, compare, largest_gap

A = RankedList(("x", "y", "z"), (-1.0, -2.0, -3.0))
LITTLE, MUCH = NEAR_TIE / 10, NEAR_TIE * 10


@pytest.mark.parametrize(
    ("other", "verdict"),
    [
        (A, Verdict.IDENTICAL),
        (RankedList(("x", "y", "z"), (-1.0, -2.5, -3.0)), Verdict.IDENTICAL),
        (RankedList(("x", "z", "y"), (-1.0, -2.0, -3.0)), Verdict.DIFFERENT),
        (RankedList(("x", "y"), (-1.0, -2.0)), Verdict.DIFFERENT),
        (RankedList(("x", "y", "w"), (-1.0, -2.0, -3.0 - LITTLE)), Verdict.NEAR_TIE),
        (RankedList(("x", "y", "w"), (-1.0, -2.0, -3.0 - MUCH)), Verdict.DIFFERENT),
        (RankedList(("x", "w", "z"), (-1.0, -2.0, -3.0)), Verdict.DIFFERENT),
        (RankedList((), ()), Verdict.DIFFERENT),
    ],
)
def test_verdicts(other: RankedList, verdict: Verdict) -> None:
    """A swap needs scores as close as rounding; an item in one list alone must lie at the other's end."""
    assert compare(other, A) is verdict
    assert compare(A, other) is verdict


def test_swapped_neighbours() -> None:
    """Two items a rounding apart may stand either way round; further apart they may not."""
    for gap, verdict in ((LITTLE, Verdict.NEAR_TIE), (MUCH, Verdict.DIFFERENT)):
        one = RankedList(("x", "y"), (-1.0, -1.0 - gap))
        other = RankedList(("y", "x"), (-1.0, -1.0 - gap))
        assert compare(one, other) is verdict


def test_largest_gap() -> None:
    """By place, not by item; empty lists have none."""
    assert largest_gap(A, RankedList(("q", "r"), (-1.0, -2.25))) == 0.25
    assert largest_gap(RankedList((), ()), A) == 0.0


def test_rounding_of_a_shared_item_widens_the_tie() -> None:
    """Two computations that disagree by 0.0003 on one item may swap another two that are 0.0003 apart."""
    one = RankedList(("a", "x", "y"), (-1.0, -2.0, -2.0003))
    other = RankedList(("a", "y", "x"), (-1.0003, -2.0, -2.0003))
    assert compare(one, other) is Verdict.NEAR_TIE


def test_an_item_lost_from_the_middle_is_no_tie() -> None:
    """One that has the same score as its replacement, while a worse one stays, was not swapped over the list's end."""
    assert compare(RankedList(("x", "w", "z"), A.scores), A) is Verdict.DIFFERENT
