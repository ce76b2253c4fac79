"""Every index format gives the same codes, by name."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from atspeed.importing.errors import ImportingError
from atspeed.importing.index import Index, check_lengths, read_index
from atspeed.importing.layouts import LAYOUTS
from tests.unit.importing.refusals import refusal

LAYOUT = LAYOUTS["openonerec"]
PATHS = {
    "7": ["<s_a_12>", "<s_b_3>", "<s_c_8191>"],
    "0": ["<s_a_2>", "<s_b_3>", "<s_c_0>"],
    "30": ["<s_a_12>", "<s_b_3>", "<s_c_8191>"],
}


def named(index: Index) -> dict[str, list[str]]:
    """The names of each item's codes."""
    return {
        item: [index.names[number] for number in path if number >= 0]
        for item, path in zip(index.ids, index.paths.tolist(), strict=True)
    }


def test_names_by_item(tmp_path: Path) -> None:
    (tmp_path / "index.json").write_text(json.dumps(PATHS))
    assert named(read_index(tmp_path / "index.json", LAYOUT)) == PATHS


def test_lines_of_a_semantic_id_a_title_and_an_item(tmp_path: Path) -> None:
    lines = [f"{''.join(names)}\tA title, 3/4 x 10\t{item}" for item, names in PATHS.items()]
    (tmp_path / "info.txt").write_text("\n".join(lines) + "\n")
    assert named(read_index(tmp_path / "info.txt", LAYOUT)) == PATHS


def test_items_by_the_number_of_their_path(tmp_path: Path) -> None:
    shared, other = str((12 * 8192 + 3) * 8192 + 8191), str((2 * 8192 + 3) * 8192)
    content = {
        shared: [
            {"pid": 7, "count": 9, "count_after_downsample": 1},
            {"pid": 30, "count": 4, "count_after_downsample": 2},
        ],
        other: [{"iid": 0, "count": 5, "count_after_downsample": 5}],
    }
    (tmp_path / "sid2pid.json").write_text(json.dumps(content))
    index = read_index(tmp_path / "sid2pid.json", LAYOUT)
    assert named(index) == PATHS
    assert {name: column.tolist() for name, column in index.columns.items()} == {
        "count": [9, 4, 5],
        "count_after_downsample": [1, 2, 5],
    }


