"""Updated catalogues: the items of a plain dictionary, on the same model files."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from atspeed.engine.bundle.bundle import Bundle
from atspeed.engine.bundle.catalogue import Catalogue
from atspeed.engine.bundle.catalogue_update import update_catalogue, updated_catalogue
from atspeed.engine.errors import CatalogueError
from tests.catalogues import random_catalogue
from tests.placeholder_bundles import placeholder_bundle

SIZES = (3, 4)
PATHS = st.tuples(*(st.integers(0, size - 1) for size in SIZES))
ITEMS = st.dictionaries(st.text("abcdef", min_size=1, max_size=3), PATHS, min_size=2)


def items(catalogue: Catalogue) -> dict[str, tuple[int, ...]]:
    return {catalogue.id_of(item): tuple(catalogue.codes[item].tolist()) for item in range(catalogue.items)}


def built(of: dict[str, tuple[int, ...]]) -> Catalogue:
    return Catalogue.build(list(of), np.array(list(of.values()), dtype=np.int32), SIZES)


@given(before=ITEMS, after=ITEMS)
def test_update_to_any_catalogue_has_its_version(
    before: dict[str, tuple[int, ...]], after: dict[str, tuple[int, ...]]
) -> None:
    removed = [item for item, path in before.items() if after.get(item) != path]
    added = {item: path for item, path in after.items() if before.get(item) != path}
    changed = updated_catalogue(built(before), added, removed)
    assert items(changed) == after
    assert changed.codes.tolist() == built(after).codes.tolist()


@pytest.mark.parametrize(
    ("added", "removed", "problem"),
    [
        ({}, ["nobody"], "remove: 'nobody' is not in the catalogue"),
        ({}, [f"item-{item}" for item in range(20)], "remove: no item would be left"),
        ({"item-1": (0, 0)}, [], "'item-1' occurs more than once"),
        ({"new": (0, 9)}, [], r"add: 'new': \[0, 9\] is not a code path of the codebooks \[4, 4\]"),
        ({"new": (0,)}, [], r"add: 'new': \[0\] has 1 codes; those of the catalogue have 2"),
    ],
)
def test_update_that_does_not_fit_names_the_item(
    added: dict[str, tuple[int, ...]], removed: list[str], problem: str
) -> None:
    with pytest.raises(CatalogueError, match=problem):
        updated_catalogue(random_catalogue(20, (4, 4), seed=0), added, removed)


def tailed() -> Catalogue:
    """One code or two, and then a scored tail: the last code of its level. Items of a path are not in the order of ids."""
    codes = np.array([[0, 3, -1], [0, 3, -1], [1, 2, 0]])
    return Catalogue.build(["x", "m", "z"], codes, (3, 4, 1), tail_start=(3, 3, 0), rank=np.array([0, 1, 2]))


def test_added_items_get_the_tail_of_their_length_and_the_last_place_of_their_path() -> None:
    changed = updated_catalogue(tailed(), {"a": (0,), "b": (2, 1)}, ["m"])
    assert [changed.id_of(item) for item in range(4)] == ["x", "a", "z", "b"]
    assert changed.codes.tolist() == [[0, 3, -1], [0, 3, -1], [1, 2, 0], [2, 1, 0]]
    assert changed.tail_start.tolist() == [3, 3, 0]
    assert updated_catalogue(changed, {"m": (0,)}, ["a", "b"]).codes.tolist() == tailed().codes.tolist()


@pytest.mark.parametrize(
    ("path", "problem"),
    [
        ((0, 3), r"add: 'new': \[0, 3\] is not a code path of the codebooks \[3, 4, 1\]"),
        ((0, 1, 0), r"add: 'new': \[0, 1, 0\] has 3 codes; those of the catalogue have 1 or 2"),
        ((), r"add: 'new': \[\] has 0 codes; those of the catalogue have 1 or 2"),
    ],
)
def test_tail_or_length_that_the_catalogue_does_not_have_is_refused(path: tuple[int, ...], problem: str) -> None:
    with pytest.raises(CatalogueError, match=problem):
        updated_catalogue(tailed(), {"new": path}, [])


def test_a_length_whose_last_path_is_removed_can_be_added_in_the_same_update_only() -> None:
    changed = updated_catalogue(tailed(), {"b": (2, 1)}, ["z"])
    assert changed.codes.tolist() == [[0, 3, -1], [0, 3, -1], [2, 1, 0]]
    fewer = updated_catalogue(tailed(), {}, ["z"])
    with pytest.raises(CatalogueError, match=r"add: 'b': \[2, 1\] has 2 codes; those of the catalogue have 1"):
        updated_catalogue(fewer, {"b": (2, 1)}, [])


def test_a_path_with_several_possible_tails_is_refused() -> None:
    made = Catalogue.build(["a", "b"], np.array([[0, 0], [1, 1]]), (2, 2), tail_start=(2, 0))
    with pytest.raises(CatalogueError, match="add: 'new': paths of 1 codes have several tails in the catalogue"):
        updated_catalogue(made, {"new": (1,)}, [])


def test_updated_bundle_is_complete_and_shares_its_models(tmp_path: Path) -> None:
    old = placeholder_bundle(tmp_path / "old", random_catalogue(20, (4, 4), seed=0))
    new = update_catalogue(old, tmp_path / "new", {"new": (1, 2)}, ["item-3"])
    Bundle(new.root).verify()
    expected = {item: path for item, path in items(old.catalogue()).items() if item != "item-3"} | {"new": (1, 2)}
    assert items(new.catalogue()) == expected
    assert new.model_path("target").samefile(old.model_path("target"))
    assert new.manifest.target == old.manifest.target
    assert new.manifest.model_version("target") != old.manifest.model_version("target")


def test_update_without_hard_links_copies_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Fail as from one disk to another."""
    old = placeholder_bundle(tmp_path / "old", random_catalogue(20, (4, 4), seed=0))

    def refuse(source: Path, _path: Path) -> None:
        raise OSError(errno.EXDEV, "Invalid cross-device link", str(source))

    monkeypatch.setattr(os, "link", refuse)
    new = update_catalogue(old, tmp_path / "new", {"new": (1, 2)}, [])
    new.verify()
    assert not new.model_path("target").samefile(old.model_path("target"))
