"""Layout of a pass: every token attends to its prompt and its own prefix, at its position in a sequence."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from atspeed.engine.arrays import Bools
from atspeed.engine.errors import CapacityError
from atspeed.engine.model.token_tree import MaskedPass, PagedTree, PathPass, TokenTree, TreePass
from atspeed.engine.search.trie import ROOT
from tests.oracles.naive_trie import NaiveTrie
from tests.oracles.worlds import build, naive_tries

PROMPT = [50, 51, 52, 53, 54]


def empty_tree(prompt: list[int]) -> TokenTree:
    """A tree as the evaluator opens it, without room for anything."""
    return TokenTree(np.array(prompt), np.zeros((1, 2, 0, 1, 1), dtype=np.float32))


def make_room(tree: TokenTree, tokens: int) -> None:
    """For so many more tokens."""
    tree.move_to(np.zeros((1, 2, tree.length + tokens, 1, 1), dtype=np.float32))


def masked(step: TreePass) -> MaskedPass:
    assert isinstance(step, MaskedPass)
    return step


def closed(naive: NaiveTrie, nodes: list[int]) -> list[int]:
    """Inner nodes with all their ancestors, the root too, ascending."""
    paths = [naive.nodes[node] for node in nodes]
    return sorted({naive.id_of[path[:end]] for path in paths for end in range(len(path) + 1)} | {ROOT})


@given(naive_tries(levels=(2, 3, 4)), st.integers(0, len(PROMPT) - 1), st.data())
def test_each_token_reads_the_sequence_that_leads_to_it(naive: NaiveTrie, cached: int, data: st.DataObject) -> None:
    """The visible tokens of a row, by position, are prompt and path as one sequence: from scratch, on a cache, in two passes."""
    trie, inner = build(naive).trie, naive.inner()
    column_tokens = np.arange(trie.columns) + 1000
    tree = empty_tree(PROMPT)
    make_room(tree, cached)
    tree.length = cached
    everything = closed(naive, data.draw(st.lists(st.sampled_from(inner))))
    later = data.draw(st.integers(1, naive.levels))
    waves = [
        [n for n in everything if len(naive.nodes[n]) < later],
        [n for n in everything if len(naive.nodes[n]) >= later],
    ]

    tokens, positions = PROMPT[:cached], list(range(cached))
    for nodes in filter(None, waves):
        step = masked(tree.plan_pass(trie, np.array(nodes), column_tokens))
        assert step.visible.shape == (len(step.tokens), len(tokens) + len(step.tokens))
        tokens, positions = tokens + step.tokens.tolist(), positions + step.positions.tolist()
        read = []
        for row in step.rows.tolist():
            seen = sorted(np.flatnonzero(step.visible[row]).tolist(), key=positions.__getitem__)
            assert [positions[slot] for slot in seen] == list(range(len(seen)))
            read.append([tokens[slot] for slot in seen])
        assert read == [PROMPT + _path_tokens(naive, node) for node in nodes]
        make_room(tree, len(step.tokens))
        tree.commit(step, np.array(nodes))
        assert tree.length == len(tokens)
    assert sorted(tree.slots) == [node for node in everything if node != ROOT]


def _path_tokens(naive: NaiveTrie, node: int) -> list[int]:
    offsets = np.concatenate([[0], np.cumsum(naive.codebook_sizes)]).tolist()
    return [1000 + offsets[level] + code for level, code in enumerate(naive.nodes[node])]


def test_prompt_tokens_are_causal_and_see_no_node() -> None:
    naive = NaiveTrie({"a": (0, 0), "b": (1, 0)}, (2, 1))
    tree = empty_tree(PROMPT)
    tree.length = 2
    step = masked(tree.plan_pass(build(naive).trie, np.array([0, 1, 2]), np.arange(3)))
    expected = [[column <= row + 2 for column in range(7)] for row in range(3)]
    assert step.visible[:3].tolist() == expected


def test_a_node_without_its_parent_is_refused_and_changes_nothing() -> None:
    naive = NaiveTrie({"a": (0, 0, 0), "b": (1, 0, 0)}, (2, 1, 1))
    trie, tree = build(naive).trie, empty_tree(PROMPT)
    orphan = naive.id_of[0, 0]
    with pytest.raises(CapacityError, match="ancestor"):
        tree.plan_pass(trie, np.array([ROOT, orphan]), np.arange(4))
    assert (tree.length, tree.slots) == (0, {})
    tree.plan_pass(trie, np.array([ROOT, naive.id_of[0,], orphan]), np.arange(4))


@given(st.lists(st.integers(1, 30), max_size=6))
def test_tree_moved_to_a_larger_buffer_keeps_its_content(steps: list[int]) -> None:
    tree = empty_tree([1])
    written = 0
    for tokens in steps:
        before = tree.kv
        assert tree.move_to(np.full((1, 2, tree.length + tokens, 1, 1), np.nan, dtype=np.float32)) is before
        tree.kv[:, :, tree.length : tree.length + tokens] = np.arange(written, written + tokens)[:, None, None]
        tree.length, written = tree.length + tokens, written + tokens
    assert tree.kv[0, 1, : tree.length, 0, 0].tolist() == list(range(written))


def test_cached_blocks_become_the_beginning() -> None:
    tree = empty_tree(PROMPT)
    blocks = [np.full((1, 2, 2, 1, 1), value, dtype=np.float32) for value in (7, 8)]
    make_room(tree, 4)
    tree.fill_prefix(blocks)
    assert tree.length == 4
    assert tree.kv[0, 0, :4, 0, 0].tolist() == [7, 7, 8, 8]


@given(naive_tries(levels=(1, 2, 3, 4)), st.integers(0, len(PROMPT) - 1), st.data())
def test_a_paged_tree_plans_the_same_pass_with_places_instead_of_a_mask(
    naive: NaiveTrie, cached: int, data: st.DataObject
) -> None:
    """Its prefix lengths and ancestors, spread out, are the mask of the host; in the first pass and in the next."""
    trie, column_tokens = build(naive).trie, np.arange(naive_columns(naive)) + 1000
    host = empty_tree(PROMPT)
    paged = PagedTree(np.array(PROMPT), host.kv)
    host.length = paged.length = cached
    everything = closed(naive, data.draw(st.lists(st.sampled_from(naive.inner()))))
    later = data.draw(st.integers(1, naive.levels))
    for wave in (False, True):
        nodes = np.array([n for n in everything if (len(naive.nodes[n]) >= later) == wave])
        if not len(nodes):
            continue
        expected, found = (
            masked(host.plan_pass(trie, nodes, column_tokens)),
            paged.plan_pass(trie, nodes, column_tokens),
        )
        for name in ("tokens", "positions", "rows"):
            np.testing.assert_array_equal(getattr(found, name), getattr(expected, name))
        np.testing.assert_array_equal(spread(found, expected.visible.shape[1]), expected.visible)
        host.commit(expected, nodes)
        paged.commit(found, nodes)


def naive_columns(naive: NaiveTrie) -> int:
    return sum(naive.codebook_sizes)


def spread(step: PathPass, places: int) -> Bools:
    """The mask that a device makes of prefix lengths and ancestors."""
    visible = np.arange(places) < step.prefix_lengths[:, None]
    visible[np.arange(len(step.tokens))[:, None], step.ancestors] = True
    return visible
