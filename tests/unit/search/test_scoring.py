"""From logits to the best children, against a sort in plain Python; and what an evaluation from outside must not be."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given
from hypothesis import strategies as st

from atspeed.engine.search.sampling import Stream, gumbel
from atspeed.engine.search.scoring import Evaluation, Perturbation, ScoringRule, codes_normalizer
from tests.oracles.naive_trie import NaiveTrie
from tests.oracles.worlds import World, naive_tries

RULES = st.sampled_from(ScoringRule)
SEEDS = st.integers(0, 2**32 - 1)
PERTURBATIONS = st.one_of(
    st.none(), st.builds(Perturbation, st.integers(0, 2**64 - 1), st.sampled_from([0.1, 1.0, 3.0]))
)


@given(
    naive=naive_tries(),
    rule=RULES,
    seed=SEEDS,
    coarse=st.booleans(),
    limit=st.integers(1, 5),
    perturbation=PERTURBATIONS,
    data=st.data(),
)
def test_best_children_are_those_of_a_plain_sort(
    naive: NaiveTrie,
    rule: ScoringRule,
    seed: int,
    coarse: bool,
    limit: int,
    perturbation: Perturbation | None,
    data: st.DataObject,
) -> None:
    """Both rules, any pruning and limit; perturbed or not; ties, which coarse logits make, go to the lower code."""
    world = World.random(naive, rule, seed, coarse=coarse)
    excluded = data.draw(st.lists(st.sampled_from(sorted(naive.items))))
    nodes = sorted(data.draw(st.sets(st.sampled_from(naive.inner()), min_size=1)))
    evaluation = world.evaluate(np.array(nodes), world.pruning(excluded), limit, perturbation)
    evaluation.validate(world.trie)
    assert evaluation.node.tolist() == nodes
    temperature = perturbation.temperature if perturbation else 1.0
    for node, children in evaluation.items():
        path = naive.nodes[node]
        if not naive.alive(path, excluded):
            continue  # no search asks for what hangs below a cut
        live = [code for code in naive.children(path) if naive.alive((*path, code), excluded)]
        logp = {code: world.model(path, code) for code in live}
        order = {code: logp[code] / temperature + _noise(world, (*path, code), perturbation) for code in live}
        best = sorted(live, key=lambda code: (-order[code], code))[:limit]
        assert children.node.tolist() == [naive.id_of[*path, code] for code in best]
        assert children.logp.tolist() == [logp[code] for code in best]
        mass = math.log(math.fsum(math.exp(logp[code] / temperature) for code in live))
        assert children.log_mass == pytest.approx(mass, rel=1e-6, abs=1e-6)


def _noise(world: World, path: tuple[int, ...], perturbation: Perturbation | None) -> float:
    if perturbation is None:
        return 0.0
    key = world.trie.path_hash(np.array([world.naive.id_of[path]]))
    return float(gumbel(perturbation.seed, Stream.GUMBEL, key)[0])


@given(naive_tries(), RULES, SEEDS, st.data())
def test_pruning_never_changes_a_score(naive: NaiveTrie, rule: ScoringRule, seed: int, data: st.DataObject) -> None:
    """An evaluation of a child is the same whatever a request excludes."""
    world = World.random(naive, rule, seed)
    excluded = data.draw(st.lists(st.sampled_from(sorted(naive.items))))
    inner = np.array(naive.inner())
    whole = _scores(world.evaluate(inner, world.pruning([]), 100))
    pruned = _scores(world.evaluate(inner, world.pruning(excluded), 100))
    assert pruned.items() <= whole.items()


def _scores(evaluation: Evaluation) -> dict[int, float]:
    return dict(zip(evaluation.child.tolist(), evaluation.logp.tolist(), strict=True))


@given(naive_tries(), SEEDS)
def test_the_trie_rule_is_a_distribution_over_the_children(naive: NaiveTrie, seed: int) -> None:
    """An only child is certain: it scores exactly 0, so that it never needs the target."""
    world = World.random(naive, ScoringRule.TRIE, seed)
    for node, children in world.evaluate(np.array(naive.inner()), world.pruning([]), 100).items():
        assert math.fsum(np.exp(children.logp.astype(float))) == pytest.approx(1, abs=1e-6)
        if world.trie.child_count[node] == 1:
            assert children.logp.tolist() == [0.0]


@given(naive_tries(), RULES, SEEDS)
def test_an_evaluation_survives_its_dictionary_form(naive: NaiveTrie, rule: ScoringRule, seed: int) -> None:
    world = World.random(naive, rule, seed)
    evaluation = world.evaluate(np.array(naive.inner()), world.pruning([]), 3)
    again = Evaluation.of(dict(evaluation.items()))
    for field in dataclasses.fields(Evaluation):
        before, after = getattr(evaluation, field.name), getattr(again, field.name)
        assert np.array_equal(before, after)
        assert before.dtype == after.dtype
    Evaluation.of({}).validate(world.trie)


@given(naive_tries(), RULES, SEEDS, st.data())
def test_joined_parts_are_the_whole(naive: NaiveTrie, rule: ScoringRule, seed: int, data: st.DataObject) -> None:
    """Parts of any length, empty ones too."""
    world, inner = World.random(naive, rule, seed), np.array(naive.inner())
    ends = sorted(data.draw(st.lists(st.integers(0, len(inner)), max_size=3)))
    whole = world.evaluate(inner, world.pruning([]), 3)
    cuts = np.split(inner, ends)
    parts = [world.evaluate(nodes, world.pruning([]), 3) if len(nodes) else Evaluation.of({}) for nodes in cuts]
    joined = Evaluation.joined(parts)
    for field in dataclasses.fields(Evaluation):
        before, after = getattr(whole, field.name), getattr(joined, field.name)
        assert np.array_equal(before, after)
        assert before.dtype == after.dtype


def test_an_ended_place_scores_zero_whatever_the_logits_are() -> None:
    """A path of one code beside one of two; the model's logits at the place after it are not looked at."""
    naive = NaiveTrie({"a": (0, -1), "b": (1, 0), "c": (1, 1)}, (2, 2))
    for rule in ScoringRule:
        world = World.random(naive, rule, 0)
        nodes = np.array([naive.id_of[0,], naive.id_of[1,]])
        evaluation = world.evaluate(nodes, world.pruning([]), 3)
        evaluation.validate(world.trie)
        assert evaluation.child[0] == naive.id_of[0, -1]
        assert evaluation.logp[0] == evaluation.log_mass[0] == 0.0
        alone = Evaluation.of({}).with_ended(world.trie, nodes[:1])
        both = world.evaluate(nodes[1:], world.pruning([]), 3).with_ended(world.trie, nodes)
        for made, expected in ((alone, evaluation.last(2)), (both, evaluation)):
            assert made.node.tolist() == expected.node[: len(made.node)].tolist()
            assert made.logp.tolist() == expected.logp[: len(made.logp)].tolist()
        changed = dataclasses.replace(evaluation, logp=np.append(np.float32(-1), evaluation.logp[1:]))
        with pytest.raises(ValueError, match="an ended place does not score 0"):
            changed.validate(world.trie)


