"""Beam widths mean one width for every level."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from atspeed.engine.search.beam_widths import BeamWidths
from tests.oracles.naive_search import width_of
from tests.oracles.naive_trie import NaiveTrie
from tests.oracles.worlds import build, naive_tries

LISTED = st.lists(st.integers(1, 3), min_size=1, max_size=5)


@given(LISTED, LISTED)
def test_equal_widths_are_those_of_equal_searches(one: list[int], other: list[int]) -> None:
    """The last width holds for all further levels, so it may be repeated."""
    first, second = BeamWidths.of(*one), BeamWidths.of(*other)
    alike = all(width_of(one, level) == width_of(other, level) for level in range(1, 7))
    assert (first == second) == alike
    assert not alike or hash(first) == hash(second)
    assert [first.at(level) for level in range(1, 7)] == [width_of(one, level) for level in range(1, 7)]
    assert first.largest == max(one)
    assert (first.per_level == ()) == (len(set(one)) == 1)


@given(LISTED, st.integers(1, 4))
def test_narrowed_widths_are_narrow_on_every_level(listed: list[int], most: int) -> None:
    narrowed = BeamWidths.of(*listed).narrowed(most)
    assert [narrowed.at(level) for level in range(1, 7)] == [min(most, width_of(listed, n)) for n in range(1, 7)]


@given(LISTED, naive_tries())
def test_widths_of_the_levels_of_a_trie(listed: list[int], naive: NaiveTrie) -> None:
    trie, widths = build(naive).trie, BeamWidths.of(*listed)
    for depth in range(trie.levels):
        assert widths.below(trie, np.arange(trie.nodes)[trie.level(depth)]) == width_of(listed, depth + 1)
    assert widths.inner(trie).tolist() == [width_of(listed, level) for level in range(1, trie.levels)]
