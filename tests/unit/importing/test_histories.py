"""Every history format gives the same items."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from atspeed.importing.histories import histories_of, read_histories
from atspeed.importing.index import Index
from tests.unit.importing.refusals import refusal

INDEX = Index(Path("index.json"), ["1", "22", "3"], ["<a_1>"], np.zeros((3, 1), dtype=np.int32))
EXPECTED = [("1", "22"), ("3",)]
FILES = {
    "h.csv": (
        "user_id,history_item_title,item_title,history_item_id,item_id\n"
        'A1,"[\'Clips, ""large""\', \'x\']","t, u","[1, 22]",3\n'
        "A2,['y'],t,['3'],1\n"
        "A3,[],t,[],1\n"
    ),
    "h.jsonl": '{"user": "A1", "items": [1, 22]}\n{"history": ["3"], "target": 1}\n{"user": "A3", "items": []}\n',
    "h.inter.json": '{"0": [1, 22], "1": [3], "2": []}',
    "h.txt": "A1 1 22\nA2 3\nA3\n",
    "H.JSONL": '{"items": [1, 22]}\n{"items": ["3"]}\n',
}


@pytest.mark.parametrize("name", FILES)
def test_every_format(name: str, tmp_path: Path) -> None:
    (tmp_path / name).write_text(FILES[name])
    assert list(read_histories(tmp_path / name, INDEX).values()) == EXPECTED


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("h.csv", "user,items\nA,[1]\n", "no column history_item_id"),
        ("h.csv", "history_item_id\n[1\n", "row 1: history_item_id is not a list"),
        ("h.csv", "history_item_id\n[4]\n", "row 1: item '4' is not in index.json"),
        ("h.csv", "history_item_id\n" + "-" * 100_000 + "1\n", "row 1: history_item_id is not a list"),
        ("h.csv", "history_item_id\n[" + "1" * (1 << 24) + "]\n", "field larger than field limit"),
        ("h.jsonl", '{"items": [1]}\n{"items": [22, 4]}\n', "line 2: item '4' is not in index.json"),
        ("h.jsonl", '{"user": 1}\n', "line 1: no list under items or history"),
        ("h.jsonl", '{"items": [1.5]}\n', "line 1: 1.5 is not an item"),
        ("h.jsonl", "{\n", "line 1: "),
        ("h.json", '{"u": [9]}', "user u: item '9' is not in index.json"),
        ("h.json", "[]", "not an object"),
        ("h.json", '{"u": 9}', "user 'u': not a list of items"),
        ("h.txt", "A1\n", "holds no history with an item"),
    ],
)
def test_a_mistake_names_the_place(name: str, content: str, message: str, tmp_path: Path) -> None:
    assert message in refusal(lambda path: read_histories(path, INDEX), tmp_path / name, content)


def test_a_history_that_nothing_follows_is_read_for_training(tmp_path: Path) -> None:
    (tmp_path / "h.jsonl").write_text('{"items": [1, 22], "target": null}\n')
    assert histories_of(tmp_path / "h.jsonl", INDEX.rows, INDEX.path, with_targets=True) == {"line 1": ("1", "22")}


@pytest.mark.parametrize(("name", "follows"), [("h.csv", [("3",), ("1",), ("1",)]), ("h.jsonl", [(), ("1",), ()])])
def test_training_takes_the_item_that_follows_a_history(
    name: str, follows: list[tuple[str, ...]], tmp_path: Path
) -> None:
    """In a field of its own, it ends the history; where the history is empty, it is all there is."""
    (tmp_path / name).write_text(FILES[name])
    found = histories_of(tmp_path / name, INDEX.rows, INDEX.path, with_targets=True)
    whole = [(*history, *more) for history, more in zip([*EXPECTED, ()], follows, strict=True)]
    assert list(found.values()) == [history for history in whole if history]
