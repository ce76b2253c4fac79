"""The selection graph on the CPU provider chooses what `best_children` chooses."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import cache

import numpy as np
import onnxruntime as ort
import pytest
from hypothesis import given
from hypothesis import strategies as st

from atspeed.engine.arrays import Float32, Float64, Int64
from atspeed.engine.errors import NoNumbersError
from atspeed.engine.model.device_selection import DeviceSelection, RowSelection, Selected
from atspeed.engine.model.selection_graph import selection_graph
from atspeed.engine.model.tree_session import Selection
from atspeed.engine.search.sampling import Stream, gumbel
from atspeed.engine.search.scoring import Evaluation, Perturbation, ScoringRule
from atspeed.engine.search.trie import Pruning
from tests.oracles.naive_trie import NaiveTrie
from tests.oracles.worlds import World, naive_tries

PERTURBATIONS = st.one_of(
    st.none(), st.builds(Perturbation, st.integers(0, 2**64 - 1), st.sampled_from([0.1, 1.0, 3.0]))
)


@cache
def session(rule: ScoringRule) -> ort.InferenceSession:
    return ort.InferenceSession(selection_graph(rule), providers=["CPUExecutionProvider"])


def scores_of(world: World) -> Float32:
    """Scores of a device graph: log-probabilities under rule `vocab`, logits of any shift under the others."""
    if world.rule is ScoringRule.VOCAB:
        return world.logits - world.log_normalizer[:, None]
    return world.logits + np.float32(3)


def selected(world: World, rows: Sequence[RowSelection], scores: Float32) -> list[Evaluation | NoNumbersError]:
    selection = DeviceSelection(world.trie, world.rule, np.asarray(world.tokens))
    feeds = {"scores": scores, **selection.catalogue, **selection.inputs(rows)}
    return selection.evaluations(rows, Selected(*session(world.rule).run(None, feeds)))


def drawn(world: World, data: st.DataObject) -> RowSelection:
    """Nodes of one tree, with an allow-list, exclusions or neither."""
    items = sorted(world.naive.items)
    nodes = sorted(data.draw(st.sets(st.sampled_from(world.naive.inner()), min_size=1)))
    some = data.draw(st.lists(st.sampled_from(items), max_size=4))
    pruning = data.draw(st.sampled_from([Pruning.none(), world.pruning(some), world.allowed(some)]))
    chosen = Selection(pruning, data.draw(st.integers(1, 5)), data.draw(PERTURBATIONS))
    return RowSelection(np.array(nodes), chosen)


def order(world: World, part: RowSelection, child: Int64) -> Float64:
    """The order of children under the part's perturbation, from the host's scores of all of them."""
    every = world.evaluate(part.nodes, Pruning.none(), world.trie.nodes)
    logp = dict(zip(every.child.tolist(), every.logp.tolist(), strict=True))
    values = np.array([logp[node] for node in child.tolist()])
    perturbation = part.selection.perturbation
    if perturbation is None:
        return values
    return values / perturbation.temperature + gumbel(perturbation.seed, Stream.GUMBEL, world.trie.path_hash(child))


@given(
    naive=naive_tries(),
    rule=st.sampled_from(ScoringRule),
    seed=st.integers(0, 2**32 - 1),
    coarse=st.booleans(),
    data=st.data(),
)
def test_trees_of_one_pass_get_the_children_that_the_host_chooses(
    naive: NaiveTrie, rule: ScoringRule, seed: int, coarse: bool, data: st.DataObject
) -> None:
    """Any pruning, limit and perturbation; equal scores, which coarse logits make, are in the order of codes."""
    world = World.random(naive, rule, seed, coarse=coarse)
    rows = [drawn(world, data) for _ in range(data.draw(st.integers(1, 3)))]
    scores = np.concatenate([scores_of(world)[part.nodes] for part in rows])
    for part, found in zip(rows, selected(world, rows, scores), strict=True):
        asked = part.selection
        expected = world.evaluate(part.nodes, asked.pruning, asked.limit, asked.perturbation)
        assert isinstance(found, Evaluation)
        found.validate(world.trie)
        assert found.node.tolist() == expected.node.tolist()
        assert found.child_start.tolist() == expected.child_start.tolist()
        np.testing.assert_allclose(found.log_mass, expected.log_mass, atol=1e-5, rtol=1e-6)
        # Near-ties may change places: the order of what is chosen is compared by value.
        key, expected_key = (order(world, part, chosen.child.astype(np.int64)) for chosen in (found, expected))
        np.testing.assert_allclose(key, expected_key, atol=1e-4)
        every = world.evaluate(part.nodes, Pruning.none(), world.trie.nodes)
        logp = dict(zip(every.child.tolist(), every.logp.tolist(), strict=True))
        np.testing.assert_allclose(found.logp, [logp[node] for node in found.child.tolist()], atol=1e-5)
        if coarse and asked.perturbation is None:
            assert found.child.tolist() == expected.child.tolist()


@pytest.mark.parametrize("value", [np.nan, -np.inf])
@pytest.mark.parametrize("rule", ScoringRule)
def test_scores_that_are_no_numbers_fail_their_tree_alone(rule: ScoringRule, value: float) -> None:
    naive = NaiveTrie({"a": (0, 0), "b": (0, 1), "c": (1, 2), "d": (2, 0)}, (3, 3))
    world = World.random(naive, rule, 1)
    whole = RowSelection(np.array([0]), Selection(Pruning.none(), 2))
    scores = scores_of(world)[[0, 0]].copy()
    scores[1, 1] = value  # of code 1 of the first level
    good, bad = selected(world, [whole, whole], scores)
    assert isinstance(good, Evaluation)
    assert isinstance(bad, NoNumbersError)
    without = replace(whole.selection, pruning=world.pruning(["c"]))
    [found] = selected(world, [RowSelection(whole.nodes, without)], scores[1:])
    assert isinstance(found, NoNumbersError if np.isnan(value) else Evaluation)
