"""Lines end at line feeds, whatever else Unicode takes for an end, in every file of lines that is read."""

from __future__ import annotations

import codecs
import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from atspeed.benchmarks.histories import read_histories
from atspeed.engine.bundle.catalogue import Catalogue
from atspeed.engine.errors import LineError
from atspeed.engine.files.lines import line_problem, parse_json, read_lines, words
from atspeed.importing.errors import ImportingError
from atspeed.training.data import read_atspeed, read_index
from atspeed.training.errors import DataError

# What str.splitlines takes for an end of a line, but for the two that are one, and more that str.split takes for a space.
NO_ENDS = "\v\f\x1c\x1d\x1e\x85\u2028\u2029"
NO_SPACES = f"{NO_ENDS}\x1f\xa0\u2003\u3000\ufeff"
TEXT = st.text(st.characters(exclude_characters="\n", exclude_categories=["Cs"])).filter(
    lambda text: text.strip(" \t\r") and not text.endswith("\r") and not text.startswith("\ufeff")
)


@given(texts=st.lists(TEXT), end=st.sampled_from(["\n", "\r\n"]), blanks=st.integers(0, 2), mark=st.booleans())
def test_lines_written_in_any_way_are_read_with_their_numbers(
    tmp_path_factory: pytest.TempPathFactory, texts: list[str], end: str, blanks: int, mark: bool
) -> None:
    path = tmp_path_factory.mktemp("lines") / "file"
    content = "".join(f"{text}{end}{end * blanks}" for text in texts).encode()
    path.write_bytes(codecs.BOM_UTF8 * mark + content)
    numbered = [(1 + place * (1 + blanks), text) for place, text in enumerate(texts)]
    assert list(read_lines(path)) == numbered
    path.write_bytes(content.removesuffix(end.encode()))
    assert list(read_lines(path)) == numbered


@given(text=st.text(st.sampled_from("a \t\n\r\ufeff\u2028"), max_size=4))
def test_text_without_a_line_problem_is_read_back_from_a_line(
    tmp_path_factory: pytest.TempPathFactory, text: str
) -> None:
    path = tmp_path_factory.mktemp("lines") / "file"
    path.write_bytes(f"{text}\nnext\n".encode())
    assert ([line for _, line in read_lines(path)] == [text, "next"]) == (line_problem(text) is None)


def test_blank_lines_have_spaces_and_tabs_alone(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(f"\n \t\r\n{NO_SPACES}\n\r\n".encode())
    assert list(read_lines(tmp_path / "file")) == [(3, NO_SPACES)]


@pytest.mark.parametrize("character", NO_SPACES)
def test_words_are_parted_by_spaces_and_tabs_alone(character: str) -> None:
    assert words(f" a{character}b\t c  ") == [f"a{character}b", "c"]


def test_a_file_that_is_no_text_is_named_with_its_line(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"good\n\xff\n")
    with pytest.raises(LineError, match=r"file:2: not UTF-8"):
        list(read_lines(path))
    path.write_bytes("a\n".encode("utf-16"))
    with pytest.raises(LineError, match=r"file:1: not UTF-8"):
        list(read_lines(path))
    with pytest.raises(LineError, match="Is a directory"):
        list(read_lines(tmp_path))
    with pytest.raises(LineError, match="No such file"):
        list(read_lines(tmp_path / "gone"))


def test_a_key_that_stands_twice_in_an_object_is_refused() -> None:
    with pytest.raises(ValueError, match="the key 'a' occurs more than once"):
        parse_json('{"b": {"a": 1, "a": 1}}')


@pytest.mark.parametrize("name", ["NaN", "Infinity", "-Infinity"])
def test_a_number_that_json_does_not_have_is_refused(name: str) -> None:
    with pytest.raises(ValueError, match=f"{name} is no JSON value"):
        parse_json(f'{{"title": {name}}}')


def test_json_that_is_nested_too_deeply_is_refused_as_any_other_mistake() -> None:
    with pytest.raises(ValueError, match="nested too deeply"):
        parse_json("[" * 100_000)


@pytest.fixture(params=[b"", codecs.BOM_UTF8])
def folder(tmp_path: Path, request: pytest.FixtureRequest) -> Path:
    """Training data in which ids and titles hold what is no end of a line; written on Windows, with blank lines."""
    items = [{"id": f"{n}{end}x", "title": f"A{end}B", "codes": [n, 0]} for n, end in enumerate(NO_SPACES)]
    lines = {
        "items.jsonl": [json.dumps(item, ensure_ascii=False) for item in items],
        **{f"{split}.txt": [" ".join(["5", *(str(item["id"]) for item in items)])] for split in ("train", "valid")},
        "test.txt": [],
    }
    for name, texts in lines.items():
        (tmp_path / name).write_bytes(request.param + "\r\n".join(["", *texts, "", " "]).encode())
    return tmp_path


def test_training_data_with_unusual_characters_is_read(folder: Path) -> None:
    """U+2028 in a title was an "Unterminated string", and a byte order mark no JSON."""
    dataset = read_atspeed(folder)
    ids = [f"{n}{end}x" for n, end in enumerate(NO_SPACES)]
    assert [item.id for item in dataset.items] == ids
    assert [item.text for item in dataset.items] == [f"A{end}B" for end in NO_SPACES]
    assert dataset.train == dataset.valid == {"5": tuple(ids)}
    assert not dataset.test


def test_the_same_file_is_the_same_histories_for_benchmarks(folder: Path) -> None:
    dataset = read_atspeed(folder)
    ids = [item.id for item in dataset.items]
    catalogue = Catalogue.build(ids, np.array([[n, 0] for n in range(len(ids))]), (len(ids), 1))
    assert read_histories(folder / "train.txt", catalogue) == [dataset.train["5"]]
    (folder / "train.txt").write_bytes(b"\n\n5 nobody\n")
    with pytest.raises(ImportingError, match=r"train\.txt: line 3: item 'nobody'"):
        read_histories(folder / "train.txt", catalogue)
    (folder / "train.txt").write_bytes(b"5 \xff\n")
    with pytest.raises(LineError, match=r"train\.txt:1: not UTF-8"):
        read_histories(folder / "train.txt", catalogue)


def test_an_index_with_a_byte_order_mark_is_read_and_with_an_item_twice_refused(tmp_path: Path) -> None:
    path = tmp_path / "x.index.json"
    path.write_bytes(codecs.BOM_UTF8 + b'{"0": ["<a_1>"]}')
    assert read_index(path) == {"0": (1,)}
    path.write_text('{"0": ["<a_1>"], "0": ["<a_2>"]}')
    with pytest.raises(DataError, match="the key '0' occurs more than once"):
        read_index(path)
