"""Items, their paths and what a request prunes, against walking over all items."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from atspeed.engine.bundle.catalogue import Catalogue
from atspeed.engine.errors import CatalogueError
from atspeed.engine.search.trie import ROOT
from tests.oracles.naive_trie import NaiveTrie
from tests.oracles.worlds import build, item_ids, naive_tries

CODES = np.array([[0, 1], [1, 0], [1, 1]])


@given(naive_tries())
def test_every_leaf_holds_its_items_in_the_order_of_their_ids(naive: NaiveTrie) -> None:
    catalogue = build(naive)
    assert catalogue.items == len(naive.items)
    for leaf in range(int(catalogue.trie.level_start[naive.levels]), catalogue.trie.nodes):
        items = list(catalogue.items_of(leaf))
        assert [catalogue.id_of(item) for item in items] == naive.items_of(naive.nodes[leaf])
        assert catalogue.leaf_of(np.array(items)).tolist() == [leaf] * len(items)
        assert all(tuple(catalogue.codes[item].tolist()) == naive.nodes[leaf] for item in items)


@given(naive_tries(), st.lists(st.one_of(item_ids, st.text(max_size=8))))
def test_find_knows_every_id_and_no_other(naive: NaiveTrie, guesses: list[str]) -> None:
    """Guesses may hold anything that Python calls text, lone surrogates and NULs too."""
    catalogue = build(naive)
    ids = [*naive.items, *guesses]
    for item, index in zip(ids, catalogue.find(ids).tolist(), strict=True):
        assert (catalogue.id_of(index) == item) if item in naive.items else index == -1
    assert catalogue.find([]).tolist() == []
    catalogue.warm_up()
    assert catalogue.find(ids).tolist() == catalogue.find(iter(ids)).tolist()


@given(naive_tries(), st.data())
def test_pruning_leaves_exactly_the_prefixes_of_the_items_left(naive: NaiveTrie, data: st.DataObject) -> None:
    """Exclusions and allow-lists, each alone and both, down to nothing; asked as a search does, from the root down."""
    catalogue, everyone = build(naive), sorted(naive.items)
    excluded = data.draw(st.one_of(st.none(), st.just(everyone), st.lists(st.sampled_from(everyone))))
    allowed = data.draw(st.one_of(st.none(), st.lists(st.sampled_from(everyone))))
    pruning = catalogue.pruning(
        excluded=None if excluded is None else catalogue.find(excluded),
        allowed=None if allowed is None else catalogue.find(allowed),
    )
    assert pruning.cut.tolist() == sorted(set(pruning.cut.tolist()))
    assert pruning.empties_catalogue == (not naive.alive((), excluded or (), allowed))
    for node, path in enumerate(naive.nodes):
        above_alive = node == ROOT or naive.alive(path[:-1], excluded or (), allowed)
        if above_alive:
            assert pruning.live(np.array([node]))[0] == naive.alive(path, excluded or (), allowed)
        else:
            assert node not in pruning.cut


@given(naive_tries(), st.data())
def test_allow_list_leaves_exactly_its_items(naive: NaiveTrie, data: st.DataObject) -> None:
    """A cut would name nearly the whole catalogue: 10,000 items of ten million once took 25 seconds and a million nodes."""
    catalogue, everyone = build(naive), sorted(naive.items)
    allowed = data.draw(st.lists(st.sampled_from(everyone), max_size=3))
    pruning = catalogue.pruning(allowed=catalogue.find(allowed))
    assert pruning.kept is not None
    left = [node for node, path in enumerate(naive.nodes) if naive.alive(path, (), allowed)]
    assert pruning.kept.tolist() == left
    assert not len(pruning.cut)
    assert not pruning.is_none


@given(naive_tries())
def test_nothing_excluded_prunes_nothing(naive: NaiveTrie) -> None:
    catalogue = build(naive)
    for pruning in (catalogue.pruning(), catalogue.pruning(excluded=np.empty(0, dtype=np.int64))):
        assert pruning.is_none
        assert pruning.live(np.arange(catalogue.trie.nodes)).all()


@given(naive_tries())
def test_ids_may_come_as_bytes(naive: NaiveTrie) -> None:
    """Ten million Python strings would be a gigabyte."""
    encoded = np.array([item.encode() for item in naive.items])
    codes = np.array(list(naive.items.values())).reshape(len(naive.items), naive.levels)
    assert Catalogue.build(encoded, codes, naive.codebook_sizes).version == build(naive).version
    encoded[0] = b""
    with pytest.raises(CatalogueError, match="empty"):
        Catalogue.build(encoded, codes, naive.codebook_sizes)


@given(naive=naive_tries())
def test_save_and_load_is_the_identity(naive: NaiveTrie, tmp_path_factory: pytest.TempPathFactory) -> None:
    catalogue, folder = build(naive), tmp_path_factory.mktemp("catalogue")
    catalogue.save(folder)
    loaded = Catalogue.load(folder)
    assert loaded.version == catalogue.version
    assert [loaded.id_of(item) for item in range(loaded.items)] == [catalogue.id_of(n) for n in range(loaded.items)]
    assert loaded.item_start.tolist() == catalogue.item_start.tolist()
    assert [loaded.trie.path(node) for node in range(loaded.trie.nodes)] == naive.nodes


@given(naive_tries(), st.data())
def test_the_version_is_the_content_and_not_the_order(naive: NaiveTrie, data: st.DataObject) -> None:
    catalogue = build(naive)
    shuffled = data.draw(st.permutations(sorted(naive.items.items())))
    assert build(NaiveTrie(dict(shuffled), naive.codebook_sizes)).version == catalogue.version

    (first, path), *rest = shuffled
    renamed = NaiveTrie({first + "x" * 7: path, **dict(rest)}, naive.codebook_sizes)
    wider = NaiveTrie(naive.items, (naive.codebook_sizes[0] + 1, *naive.codebook_sizes[1:]))
    moved = NaiveTrie({**naive.items, first: (naive.codebook_sizes[0], *path[1:])}, wider.codebook_sizes)
    versions = {build(other).version for other in (naive, renamed, wider, moved)}
    assert len(versions) == 4


@pytest.mark.parametrize(
    ("ids", "codes", "problem"),
    [
        (["a", "b", "a"], CODES, "ids: 'a' occurs more than once"),
        (["a", "", "c"], CODES, "ids: '' is empty"),
        (["a", "b"], CODES, "2 ids for 3 code paths"),
        ([], np.empty((0, 2), dtype=int), "0 ids"),
        (["a", "b", "c"], CODES + 1, "codes: .*outside its codebook"),
        (["a", "b", "c"], CODES - 1, "codes: .*outside its codebook"),
        (["a", "b", "c"], CODES + 2**32, "codes: .*outside its codebook"),
        (["a", "b", "c"], np.repeat(CODES, 2, axis=1), "codes: .*4 codes per path, but 2 codebooks"),
        (["a", "b", "c\0"], CODES, "ids: .*NUL"),
        (["a", "b", "\ud800"], CODES, "ids: .*UTF-8"),
    ],
)
def test_invalid_items_are_refused(
    ids: list[str], codes: np.ndarray[tuple[int, int], np.dtype[np.int64]], problem: str
) -> None:
    """Codes of 2**32 once wrapped around to 0, and an id that ends in NUL lost it."""
    with pytest.raises(CatalogueError, match=problem):
        Catalogue.build(ids, codes, (2, 2))


# Levels [a][b or "\n"]["\n" or EOS][EOS or ended]: two codes, or one, and then a scored tail.
TAILED = np.array([[0, 1, 1, 1], [0, 2, 2, -1], [1, 0, 1, 1], [1, 0, 1, 1]])
TAIL_START = (2, 2, 1, 1)


def tailed() -> Catalogue:
    return Catalogue.build(
        ["a", "b", "c", "d"], TAILED, (2, 3, 3, 2), tail_start=TAIL_START, rank=np.array([0, 1, 3, 2])
    )


def test_prompts_and_replies_hold_the_codes_before_the_tail(tmp_path: Path) -> None:
    made = tailed()
    made.save(tmp_path)
    for catalogue in (made, Catalogue.load(tmp_path)):
        assert [codes.tolist() for codes in catalogue.spelled_codes(np.arange(4))] == [[0, 1], [0], [1, 0], [1, 0]]
        tokens = [100, 101, 100, 101, 102, 100, 102, 103, 104, 103]  # levels may share tokens
        assert [t.tolist() for t in catalogue.spelled_tokens(np.arange(3), tokens)] == [[100, 101], [100], [101, 100]]
        assert catalogue.longest_spelling == 2
        assert [catalogue.id_of(item) for item in range(4)] == ["a", "b", "d", "c"]
        assert catalogue.version == made.version


def test_tails_are_part_of_the_version_where_there_are_some(tmp_path: Path) -> None:
    """Catalogues of bundles that were written before there were tails keep their versions."""
    plain = Catalogue.build(["a", "b", "c"], CODES, (2, 2))
    assert plain.version == "6abf89beed6a1a82"
    plain.save(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["codebooks.npy", "codes.npy", "ids.npy"]
    versions = {
        Catalogue.build(["a", "b", "c"], CODES, (2, 2), tail_start=start).version for start in ((2, 2), (2, 1), (2, 0))
    }
    assert len(versions) == 3
    assert plain.version in versions


@pytest.mark.parametrize(
    ("codes", "start", "problem"),
    [
        ([[0, 1], [1, 0]], (2, 3), r"tails: \[2, 3\] are not the first tail tokens of the codebooks \[2, 2\]"),
        ([[0, 1], [1, 0]], (2,), "tails: "),
        ([[0, 1], [1, 0]], (1, 1), "codes: a path without a code before its tail"),
        ([[0, 1, 0], [0, 0, 1]], (2, 1, 1), "codes: a code stands after a tail token"),
        ([[0, -1], [0, 1]], (2, 2), "codes: .*one is the beginning of another"),
        ([[0, -1, 1]], (2, 2, 2), "codes: .*a code stands after the end of its path"),
    ],
)
def test_invalid_tails_and_ends_are_refused(codes: list[list[int]], start: tuple[int, ...], problem: str) -> None:
    ids, sizes = [str(item) for item in range(len(codes))], (2,) * len(codes[0])
    with pytest.raises(CatalogueError, match=problem):
        Catalogue.build(ids, np.array(codes), sizes, tail_start=start)


def test_ranks_that_are_not_one_for_each_item_are_refused() -> None:
    with pytest.raises(CatalogueError, match=r"rank: shape \[2\] for 3 items"):
        Catalogue.build(["a", "b", "c"], CODES, (2, 2), rank=np.arange(2))


@pytest.mark.parametrize("name", ["ids", "codes", "codebooks", "tails"])
def test_missing_or_invalid_array_file_is_named(name: str, tmp_path: Path) -> None:
    tailed().save(tmp_path)
    (tmp_path / f"{name}.npy").write_bytes(b"not numpy")
    with pytest.raises(CatalogueError, match=rf"{name}\.npy"):
        Catalogue.load(tmp_path)
    (tmp_path / f"{name}.npy").unlink()
    if name == "tails":
        return  # without this file there is no tail, and the version is another
    with pytest.raises(CatalogueError, match=rf"{name}\.npy"):
        Catalogue.load(tmp_path)


def test_inconsistent_arrays_are_refused(tmp_path: Path) -> None:
    """Unsorted paths would give every node another id than the other services know it by."""
    Catalogue.build(["a", "b", "c"], CODES, (2, 2)).save(tmp_path)
    for codes in (CODES[::-1], CODES + 1, CODES[:, 0], CODES[:2]):
        np.save(tmp_path / "codes.npy", codes.astype(np.int32))
        with pytest.raises(CatalogueError):
            Catalogue.load(tmp_path)
