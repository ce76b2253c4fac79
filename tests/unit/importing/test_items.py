"""Items that are served, and their order on one path."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from atspeed.importing.errors import ImportingError
from atspeed.importing.index import Index
from atspeed.importing.items import popularity_rank, read_items, served_rows
from tests.unit.importing.refusals import refusal

INDEX = Index(
    Path("index.json"),
    ["1", "22", "3"],
    ["<a_1>"],
    np.zeros((3, 1), dtype=np.int32),
    {"count": np.array([5.0, 7.0, 5.0])},
)
ALL = np.arange(3)
FILES = {
    "items.json": '{"3": {"title": "x", "sold": 2}, "1": {"sold": 9}}',
    "items.jsonl": '{"id": 3, "title": "x", "sold": 2}\n{"item_id": "1", "sold": 9}\n',
    "items.txt": "3\n1\n",
}


@pytest.mark.parametrize("name", FILES)
def test_items_are_served_in_every_format(name: str, tmp_path: Path) -> None:
    (tmp_path / name).write_text(FILES[name])
    items = read_items(tmp_path / name)
    assert served_rows(INDEX, items, tmp_path / name).tolist() == [2, 0]


def test_all_of_the_index_without_a_file() -> None:
    assert served_rows(INDEX, {}, None).tolist() == [0, 1, 2]


def test_popularity_is_a_column_or_a_file(tmp_path: Path) -> None:
    assert popularity_rank("count", INDEX, {}, ALL).tolist() == [1, 0, 1]  # equally popular items share a rank
    assert popularity_rank("count", INDEX, {}, np.array([1, 2])).tolist() == [0, 1]
    items = {"3": {"sold": 2}, "1": {"sold": 9}}
    assert popularity_rank("sold", INDEX, items, np.array([2, 0])).tolist() == [1, 0]
    (tmp_path / "counts.txt").write_text("3 8\n22\t1.5\n")
    assert popularity_rank(str(tmp_path / "counts.txt"), INDEX, {}, ALL).tolist() == [2, 1, 0]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("3 many\n", "counts.txt:1: not an item and a number"),
        ("1 nan\n", "counts.txt:1: not an item and a number"),
        ("1\n", "counts.txt:1: not an item and a number"),
        ("1 2 3\n", "counts.txt:1: not an item and a number"),
        ("1 2\n1 3\n", "counts.txt:2: item '1' occurs more than once"),
        ("", "counts.txt: holds no item that is served"),
        ("other 3\n", "counts.txt: holds no item that is served"),
    ],
)
def test_counts_that_order_nothing_are_refused(content: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "counts.txt"
    assert message in refusal(lambda path: popularity_rank(str(path), INDEX, {}, ALL), path, content)


@pytest.mark.parametrize(
    ("sold", "message"), [(float("nan"), "item '1' has no such number"), (10**400, "--popularity sold")]
)
def test_a_column_without_an_order_is_refused(sold: float, message: str) -> None:
    with pytest.raises(ImportingError, match=message):
        popularity_rank("sold", INDEX, {"1": {"sold": sold}, "3": {"sold": 2}}, np.array([0, 2]))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"id": 4}\n', "item '4' has no path in index.json"),
        ('{"id": 3}\n{"id": 3}\n', "items.jsonl:2: item '3' occurs more than once"),
        ('{"title": 3}\n', "items.jsonl:1: no id or item_id"),
        ('{"id": 3, "title": NaN}\n', "items.jsonl:1: NaN is no JSON value"),
    ],
)
def test_items_that_cannot_be_served_are_refused(content: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "items.jsonl"
    assert message in refusal(lambda path: served_rows(INDEX, read_items(path), path), path, content)


def test_a_popularity_that_is_neither_file_nor_column_names_the_item() -> None:
    with pytest.raises(
        ImportingError, match="--popularity sold: no file and no column of the index, and item '1' has no"
    ):
        popularity_rank("sold", INDEX, {}, ALL)
