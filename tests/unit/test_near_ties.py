"""Lists that count as the same."""

from __future__ import annotations

import pytest

from atspeed.benchmarks.near_ties import NEAR_TIE, Verdict, compare
from atspeed.engine.search.list_comparison import RankedList, largest_gap

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


@pytest.mark.parametrize(("rounding", "gap"), [(0.9, 1.1), (1.1, 0.9), (3.0, 3.0), (3.0, 0.0)])
def test_neither_gap_nor_rounding_may_reach_the_limit(rounding: float, gap: float) -> None:
    """Two computations that disagree on one item may not swap another two that are further apart for it."""
    rounding, gap = rounding * NEAR_TIE, gap * NEAR_TIE
    one = RankedList(("a", "x", "y"), (-1.0, -2.0, -2.0 - gap))
    other = RankedList(("a", "y", "x"), (-1.0 - rounding, -2.0, -2.0 - gap))
    assert compare(one, other) is Verdict.DIFFERENT


def test_gap_and_rounding_below_the_limit() -> None:
    """Both at once, each under its own limit."""
    one = RankedList(("a", "x", "y"), (-1.0, -2.0, -2.0 - 0.9 * NEAR_TIE))
    other = RankedList(("a", "y", "x"), (-1.0 - 0.9 * NEAR_TIE, -2.0, -2.0 - 0.9 * NEAR_TIE))
    assert compare(one, other) is Verdict.NEAR_TIE


def test_near_tie_limit_is_the_contracts() -> None:
    """Score gap < 0.0001, as the pages about measurements say."""
    assert NEAR_TIE == 1e-4


def test_answers() -> None:
    """A near-tie is neither yes nor NO, and many lists are as good as the worst of them."""
    identical, near, different = Verdict.IDENTICAL, Verdict.NEAR_TIE, Verdict.DIFFERENT
    assert [verdict.answer for verdict in (identical, near, different)] == ["yes", "near-tie", "NO"]
    assert Verdict.worst([identical, near, identical]) is near
    assert Verdict.worst([near, different, identical]) is different
    assert Verdict.worst([]) is identical


def test_item_missing_from_the_middle_is_no_near_tie() -> None:
    """One that has the same score as its replacement, while a worse one stays, was not swapped over the list's end."""
    assert compare(RankedList(("x", "w", "z"), A.scores), A) is Verdict.DIFFERENT
