"""`atspeed catalogue encode`: new items get the codes that a naive search finds, and mistakes are one line."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner

from atspeed.cli import main
from atspeed.engine.arrays import Float32
from atspeed.engine.bundle.bundle import Bundle
from atspeed.engine.bundle.catalogue import Catalogue
from atspeed.engine.bundle.manifest import hash_files, read_manifest, write_manifest
from atspeed.engine.bundle.quantiser import FOLDER, Quantiser, QuantiserEntry, TextEncoderEntry
from tests.bundles import write_bundle

TEXT, WHOLE = 4, 6
ENCODER = TextEncoderEntry(name="made", version="1", digest="0", dimensions=TEXT, text_form="a | b")


def codebooks() -> Float32:
    """Three levels of four codes. Lower levels are smaller, as those of a residual quantiser are."""
    scale = np.array([1, 0.3, 0.1])[:, None, None]
    made: Float32 = (np.random.default_rng(7).normal(size=(3, 4, WHOLE)) * scale).astype(np.float32)
    return made


def quantised_bundle(root: Path, encoder: TextEncoderEntry | None = ENCODER) -> Bundle:
    """A bundle of eight items on the paths 0 x y, with a quantiser."""
    paths = np.array([(0, *rest) for rest in itertools.product(range(2), range(4))])
    catalogue = Catalogue.build([f"i{place}" for place in range(8)], paths, (4, 4, 4))
    made = write_bundle(root, catalogue)
    entry = QuantiserEntry(text_weight=0.5 if encoder else 0, encoder=encoder, usual_distance=0.2, far_distance=0.4)
    Quantiser(codebooks(), entry).save(root / FOLDER)
    manifest = read_manifest(root)
    write_manifest(root, manifest.model_copy(update={"quantiser": entry, "files": hash_files(root)}))
    return Bundle(made.root)


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return quantised_bundle(tmp_path_factory.mktemp("quantised") / "bundle")


def run(*arguments: object) -> tuple[int, str]:
    done = CliRunner().invoke(main.app, [str(argument) for argument in arguments])
    assert done.exception is None or isinstance(done.exception, SystemExit), done.exception
    return done.exit_code, done.output


def lines_of(path: Path, *items: Any) -> Path:
    path.write_text("".join(f"{item if isinstance(item, str) else json.dumps(item)}\n" for item in items))
    return path


def nearest(embedding: Float32) -> tuple[tuple[int, ...], float]:
    """The best of all paths, and the relative distance to it."""
    books = codebooks()[:, :, : len(embedding)]
    sums = {
        path: sum(books[level][code] for level, code in enumerate(path))
        for path in itertools.product(range(4), repeat=3)
    }
    best = min(sums, key=lambda path: float(np.linalg.norm(embedding - sums[path])))
    return best, float(np.linalg.norm(embedding - sums[best]) / np.linalg.norm(embedding))


def test_whole_embeddings_and_text_parts_get_the_nearest_path(bundle: Bundle, tmp_path: Path) -> None:
    rng, books = np.random.default_rng(1), codebooks()
    wholes = {f"w{number}": rng.normal(size=WHOLE) * 0.05 + books[0][1] + books[1][number] for number in range(4)}
    parts = {f"t{number}": rng.normal(size=TEXT) for number in range(6)}
    items = [{"item_id": item, "embedding": given.tolist()} for item, given in (wholes | parts).items()]
    out = tmp_path / "new.jsonl"
    code, said = run("catalogue", "encode", bundle.root, lines_of(tmp_path / "items.jsonl", *items), "--out", out)
    assert code == 0, said
    found = {line["item_id"]: line for line in map(json.loads, out.read_text().splitlines())}
    assert list(found) == [*wholes, *parts]
    scaled = {item: part / np.linalg.norm(part) * np.sqrt(0.5) for item, part in parts.items()}
    for item, embedding in (wholes | scaled).items():
        path, distance = nearest(embedding.astype(np.float32))
        assert (tuple(found[item]["codes"]), found[item]["distance"]) == (path, pytest.approx(distance, abs=1e-3))
    assert run("catalogue", "update", bundle.root, tmp_path / "bundle", "--add", out)[0] == 0
    updated = Bundle(tmp_path / "bundle")
    catalogue = updated.catalogue()
    assert catalogue.codes[catalogue.find(list(found))].tolist() == [line["codes"] for line in found.values()]
    assert updated.manifest.quantiser == bundle.manifest.quantiser
    np.testing.assert_array_equal(updated.quantiser(catalogue).codebooks, books)


def test_collisions_and_far_items_are_told(bundle: Bundle, tmp_path: Path) -> None:
    books = codebooks()
    exact = (books[0][0] + books[1][1] + books[2][3]).tolist()  # the path of i7
    far = np.linalg.svd(books.reshape(-1, WHOLE)[:5])[2][-1] * 50  # orthogonal to five code vectors
    items = [
        {"item_id": "a", "embedding": exact},
        {"item_id": "b", "embedding": exact},
        {"item_id": "far", "embedding": far.tolist()},
    ]
    out = tmp_path / "new.jsonl"
    code, said = run("catalogue", "encode", bundle.root, lines_of(tmp_path / "items.jsonl", *items), "--out", out)
    assert code == 0
    first, second, _ = map(json.loads, out.read_text().splitlines())
    assert (first["codes"], first["shares_path_with"]) == ([0, 1, 3], ["i7", "b"])
    assert (second["codes"], second["shares_path_with"]) == ([0, 1, 3], ["i7", "a"])
    assert "1 of 3 items are farther from the codebooks than 95 % of the training items, 0.400: far" in said
    assert "3 items, 2 of them on a path with other items" in said.replace("\n", " ")
    assert run("catalogue", "update", bundle.root, tmp_path / "bundle", "--add", out)[0] == 0


GOOD = {"item_id": "a", "embedding": [1.0] * TEXT}


@pytest.mark.parametrize(
    ("lines", "problem"),
    [
        ([GOOD, {"item_id": "b"}], "line 2: text, embedding: one of the two must be given"),
        ([GOOD | {"text": "x"}], "line 1: text, embedding: one of the two must be given"),
        ([{"item_id": "a", "text": "  "}], "line 1: text: must not be blank"),
        ([{"item_id": "a", "embedding": [0, 0, 0, 0]}], "line 1: embedding: must not be zero"),
        (
            [{"item_id": "a", "embedding": [1.0] * 5}],
            "line 1: embedding: has 5 numbers; the bundle's quantiser takes 4 or 6",
        ),
        ([{"item_id": "a", "embedding": [1e300] * 4}], "line 1: embedding: holds a number that float32 cannot hold"),
        (['{"item_id": "a", "embedding": [NaN]}'], "line 1: NaN is no JSON value"),
        ([{"item_id": "a", "embedding": ["1"]}], "line 1: embedding.0: Input should be a valid number"),
        ([{"item_id": "", "text": "x"}], "line 1: item_id: "),
        ([GOOD, GOOD], "lines 1 and 2: item_id 'a' occurs more than once"),
        ([GOOD | {"codes": [1]}], "line 1: codes: Extra inputs are not permitted"),
        (["  "], "has no items"),
        (
            [{"item_id": "a", "text": "x"}],
            "quantiser.encoder: the bundle's codes come from 'made' 1, and installed is ",
        ),
    ],
)
def test_mistakes_are_one_line_and_write_nothing(
    bundle: Bundle, tmp_path: Path, lines: list[Any], problem: str
) -> None:
    out = tmp_path / "new.jsonl"
    code, said = run("catalogue", "encode", bundle.root, lines_of(tmp_path / "items.jsonl", *lines), "--out", out)
    assert (code, said.count("\n")) == (1, 1), said
    assert problem in said
    assert not out.exists()


def test_texts_need_an_encoder_and_a_bundle_its_quantiser(tmp_path: Path) -> None:
    textless = quantised_bundle(tmp_path / "bundle", None)
    items = lines_of(tmp_path / "items.jsonl", {"item_id": "a", "text": "x"})
    code, said = run("catalogue", "encode", textless.root, items, "--out", tmp_path / "new.jsonl")
    assert (code, "line 1: text: the bundle's codes come from no text; give the embedding, 6 numbers" in said) == (
        1,
        True,
    )
    assert "embeddings of new items are given" in run("bundle", "inspect", textless.root)[1]
    plain = read_manifest(textless.root)
    (textless.root / FOLDER / "codebooks.npy").unlink()
    write_manifest(textless.root, plain.model_copy(update={"quantiser": None, "files": hash_files(textless.root)}))
    code, said = run("catalogue", "encode", textless.root, items, "--out", tmp_path / "new.jsonl")
    assert (code, "manifest.json: quantiser: the bundle has none" in said) == (1, True)
    assert "new items need given codes" in run("bundle", "inspect", textless.root)[1]


def test_changed_codebooks_are_refused(tmp_path: Path) -> None:
    bundle = quantised_bundle(tmp_path / "bundle")
    assert bundle.manifest.quantiser is not None
    Quantiser(codebooks() * 2, bundle.manifest.quantiser).save(bundle.root / FOLDER)
    items = lines_of(tmp_path / "items.jsonl", GOOD)
    code, said = run("catalogue", "encode", bundle.root, items, "--out", tmp_path / "new.jsonl")
    assert (code, "codebooks.npy: its SHA-256 differs from the manifest's" in said) == (1, True)
