"""Semantic IDs: codes in range, reproducible, alike for items that are alike."""

import json
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest

from atspeed.engine.bundle.quantiser import Quantiser, QuantiserEntry, encode_items
from atspeed.training.data import CatalogueItem, Dataset
from atspeed.training.errors import DataError, RecipeError
from atspeed.training.recipe import GivenCodes, QuantisedCodes
from atspeed.training.semantic_ids import (
    build_catalogue,
    cooccurrence_embeddings,
    given_codes,
    item_embeddings,
    residual_codes,
    text_embeddings,
)


def dataset(*items: CatalogueItem, train: dict[str, tuple[str, ...]] | None = None) -> Dataset:
    return Dataset("made", "", items, train or {}, {}, {})


def clusters(count: int, per_cluster: int) -> npt.NDArray[np.float32]:
    """Points [count * per_cluster, 16] close to `count` far-apart centres, cluster by cluster."""
    rng = np.random.default_rng(0)
    centres = rng.normal(size=(count, 16)) * 10
    points = np.repeat(centres, per_cluster, axis=0) + rng.normal(size=(count * per_cluster, 16)) * 0.1
    return points.astype(np.float32)


def test_residual_codes_are_in_range_and_reproducible() -> None:
    points = clusters(8, 40)
    codes, codebooks = residual_codes(points, levels=3, bits=4, seed=3)
    assert codes.shape == (320, 3)
    assert codes.dtype == np.int32
    assert 0 <= codes.min() <= codes.max() < 16
    assert codebooks.shape == (3, 16, 16)
    np.testing.assert_array_equal(codes, residual_codes(points, levels=3, bits=4, seed=3)[0])


def test_items_of_a_cluster_share_their_first_code() -> None:
    first = residual_codes(clusters(8, 40), levels=2, bits=3, seed=1)[0][:, 0].reshape(8, 40)
    assert (first == first[:, :1]).all()
    assert len(set(first[:, 0].tolist())) == 8


def test_more_codes_than_items_are_refused() -> None:
    with pytest.raises(RecipeError, match="codebook_bits: 16 codes per level for only 5 items"):
        residual_codes(clusters(1, 5), levels=2, bits=4, seed=1)


def test_cooccurring_items_are_alike_and_unseen_ones_are_zero() -> None:
    """Two groups, so two factors: what is left of the spectrum is equal many times over, and a cut through it arbitrary."""
    index = {name: position for position, name in enumerate("abcdefghijkz")}
    histories = {str(user): tuple("abcdef" if user % 2 else "ghijk") for user in range(20)}
    embeddings = cooccurrence_embeddings(histories, index, neighbours=6, factors=2, seed=1)
    a, b, g, z = (embeddings[index[name]] for name in "abgz")
    assert a @ b > 0.5 > a @ g
    assert not z.any()
    assert np.linalg.norm(a) == pytest.approx(1, abs=1e-5)


def test_texts_of_one_meaning_are_nearer() -> None:
    soap, wash, comb = text_embeddings(["hand soap | bath", "liquid hand wash | bath", "wooden hair comb"])
    assert soap @ wash > soap @ comb
    assert np.linalg.norm(soap) == pytest.approx(1, abs=1e-5)


def test_blocks_are_weighted() -> None:
    """Squared length of the text block = text_weight, of the co-occurrence block = the rest."""
    items = [CatalogueItem(name, f"item {name}") for name in "abcd"]
    codes = QuantisedCodes(kind="quantised", text_weight=0.25, factors=3)
    embeddings = item_embeddings(dataset(*items, train={"1": tuple("abcd"), "2": tuple("dcba")}), codes, seed=1)
    assert embeddings.shape == (4, 384 + 3)
    np.testing.assert_allclose(np.linalg.norm(embeddings[:, :384], axis=1), 0.5, atol=1e-5)
    np.testing.assert_allclose(np.linalg.norm(embeddings[:, 384:], axis=1), np.sqrt(0.75), atol=1e-5)


