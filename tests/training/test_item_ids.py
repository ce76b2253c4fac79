"""One limit for an item's id, at every door: what is recommended can be named in a request."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from atspeed.engine.bundle.catalogue import Catalogue
from atspeed.engine.bundle.item_ids import MAX_ID_BYTES, id_problem
from atspeed.engine.errors import CatalogueError
from atspeed.errors import InvalidArgumentError
from atspeed.training.data import CatalogueItem, Dataset, read_atspeed
from atspeed.training.errors import DataError
from atspeed.training.recipe import GivenCodes
from atspeed.training.semantic_ids import build_catalogue
from orchestrator.requests import check_id

CODES = np.array([[0, 0], [0, 1]])
FITS = ["x" * MAX_ID_BYTES, "é" * (MAX_ID_BYTES // 2), "漢" * (MAX_ID_BYTES // 3)]
TOO_LONG = [f"{FITS[0]}x", f"{FITS[1]}x", f"{FITS[2]}xx", "x" * 100_000]


@pytest.mark.parametrize("item", FITS, ids=range(len(FITS)))
def test_longest_valid_id_is_accepted_everywhere(tmp_path: Path, item: str) -> None:
    assert id_problem(item) is None
    check_id("item_id", item)
    Catalogue.build(["a", item], CODES, (2, 2)).save(tmp_path)
    assert Catalogue.load(tmp_path).find([item]).tolist() != [-1]


@pytest.mark.parametrize("item", TOO_LONG, ids=range(len(TOO_LONG)))
def test_too_long_id_is_refused_everywhere(tmp_path: Path, item: str) -> None:
    """One of 268 bytes was recommended, and the request was refused in which it came back."""
    problem = f"has {len(item.encode())} bytes, at most 256 are allowed"
    with pytest.raises(InvalidArgumentError, match=problem):
        check_id("item_id", item)
    with pytest.raises(CatalogueError, match=problem) as refused:
        Catalogue.build(["a", item], CODES, (2, 2))
    assert len(str(refused.value)) < 200
    dataset = Dataset("data", "", (CatalogueItem("a", "", (0, 0)), CatalogueItem(item, "", (0, 1))), {}, {}, {})
    with pytest.raises(CatalogueError, match=problem):
        build_catalogue(dataset, GivenCodes(kind="given", codebook_size=2), data=None, seed=0)
    (tmp_path / "items.jsonl").write_text(json.dumps({"id": "a"}) + "\n" + json.dumps({"id": item}))
    with pytest.raises(DataError, match=rf"items\.jsonl:2: id: .*{problem}"):
        read_atspeed(tmp_path)


@pytest.mark.parametrize(
    ("ids", "problem"),
    [
        ([b"a", b"x" * 257], "has 257 bytes, at most 256 are allowed"),
        ([b"a", b""], "an item id is empty"),
        ([b"aa", b"\xff"], "is not UTF-8"),
        # Cut in the middle of a character, which the next id seems to end.
        ([b"a\xc3", b"\xa9b"], "is not UTF-8"),
    ],
)
def test_saved_catalogue_with_an_invalid_id_is_refused(tmp_path: Path, ids: list[bytes], problem: str) -> None:
    """Others may have written it: the version is right, and the id came back in no request, or broke every reply."""
    Catalogue.build(["a", "b"], CODES, (2, 2)).save(tmp_path)
    np.save(tmp_path / "ids.npy", np.array(ids))
    with pytest.raises(CatalogueError, match=f"{tmp_path}: ids: .*{problem}"):
        Catalogue.load(tmp_path)


def test_short_ids_in_a_wide_array_are_accepted(tmp_path: Path) -> None:
    Catalogue.build(["a", "b"], CODES, (2, 2)).save(tmp_path)
    np.save(tmp_path / "ids.npy", np.array([b"a", b"b"], dtype="S400"))
    assert Catalogue.load(tmp_path).id_of(1) == "b"


@pytest.mark.parametrize("item", [None, True, 1.5, [], {}, ""])
def test_invalid_id_is_named_with_its_line(tmp_path: Path, item: object) -> None:
    (tmp_path / "items.jsonl").write_text(json.dumps({"id": item}))
    with pytest.raises(DataError, match=r"items\.jsonl:1: .*id"):
        read_atspeed(tmp_path)
