"""The array trie against a dictionary of dictionaries, on random catalogues."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from atspeed.engine.search.trie import ENDED, ROOT, Trie
from tests.oracles.naive_trie import NaiveTrie
from tests.oracles.worlds import build, naive_tries


@given(naive_tries())
def test_nodes_are_numbered_by_depth_and_then_by_path(naive: NaiveTrie) -> None:
    """The one choice from which the tie order of every list follows."""
    trie = build(naive).trie
    assert [trie.path(node) for node in range(trie.nodes)] == naive.nodes
    assert (trie.levels, trie.nodes, trie.columns) == (naive.levels, len(naive.nodes), sum(naive.codebook_sizes))
    trie.check_integrity()


@given(naive_tries())
def test_children_depths_and_columns_are_those_of_the_paths(naive: NaiveTrie) -> None:
    trie = build(naive).trie
    everything = np.arange(trie.nodes)
    assert trie.depth(everything).tolist() == [len(path) for path in naive.nodes]
    assert [trie.depth_of(node) for node in everything.tolist()] == [len(path) for path in naive.nodes]
    for node, path in enumerate(naive.nodes):
        expected = [naive.id_of[*path, code] for code in naive.children(path)]
        assert trie.children(node).tolist() == expected
        assert trie.child_count[node] == len(expected)
    row, child = trie.children_of(everything[::-1])
    assert [(naive.nodes[trie.nodes - 1 - r], naive.nodes[c]) for r, c in zip(row, child, strict=True)] == [
        (path, (*path, code)) for path in reversed(naive.nodes) for code in naive.children(path)
    ]
    for depth in range(trie.levels + 1):
        assert [naive.nodes[node] for node in everything[trie.level(depth)]] == [
            path for path in naive.nodes if len(path) == depth
        ]
    real = np.array([node for node, path in enumerate(naive.nodes) if path and path[-1] != ENDED])
    columns = [sum(naive.codebook_sizes[: len(naive.nodes[node]) - 1]) + naive.nodes[node][-1] for node in real]
    assert trie.column(real).tolist() == columns
    assert trie.readable().tolist() == naive.inner()
    assert trie.ends.tolist() == [len(path) < naive.levels and naive.has_ended(path) for path in naive.nodes]


@given(naive_tries(), st.lists(st.integers(-1, 5), max_size=6))
def test_find_knows_every_path_and_no_other(naive: NaiveTrie, guess: list[int]) -> None:
    trie = build(naive).trie
    assert [trie.find(path) for path in naive.nodes] == list(range(trie.nodes))
    assert trie.find(guess) == naive.id_of.get(tuple(guess))


@given(naive_tries(), st.data())
def test_with_ancestors_is_the_smallest_tree_that_holds_the_nodes(naive: NaiveTrie, data: st.DataObject) -> None:
    trie = build(naive).trie
    nodes = data.draw(st.lists(st.integers(0, trie.nodes - 1), max_size=6))
    expected = {naive.nodes[node][:end] for node in nodes for end in range(1, trie.levels + 1)} - {()}
    assert trie.with_ancestors(nodes).tolist() == sorted(naive.id_of[path] for path in expected)


@given(naive_tries(), st.data())
def test_a_path_has_one_hash_in_every_catalogue(naive: NaiveTrie, data: st.DataObject) -> None:
    """A replica with a newer catalogue must perturb the old paths alike."""
    kept = data.draw(st.sets(st.sampled_from(sorted(naive.items)), min_size=1))
    part = NaiveTrie({item: path for item, path in naive.items.items() if item in kept}, naive.codebook_sizes)
    whole, smaller = build(naive).trie, build(part).trie
    nodes = np.array(data.draw(st.permutations(range(smaller.nodes))))
    same = np.array([naive.id_of[part.nodes[node]] for node in nodes])
    assert smaller.path_hash(nodes).tolist() == whole.path_hash(same).tolist()
    assert len(np.unique(whole.path_hash(np.arange(whole.nodes)))) == whole.nodes


def test_hashes_of_a_full_trie_are_distinct() -> None:
    """A path and its parent, siblings, and the same codes in another order: 4 levels of 12 codes."""
    grid = np.stack(np.meshgrid(*[np.arange(12)] * 4, indexing="ij"), axis=-1).reshape(-1, 4)
    trie = Trie.from_paths(grid, (12,) * 4)
    assert len(np.unique(trie.path_hash(np.arange(trie.nodes)))) == trie.nodes


@pytest.mark.parametrize(
    ("paths", "problem"),
    [
        (np.empty((0, 2), dtype=int), "at least one path"),
        (np.array([[0, 0, 0]]), "3 codes per path, but 2 codebooks"),
        (np.array([[0, 4]]), "outside its codebook"),
        (np.array([[-1, 0]]), "outside its codebook"),
        (np.array([[0, 1], [0, 1]]), "distinct"),
        (np.array([[0, 1], [0, 0]]), "lexicographic"),
        (np.array([[1, 0], [0, 1]]), "lexicographic"),
        (np.array([[0, -2]]), "outside its codebook"),
        (np.array([[0, -1], [0, 0]]), "one is the beginning of another"),
    ],
)
def test_invalid_paths_are_refused(paths: np.ndarray[tuple[int, int], np.dtype[np.int64]], problem: str) -> None:
    with pytest.raises(ValueError, match=problem):
        Trie.from_paths(paths, (4, 4))


def test_a_code_after_the_end_of_a_path_is_refused() -> None:
    with pytest.raises(ValueError, match="after the end of its path"):
        Trie.from_paths(np.array([[0, -1, 0]]), (4, 4, 4))


@given(naive_tries(), st.data())
def test_check_integrity_finds_every_changed_number(naive: NaiveTrie, data: st.DataObject) -> None:
    """A trie is a function of its paths, so a changed entry of any array is either noticed or gives another valid trie."""
    trie = build(naive).trie
    name = data.draw(st.sampled_from(["level_start", "parent", "code", "child_start"]))
    array = getattr(trie, name).copy()
    array[data.draw(st.integers(0, len(array) - 1))] += data.draw(st.sampled_from([-7, -2, -1, 1, 2, 7]))
    changed = dataclasses.replace(trie, **{name: array})
    paths = _paths(changed) if name == "code" else None
    if paths is not None:
        changed.check_integrity()
        assert Trie.from_paths(np.array(paths), trie.codebook_sizes).nodes == trie.nodes
        return
    with pytest.raises(ValueError, match=r"level_start|parent|code|child_start"):
        changed.check_integrity()


def _paths(trie: Trie) -> list[tuple[int, ...]] | None:
    """The whole paths of a trie whose codes were changed, or None when they are not sorted, distinct and in range."""
    nodes = [trie.path(node) for node in range(trie.nodes)]
    leaves = [path for path in nodes if len(path) == trie.levels]
    in_range = all(-1 <= code < size for path in leaves for code, size in zip(path, trie.codebook_sizes, strict=True))
    spelled = [path[: path.index(-1)] if -1 in path else path for path in leaves]
    ends = all(set(path[len(codes) :]) <= {-1} and codes for path, codes in zip(leaves, spelled, strict=True))
    ends = ends and not any(one != other and other[: len(one)] == one for one in spelled for other in spelled)
    in_order = leaves == sorted(set(leaves)) and nodes == _breadth_first(leaves)
    intact = trie.code[ROOT] == -1 and in_range and ends and in_order
    return leaves if intact else None


def _breadth_first(leaves: list[tuple[int, ...]]) -> list[tuple[int, ...]]:
    return sorted({leaf[:end] for leaf in leaves for end in range(len(leaf) + 1)}, key=lambda path: (len(path), path))