def test_a_table_of_items_and_numbers(tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    table = pyarrow.table({"pid": [7, 0, 30], "sid": [[12, 3, 8191], [2, 3, 0], [12, 3, 8191]]})
    parquet.write_table(table, tmp_path / "pid2sid.parquet")
    assert named(read_index(tmp_path / "pid2sid.parquet", LAYOUT)) == PATHS


TENSOR = np.array([[12, 3, 8191], [2, 3, 0], [12, 3, 8191], [0, 0, 1]])


def written(table: Any, path: Path) -> Path:
    """Write a tensor as torch or numpy does."""
    if path.suffix == ".pt":
        torch = pytest.importorskip("torch")
        torch.save(torch.from_numpy(table) if isinstance(table, np.ndarray) else table, path)
    else:
        np.save(path, table)
    return path


@pytest.mark.parametrize("name", ["merged_predictions_tensor.pt", "sids.npy"])
@pytest.mark.parametrize(
    "table", [TENSOR, np.ascontiguousarray(TENSOR.T), TENSOR.astype(np.float32)], ids=["rows", "columns", "float"]
)
def test_a_tensor_of_items_and_numbers(name: str, table: Any, tmp_path: Path) -> None:
    """Items are the rows, or the columns of GRID's files."""
    expected = {
        str(row): [f"<s_{'abc'[level]}_{code}>" for level, code in enumerate(path)]
        for row, path in enumerate(TENSOR.tolist())
    }
    assert named(read_index(written(table, tmp_path / name), LAYOUT)) == expected


@pytest.mark.parametrize(
    ("name", "table", "message"),
    [
        ("i.npy", TENSOR[:3], "as many items as codes"),
        ("i.npy", TENSOR[:, :2], r"int64 \[4, 2\], must be numbers \[items, 3\] or \[3, items\]"),
        ("i.npy", TENSOR[:, :0], "must be numbers"),
        ("i.npy", TENSOR - 1, r"item '1': \[1, 2, -1\] are not codes"),
        ("i.pt", TENSOR / 2, r"item '0': \[6\.0, 1\.5, 4095\.5\] are not codes"),
        ("i.npy", TENSOR.astype(str), "must be numbers"),
        ("i.npy", np.array([[1, None]], dtype=object), "holds no tensor that can be read"),
        ("i.pt", {"sem_ids": print}, "holds no tensor that can be read"),
        ("i.pt", [1, 2], "holds no tensor that can be read"),
    ],
)
def test_another_tensor_is_refused(name: str, table: Any, message: str, tmp_path: Path) -> None:
    """Nothing in a file is run: an object of Python is no tensor."""
    with pytest.raises(ImportingError, match=message) as caught:
        read_index(written(table, tmp_path / name), LAYOUT)
    assert "\n" not in str(caught.value)


def test_a_table_without_its_reader_names_the_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    message = refusal(lambda path: read_index(path, LAYOUT), tmp_path / "i.parquet", "")
    assert "pyarrow is not installed (extra parquet)" in message


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("i.json", '{"3": []}', "item '3': an empty path, it has no codes"),
        ("i.json", '{"3": ["<a_1>", 4]}', "item '3': its codes are not a list of names"),
        ("i.json", '{"3": ["<a_1>"], "3": ["<a_2>"]}', "the key '3' occurs more than once"),
        ("i.json", "[]", "not an object"),
        ("i.json", '{"3": ["<a_1>"]', "i.json: "),
        ("i.json", '{"x": [{"pid": 3}]}', "'x': not the number of a path of 3 codes below 8,192"),
        ("i.json", f'{{"{8192**3}": [{{"pid": 3}}]}}', "not the number of a path of 3 codes below 8,192"),
        ("i.json", f'{{"{"9" * 5000}": [{{"pid": 3}}]}}', "not the number of a path of 3 codes below 8,192"),
        ("i.json", '{"1": [{"pid": 3}], "2": [7]}', "7: not an item with pid or iid"),
        ("i.json", '{"1": [{"pid": 3, "n": 1}, {"pid": 4, "n": "x"}]}', "n: not a number for every item"),
        ("i.json", '{"3": ["\\ud800"]}', "code '\\ud800': not text that UTF-8 can hold"),
        ("i.json", '{"1": [{"pid": 3}], "2": 5}', "'2': not a list of items"),
        ("i.json", '{"1": [{"count": 3}]}', "an item lacks 'iid'"),
        ("i.txt", "<a_1><b_2>\ttitle\n", "i.txt:1: not a semantic ID"),
        ("i.txt", "a1b2\ttitle\t3\n", "i.txt:1: not a semantic ID"),
        ("i.txt", "<a_1>\tt\t3\n<a_2>\tt\t3\n", "item '3' occurs more than once"),
        ("i.txt", "", "holds no item"),
    ],
)
def test_a_mistake_names_the_file_and_the_item(name: str, content: str, message: str, tmp_path: Path) -> None:
    assert message in refusal(lambda path: read_index(path, LAYOUT), tmp_path / name, content)


def test_numbers_need_names(tmp_path: Path) -> None:
    (tmp_path / "i.json").write_text('{"0": [{"pid": 3}]}')
    with pytest.raises(ImportingError, match="the layout's code_names must name their tokens"):
        read_index(tmp_path / "i.json", LAYOUTS["lc-rec"])


def test_a_path_of_another_length_says_how_to_allow_it(tmp_path: Path) -> None:
    (tmp_path / "i.json").write_text(json.dumps(PATHS | {"4": ["<s_a_12>", "<s_b_3>"]}))
    index = read_index(tmp_path / "i.json", LAYOUT)
    assert named(index)["4"] == ["<s_a_12>", "<s_b_3>"]
    check_lengths(index, unequal=True)
    with pytest.raises(ImportingError, match="item '4': a path of 2 codes, others have 3; --unequal-paths allows it"):
        check_lengths(index, unequal=False)
