"""Titles of items: kept as they are, and refused when their file is not what `save` wrote."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from atspeed.engine.bundle.bundle import Bundle
from atspeed.engine.bundle.catalogue import Catalogue
from atspeed.engine.bundle.titles import MAX_TITLE_BYTES, Titles
from atspeed.engine.errors import BundleError, CatalogueError
from tests.placeholder_bundles import placeholder_bundle

texts = st.lists(st.text(st.characters(exclude_categories=["Cs"]), max_size=20), max_size=20)


@given(texts)
def test_titles_come_back_as_they_were(wanted: list[str]) -> None:
    titles = Titles.of(wanted)
    assert [titles[item] for item in range(len(wanted))] == wanted


def test_titles_are_saved_and_loaded_with_the_catalogue(tmp_path: Path) -> None:
    catalogue = Catalogue.build(["a", "b"], np.array([[0], [1]]), [2])
    catalogue.save(tmp_path)
    assert Catalogue.load(tmp_path).titles is None
    catalogue.with_titles({"b": "Ça brûle"}).save(tmp_path)
    loaded = Catalogue.load(tmp_path)
    assert (loaded.titles_of(["a", "b", "c"]), loaded.version) == ({"b": "Ça brûle"}, catalogue.version)


@pytest.mark.parametrize("title", ["x" * (MAX_TITLE_BYTES + 1), "\ud800"])
def test_a_title_that_no_reader_could_show_is_refused(title: str) -> None:
    with pytest.raises(CatalogueError, match=r"^titles: "):
        Titles.of(["good", title])


def test_titles_that_the_manifest_does_not_have_are_refused(tmp_path: Path) -> None:
    """They are no part of the catalogue's version, and a signature covers the manifest alone."""
    catalogue = Catalogue.build(["a", "b"], np.array([[0], [1]]), [2]).with_titles({"a": "first", "b": "other"})
    bundle = placeholder_bundle(tmp_path, catalogue)
    assert bundle.catalogue().titles_of(["a"]) == {"a": "first"}
    catalogue.with_titles({"a": "wrong", "b": "other"}).save(tmp_path / "catalogue")
    with pytest.raises(BundleError, match=r"catalogue/titles\.npy: its SHA-256 differs"):
        bundle.catalogue()
    without = bundle.manifest.model_copy(
        update={"files": {name: one for name, one in bundle.manifest.files.items() if "title" not in name}}
    )
    with pytest.raises(BundleError, match=r"catalogue/titles\.npy: not in the manifest"):
        Bundle(tmp_path, without).catalogue()


def test_a_file_that_names_more_than_the_memory_holds_is_refused(tmp_path: Path) -> None:
    header = np.lib.format.header_data_from_array_1_0(np.zeros(1, dtype=np.uint8)) | {"shape": (2**60,)}
    with (tmp_path / "titles.npy").open("wb") as file:
        np.lib.format.write_array_header_1_0(file, header)
    (tmp_path / "title_start.npy").touch()
    with pytest.raises(CatalogueError, match=r"titles\.npy: names more values than the memory holds"):
        Titles.load(tmp_path, 2)


DAMAGES: list[tuple[Callable[[Titles], tuple[object, object]], str]] = [
    (lambda titles: (titles.text, titles.start[:-1]), "not titles of 2 items"),
    (lambda titles: (titles.text.astype(np.int64), titles.start), "not titles of 2 items"),
    (lambda titles: (titles.text[:-1], titles.start), "not one title behind the other"),
    (lambda titles: (titles.text, titles.start[::-1].copy()), "not one title behind the other"),
    (lambda titles: (titles.text | 0x80, titles.start), "not UTF-8"),
    (lambda titles: (titles.text, titles.start + np.array([0, 1, 0])), "a title begins within a character"),
]


@pytest.mark.parametrize(("damage", "problem"), DAMAGES, ids=[str(number) for number in range(len(DAMAGES))])
def test_a_damaged_file_is_named(
    tmp_path: Path, damage: Callable[[Titles], tuple[object, object]], problem: str
) -> None:
    text, start = damage(Titles.of(["a", "é"]))
    np.save(tmp_path / "titles.npy", text)  # type: ignore[arg-type]
    np.save(tmp_path / "title_start.npy", start)  # type: ignore[arg-type]
    with pytest.raises(CatalogueError, match=f"titles.npy: {problem}"):
        Titles.load(tmp_path, 2)
    shutil.rmtree(tmp_path)
    assert Titles.load(tmp_path, 2) is None