def test_extreme_logits_stay_log_probabilities() -> None:
    """A certain code, one that is impossible in float32, and a normalizer that rounding puts below its logit."""
    naive = NaiveTrie({"a": (0,), "b": (1,), "c": (2,)}, (3,))
    world = World.random(naive, ScoringRule.VOCAB, 0)
    world.logits[0] = [80.0, -80.0, 79.0]
    for normalizer in (80.0, 79.9999):
        world.log_normalizer[0] = normalizer
        evaluation = world.evaluate(np.array([0]), world.pruning([]), 3)
        evaluation.validate(world.trie)
        assert evaluation.child.tolist() == [1, 3, 2]
        assert evaluation.logp[0] == 0.0


WORLD = World.random(
    NaiveTrie({"a": (0, 0), "b": (0, 1), "c": (1, 0), "d": (1, 1), "e": (1, 2), "f": (2, 2)}, (3, 3)),
    ScoringRule.VOCAB,
    1,
)
HONEST = WORLD.evaluate(np.array([0, 1, 2, 3]), WORLD.pruning([]), 3)
Change = Callable[[npt.NDArray[Any]], npt.NDArray[Any]]


def _put(index: int, value: float) -> Change:
    def change(array: npt.NDArray[Any]) -> npt.NDArray[Any]:
        changed = array.copy()
        changed[index] = value
        return changed

    return change


