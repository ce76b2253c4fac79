"""Texts of items: rows of any length, written and read, and a template with a separator per place."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from atspeed.engine.bundle.item_texts import ItemTexts, TokenRows
from atspeed.engine.bundle.prompt import PromptTemplate
from atspeed.engine.errors import BundleError

VOCABULARY = 50
ROWS = st.lists(st.lists(st.integers(0, VOCABULARY - 1), max_size=5), min_size=1, max_size=6)


def rows_of(lists: list[list[int]]) -> TokenRows:
    return TokenRows.of(np.array(row, dtype=np.int32) for row in lists)


@given(ROWS, st.data())
def test_rows_are_taken_in_any_order(lists: list[list[int]], data: st.DataObject) -> None:
    order = data.draw(st.lists(st.integers(0, len(lists) - 1), min_size=1, max_size=8))
    taken = rows_of(lists).take(np.array(order))
    assert [taken.row(place).tolist() for place in range(len(order))] == [lists[row] for row in order]
    assert taken.lengths.tolist() == [len(lists[row]) for row in order]


@pytest.mark.parametrize("last", [[[1, 2], [3]], [[1, 9], [3, 4]]], ids=["equal", "other"])
def test_texts_are_read_as_they_were_written(last: list[list[int]], tmp_path: Path) -> None:
    """The last item of a window has its own text."""
    texts = ItemTexts(rows_of([[1, 2], [3]]), rows_of(last))
    texts.save(tmp_path)
    entry = texts.entry("catalogue")
    read = ItemTexts.load(tmp_path, entry, vocab_size=VOCABULARY)
    assert [row.tolist() for row in read.of(np.array([0, 1, 1]))] == [[1, 2], [3], last[1]]
    assert read.of(np.array([], dtype=np.int64)) == []
    assert entry.longest == 2
    assert len(list(tmp_path.iterdir())) == (2 if last == [[1, 2], [3]] else 4)


@pytest.mark.parametrize(
    ("name", "array", "message"),
    [
        ("inner_tokens", np.array([1, 2, 4], dtype=np.int32), "other texts than those of the manifest"),
        ("inner_tokens", np.array([1, 2, VOCABULARY], dtype=np.int32), "outside the vocabulary of 50"),
        ("inner_tokens", np.array([1, 2], dtype=np.int32), "not the starts of rows of 2 tokens"),
        ("inner_tokens", np.array([1.0, 2.0, 3.0]), "not int32 tokens and int64 starts"),
        ("inner_starts", np.array([0, 3, 2, 3]), "not the starts of rows"),
        ("inner_starts", np.zeros(0, dtype=np.int64), "not the starts of rows"),
    ],
)
def test_damaged_texts_are_refused(name: str, array: np.ndarray, message: str, tmp_path: Path) -> None:
    rows = rows_of([[1, 2], [3]])
    texts = ItemTexts(rows, rows)
    texts.save(tmp_path)
    np.save(tmp_path / f"{name}.npy", array)
    with pytest.raises(BundleError, match=message):
        ItemTexts.load(tmp_path, texts.entry("catalogue"), vocab_size=VOCABULARY)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    rows = rows_of([[1]])
    with pytest.raises(BundleError, match=r"inner_tokens\.npy"):
        ItemTexts.load(tmp_path, ItemTexts(rows, rows).entry("catalogue"), vocab_size=VOCABULARY)


def test_separators_follow_the_place_of_an_item() -> None:
    template = PromptTemplate(prefix=(1,), suffix=(9,), max_items=3, separators=((4,), (5, 6)))
    items = [np.array([20]), np.array([21, 22]), np.array([23])]
    assert template.tokens(items).tolist() == [1, 20, 4, 21, 22, 5, 6, 23, 9]
    assert template.tokens(items[:2]).tolist() == [1, 20, 4, 21, 22, 9]
    assert template.max_tokens(2) == len(template.tokens([np.array([7, 7])] * 3))
    assert sorted(template.fixed_tokens) == [1, 4, 5, 6, 9]


@pytest.mark.parametrize("changed", [{"separator": (3,)}, {"max_items": 4}])
def test_separators_must_fit_the_window(changed: dict[str, object]) -> None:
    fields: dict[str, object] = {"prefix": (1,), "max_items": 3, "separators": ((4,), (5, 6))}
    with pytest.raises(ValidationError, match="separators: must be"):
        PromptTemplate.model_validate(fields | changed)


def test_a_template_without_texts_is_written_as_before() -> None:
    """So that a bundle keeps its version."""
    written = PromptTemplate(prefix=(1,), separator=(2,)).model_dump(mode="json")
    assert set(written) == {"prefix", "separator", "suffix", "max_items", "drop_block"}
