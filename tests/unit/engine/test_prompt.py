"""The window of a history: what keeps a prompt's beginning, and with it the cached keys and values, stable."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from atspeed.engine.bundle.prompt import PromptTemplate

TOKENS = st.lists(st.integers(0, 9), max_size=3).map(tuple)


@st.composite
def templates(draw: st.DrawFn) -> PromptTemplate:
    max_items = draw(st.integers(1, 12))
    return PromptTemplate(
        prefix=(1, *draw(TOKENS)),
        separator=draw(TOKENS),
        suffix=draw(TOKENS),
        max_items=max_items,
        drop_block=draw(st.integers(1, max_items)),
    )


@given(templates(), st.integers(0, 60))
def test_the_window_holds_the_newest_items_and_never_too_many(template: PromptTemplate, items: int) -> None:
    start = template.window_start(items)
    kept = items - start
    assert start % template.drop_block == 0
    if items <= template.max_items:
        assert start == 0
    else:
        assert template.max_items - template.drop_block < kept <= template.max_items


@given(templates(), st.integers(0, 60))
def test_the_beginning_stays_for_as_many_new_items_as_are_dropped_at_a_time(
    template: PromptTemplate, items: int
) -> None:
    """Window starts come in runs of exactly `drop_block` equal ones once the window is full."""
    starts = [template.window_start(count) for count in range(items + 2 * template.drop_block + 1)]
    assert starts == sorted(starts)
    full = [start for start in starts if start]
    for start in set(full) - {max(full, default=0)}:
        assert full.count(start) == template.drop_block


@given(templates(), st.integers(0, 30), st.integers(1, 4), st.data())
def test_a_new_item_only_appends_while_the_window_stands(
    template: PromptTemplate, items: int, levels: int, data: st.DataObject
) -> None:
    """Up to the suffix, the old prompt is the beginning of the new one; else every block of the cache would be lost."""
    history = np.arange(100, 100 + (items + 1) * levels).reshape(items + 1, levels)
    old, new = (template.tokens(list(history[template.window_start(count) : count])) for count in (items, items + 1))
    assert len(new) <= template.max_tokens(levels)
    if template.window_start(items) == template.window_start(items + 1):
        stable = len(old) - len(template.suffix)
        assert new[:stable].tolist() == old[:stable].tolist()


def test_tokens_are_prefix_items_and_suffix_in_order() -> None:
    template = PromptTemplate(prefix=(1, 2), separator=(3,), suffix=(4, 5), max_items=3)
    items = [np.array([10, 11]), np.array([12, 13]), np.array([14, 15])]
    assert template.tokens(items).tolist() == [1, 2, 10, 11, 3, 12, 13, 3, 14, 15, 4, 5]
    assert len(template.tokens(items)) == template.max_tokens(codes=2)
    assert template.tokens([]).tolist() == [1, 2, 4, 5]
    assert template.tokens([]).dtype == np.int64


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"prefix": ()}, "prefix"),
        ({"prefix": (1,), "suffix": (-1,)}, "suffix"),
        ({"prefix": (1,), "max_items": 0}, "max_items"),
        ({"prefix": (1,), "drop_block": 0}, "drop_block"),
        ({"prefix": (1,), "max_items": 3, "drop_block": 4}, "drop_block"),
        ({"prefix": (1,), "postfix": (2,)}, "postfix"),
    ],
)
def test_inconsistent_template_is_refused(fields: dict[str, object], named: str) -> None:
    with pytest.raises(ValidationError, match=named):
        PromptTemplate.model_validate(fields)