@pytest.mark.parametrize(
    ("field", "change", "problem"),
    [
        ("node", lambda a: a[:-1], "lengths"),
        ("child_start", lambda a: a[:-1], "lengths"),
        ("child", lambda a: a[:-1], "lengths"),
        ("logp", lambda a: a[:-1], "lengths"),
        ("log_mass", lambda a: np.append(a, a[:1]), "lengths"),
        ("node", lambda a: a[::-1], "not ascending"),
        ("node", _put(1, 0), "not ascending"),
        ("node", _put(0, -1), "not ascending"),
        ("node", _put(3, 10), "not ascending"),
        ("child_start", _put(0, 1), "not a partition"),
        ("child_start", _put(-1, 2), "not a partition"),
        ("child_start", _put(1, 99), "not a partition"),
        ("child_start", _put(1, -1), "not a partition"),
        ("child", _put(0, 0), "not a trie node"),
        ("child", _put(0, -3), "not a trie node"),
        ("child", _put(0, 10), "not a trie node"),
        ("child", _put(0, 9), "not a child of its node"),
        ("child", _put(1, int(HONEST.child[0])), "occurs twice"),
        ("logp", _put(0, math.nan), "logp"),
        ("logp", _put(0, -math.inf), "logp"),
        ("logp", _put(0, 0.5), "logp"),
        ("log_mass", _put(0, math.nan), "log_mass"),
        ("log_mass", _put(0, math.inf), "log_mass"),
        ("log_mass", _put(0, -math.inf), "log_mass"),
    ],
)
def test_invalid_evaluation_is_refused(field: str, change: Change, problem: str) -> None:
    """A child named twice would have put one item twice into a list."""
    with pytest.raises(ValueError, match=problem):
        dataclasses.replace(HONEST, **{field: change(getattr(HONEST, field))}).validate(WORLD.trie)


def test_a_normalizer_over_codes_does_not_depend_on_the_other_nodes_of_a_pass() -> None:
    """To the last bit, as int8 targets promise; sums over columns that lie apart would be added in another order."""
    logits = np.random.default_rng(0).normal(size=(40, 900)).astype(np.float32) * 3
    columns = np.arange(0, 900, 2)
    together = codes_normalizer(logits, columns)
    assert together.tolist() == [codes_normalizer(row[None], columns)[0] for row in logits]


@given(st.data())
def test_validated_evaluation_is_safe_to_search(data: st.DataObject) -> None:
    """Random damage is either refused or leaves every child below its own node, once, with a finite score."""
    damaged = {}
    for field in dataclasses.fields(Evaluation):
        array = getattr(HONEST, field.name).copy()
        for index in data.draw(st.lists(st.integers(0, len(array) - 1), max_size=2), label=field.name):
            array[index] = data.draw(st.sampled_from([-1, 0, 1, 2, 3, 5, 9, 100]))
        damaged[field.name] = array
    evaluation = Evaluation(**damaged)
    try:
        evaluation.validate(WORLD.trie)
    except ValueError:
        return
    seen = [child for _, children in evaluation.items() for child in children.node.tolist()]
    assert len(seen) == len(set(seen))
    for node, children in evaluation.items():
        assert {WORLD.naive.nodes[child][:-1] for child in children.node.tolist()} <= {WORLD.naive.nodes[node]}
        assert np.isfinite(children.logp).all()
        assert (children.logp <= 1e-3).all()