def test_quantised_catalogue() -> None:
    train = {str(user): tuple(f"{(user + step) % 24}" for step in range(6)) for user in range(24)}
    made = dataset(*(CatalogueItem(str(item)) for item in range(24)), train=train)
    codes = QuantisedCodes(kind="quantised", levels=2, codebook_bits=3, text_weight=0, factors=8)
    catalogue, quantiser = build_catalogue(made, codes, data=None, seed=1)
    assert catalogue.items == 24
    assert catalogue.trie.codebook_sizes == (8, 8)
    assert quantiser is not None
    assert quantiser.entry.encoder is None
    assert catalogue.version == build_catalogue(made, codes, data=None, seed=1)[0].version


def test_given_codes_are_read_as_they_are() -> None:
    made = dataset(CatalogueItem("a", codes=(1, 2)), CatalogueItem("b", codes=(0, 3)))
    catalogue, quantiser = build_catalogue(made, GivenCodes(kind="given", codebook_size=4), data=None, seed=1)
    assert quantiser is None
    assert catalogue.trie.codebook_sizes == (4, 4)
    assert catalogue.codes[catalogue.find(["a"])].tolist() == [[1, 2]]


def test_codes_of_an_index_file_replace_those_of_the_items(tmp_path: Path) -> None:
    (tmp_path / "index.json").write_text(json.dumps({"a": ["<a_3>", "<b_1>"]}))
    codes = GivenCodes(kind="given", codebook_size=4, index_file="index.json")
    assert given_codes(dataset(CatalogueItem("a", codes=(0, 0))), codes, tmp_path).tolist() == [[3, 1]]


@pytest.mark.parametrize(
    ("items", "error", "problem"),
    [
        (
            [CatalogueItem("a", codes=(1, 4))],
            RecipeError,
            "codes.codebook_size: 4, but made: items: item 'a' has the code 4",
        ),
        ([CatalogueItem("a")], DataError, "item 'a' has no codes"),
        ([CatalogueItem("a", codes=(1, 2)), CatalogueItem("b", codes=(1,))], DataError, r"different lengths: \[1, 2\]"),
    ],
)
def test_bad_codes_are_refused(items: list[CatalogueItem], error: type[Exception], problem: str) -> None:
    with pytest.raises(error, match=problem):
        given_codes(dataset(*items), GivenCodes(kind="given", codebook_size=4), None)


@pytest.mark.parametrize("items", [320, 12])
def test_codebooks_give_the_items_their_codes_again(items: int) -> None:
    """The second case has fewer items than dimensions: faiss then works in turned coordinates."""
    points = clusters(8, 40)[:: 320 // items][:items]
    codes, codebooks = residual_codes(points, levels=3, bits=3, seed=3)
    quantiser = Quantiser(codebooks, QuantiserEntry(text_weight=1, usual_distance=0, far_distance=0))
    again, distances = quantiser.encode(points)
    assert (again == codes).all(axis=1).mean() > 0.98  # sums of another order decide ties
    rebuilt = sum(codebooks[level][again[:, level]] for level in range(3))
    left = np.linalg.norm(points - rebuilt, axis=1) / np.linalg.norm(points, axis=1)
    np.testing.assert_allclose(distances, left, atol=2e-3)


def test_text_part_alone_finds_the_group_of_an_item_and_says_how_far_it_is() -> None:
    texts = [f"{kind} number {number}" for kind in ("hand soap", "wooden comb", "red lipstick") for number in range(8)]
    items = [CatalogueItem(f"{place}", text) for place, text in enumerate(texts)]
    made = Dataset("made", "", tuple(items), {"1": tuple(f"{place}" for place in range(24))}, {}, {}, "a text")
    codes = QuantisedCodes(kind="quantised", levels=2, codebook_bits=2, text_weight=0.7, factors=4)
    catalogue, quantiser = build_catalogue(made, codes, data=None, seed=1)
    assert quantiser is not None
    assert quantiser.entry.encoder is not None
    assert (quantiser.entry.encoder.text_form, quantiser.entry.encoder.dimensions) == ("a text", 384)
    soap, stranger = quantiser.of_texts(text_embeddings(["hand soap number 9", "quarterly tax return"]))
    found = encode_items(quantiser, catalogue, {"soap": soap, "stranger": stranger})
    first = {int(catalogue.codes[place, 0]) for place in catalogue.find([f"{place}" for place in range(8)])}
    assert found["soap"].codes[0] in first
    assert found["soap"].distance <= quantiser.entry.far_distance < found["stranger"].distance
