"""The loop against a naive beam search: whatever the draft plans, a strict list is the target's own."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from atspeed.engine.search.beam_widths import BeamWidths
from atspeed.engine.search.beams import Beams
from atspeed.engine.search.plan import Plan
from atspeed.engine.search.sampling import Stream, gumbel
from atspeed.engine.search.scoring import Perturbation, ScoringRule
from orchestrator.search.beam_loop import Draft, SearchResult, beam_search
from orchestrator.search.memo import Memo
from orchestrator.search.policies import ExactSampling, Policy, RelaxedSampling, Strict, Tolerance
from tests.oracles.naive_search import naive_beam_search, naive_exact_sample
from tests.oracles.naive_trie import NaiveTrie, Path
from tests.oracles.worlds import (
    Choice,
    ScriptedDraft,
    TableTarget,
    World,
    at_random,
    beam_widths,
    everything,
    naive_tries,
    nothing,
    only,
    run_now,
)
from tests.profiles import either


@dataclass(frozen=True)
class Run:
    """One search: its result and what the target was asked."""

    result: SearchResult
    passes: list[list[int]]

    @property
    def list(self) -> list[tuple[int, float]]:
        """Leaves with their scores, in order."""
        leaves = self.result.leaves
        return list(zip(leaves.node.tolist(), leaves.score.tolist(), strict=True))


def search(world: World, policy: Policy, draft: Draft | Choice, excluded: Sequence[str] = ()) -> Run:
    """One search, with everything excluded refused as the recommender does it."""
    noise = policy.noise if policy.perturbed else None
    target = TableTarget(world, world.pruning(excluded), policy.max_children, noise)
    used = ScriptedDraft(world.trie, draft) if callable(draft) else draft
    result = run_now(beam_search(world.trie, world.rule, policy, target, used))
    return Run(result, target.asked)


@st.composite
def worlds(draw: st.DrawFn) -> World:
    """Catalogues of 1 to 4 levels under every rule; coarse logits make ties."""
    naive = draw(naive_tries())
    return World.random(
        naive, draw(st.sampled_from(ScoringRule)), draw(st.integers(0, 2**32)), coarse=draw(st.booleans())
    )


@st.composite
def exclusions(draw: st.DrawFn, naive: NaiveTrie) -> list[str]:
    """Items to exclude, never all of them: an emptied catalogue is answered before the search."""
    items = sorted(naive.items)
    return draw(st.lists(st.sampled_from(items), max_size=len(items) - 1, unique=True))


@st.composite
def choices(draw: st.DrawFn) -> Choice:
    """Plans that are empty, complete, or drawn at random anew for every call, recovery passes too."""
    seed, density = draw(st.integers(0, 2**32)), draw(st.sampled_from([0.2, 0.5, 0.8]))
    chosen: Choice = draw(st.sampled_from([nothing, everything, at_random(seed, density)]))
    return chosen


def needs_a_pass(world: World, node: int) -> bool:
    """Return whether the probabilities of the children depend on the model."""
    children = world.naive.children(world.naive.nodes[node])
    return children != [-1] and (len(children) > 1 or world.rule is not ScoringRule.TRIE)


def expected_levels(world: World, widths: BeamWidths, excluded: Sequence[str]) -> list[list[tuple[Path, float]]]:
    return naive_beam_search(world.naive, world.model, widths.listed, lambda path: world.naive.alive(path, excluded))


@settings(max_examples=either(40, 200))
@given(worlds(), beam_widths, choices(), st.data())
def test_a_strict_list_is_the_naive_beam_search(
    world: World, widths: BeamWidths, choice: Choice, data: st.DataObject
) -> None:
    """THE promise: paths, order and scores are equal, with any plan, rule, widths and exclusion."""
    excluded = data.draw(exclusions(world.naive))
    run = search(world, Strict(widths), choice, excluded)
    expected = expected_levels(world, widths, excluded)[-1]
    assert [(world.naive.nodes[leaf], score) for leaf, score in run.list] == expected
    assert run.result.memo.substitutions == 0


@given(worlds(), beam_widths, choices(), st.data())
def test_no_plan_costs_a_pass_or_a_node_too_many(
    world: World, widths: BeamWidths, choice: Choice, data: st.DataObject
) -> None:
    """At most one pass per level, no node twice, and none whose only child is certain."""
    run = search(world, Strict(widths), choice, data.draw(exclusions(world.naive)))
    asked = [node for nodes in run.passes for node in nodes]
    assert len(run.passes) == run.result.memo.passes <= world.naive.levels
    assert len(asked) == len(set(asked))
    assert all(nodes == sorted(nodes) and nodes for nodes in run.passes)
    assert all(needs_a_pass(world, node) for node in asked)
    assert run.result.memo.used <= set(run.result.memo.evaluated)


@given(worlds(), beam_widths, st.data())
def test_a_plan_of_the_beams_themselves_needs_one_pass(world: World, widths: BeamWidths, data: st.DataObject) -> None:
    """The floor: prompt, beams of all levels and nothing else go through the target together."""
    excluded = data.draw(exclusions(world.naive))
    inner = expected_levels(world, widths, excluded)[1:-1]
    perfect = {world.naive.id_of[path] for level in inner for path, _ in level}
    run = search(world, Strict(widths), only(perfect), excluded)
    assert len(run.passes) == any(needs_a_pass(world, node) for node in [0, *perfect])
    assert run.result.memo.drafted <= perfect


@given(worlds(), beam_widths, st.data())
def test_without_a_plan_every_level_that_needs_one_has_a_pass(
    world: World, widths: BeamWidths, data: st.DataObject
) -> None:
    """Target-only beam search is the same loop: its passes ask for the beams, level by level.

    Below a wider level, children without a pass may fill the next one and spare it other beams.
    """
    excluded, widths = data.draw(exclusions(world.naive)), BeamWidths.of(*sorted(widths.listed))
    levels = [{world.naive.id_of[path] for path, _ in level} for level in expected_levels(world, widths, excluded)[:-1]]
    levels = [{node for node in level if needs_a_pass(world, node)} for level in levels]
    run = search(world, Strict(widths), nothing, excluded)
    assert [set(nodes) for nodes in run.passes] == [level for level in levels if level]
    assert run.result.memo.drafted == set()


@given(worlds(), beam_widths, st.sampled_from([0.0, 0.1, 1.0, 5.0]), choices(), st.data())
def test_no_policy_ever_lists_an_invalid_path(
    world: World, widths: BeamWidths, tolerance: float, choice: Choice, data: st.DataObject
) -> None:
    """Lossy or not: leaves of the catalogue, none twice, none excluded, none missing while there are enough."""
    excluded = data.draw(exclusions(world.naive))
    noise = Perturbation(data.draw(st.integers(0, 2**64)), data.draw(st.sampled_from([0.3, 1.0, 2.0])))
    for policy in (Tolerance(widths, tolerance), ExactSampling(widths, noise), RelaxedSampling(widths, noise)):
        listed = [leaf for leaf, _ in search(world, policy, choice, excluded).list]
        paths = [world.naive.nodes[leaf] for leaf in listed]
        assert all(len(path) == world.naive.levels and world.naive.alive(path, excluded) for path in paths)
        assert len(set(listed)) == len(listed)
        most = widths.at(world.naive.levels)
        assert 1 <= len(listed) <= most
        if widths.largest == 1 or world.naive.levels == 1:
            live = sum(world.naive.alive(path, excluded) for path in set(world.naive.items.values()))
            assert len(listed) == min(most, live)


@given(worlds(), beam_widths, choices(), st.integers(0, 2**64), st.sampled_from([0.3, 1.0, 2.0]), st.data())
def test_an_exact_sample_does_not_depend_on_the_draft(
    world: World, widths: BeamWidths, choice: Choice, seed: int, temperature: float, data: st.DataObject
) -> None:
    """The noise is a function of seed and path, so the list is one with any plan, scores included."""
    excluded, policy = data.draw(exclusions(world.naive)), ExactSampling(widths, Perturbation(seed, temperature))
    assert search(world, policy, choice, excluded).list == search(world, policy, nothing, excluded).list


@given(worlds(), beam_widths, choices(), st.integers(0, 2**64), st.sampled_from([0.5, 1.0, 2.0]), st.data())
def test_an_exact_sample_is_the_naive_one(
    world: World, widths: BeamWidths, choice: Choice, seed: int, temperature: float, data: st.DataObject
) -> None:
    """Stochastic beam search as its authors write it, with the same noise."""
    excluded = data.draw(exclusions(world.naive))

    def noise(path: Path) -> float:
        node = np.array([world.naive.id_of[path]])
        return float(gumbel(seed, Stream.GUMBEL, world.trie.path_hash(node))[0])

    run = search(world, ExactSampling(widths, Perturbation(seed, temperature)), choice, excluded)
    alive = partial(world.naive.alive, excluded=excluded)
    expected = naive_exact_sample(world.naive, world.model, widths.listed, alive, temperature, noise)
    assert [(world.naive.nodes[leaf], score) for leaf, score in run.list] == expected


@given(worlds(), st.lists(st.integers(0, 5), min_size=1, max_size=4), st.integers(1, 4), st.integers(0, 2**64))
def test_an_exact_sample_of_k_needs_k_beams_on_every_level_and_no_more(
    world: World, more: list[int], k: int, seed: int
) -> None:
    """Wider levels change nothing: the first k are the sample of k, whose law other tests prove."""
    noise = Perturbation(seed, 1.0)
    wider = search(world, ExactSampling(BeamWidths.of(*(k + extra for extra in more)), noise), nothing)
    assert wider.list[:k] == search(world, ExactSampling(BeamWidths.of(k), noise), nothing).list


@given(worlds(), beam_widths, st.integers(0, 2**64))
def test_scores_of_samples_are_the_targets_own(world: World, widths: BeamWidths, seed: int) -> None:
    """Noise and temperature choose; what is reported is the log-probability of the path."""
    for policy in (ExactSampling(widths, Perturbation(seed, 0.7)), RelaxedSampling(widths, Perturbation(seed, 0.7))):
        for leaf, score in search(world, policy, nothing).list:
            path, total = world.naive.nodes[leaf], 0.0
            for depth, code in enumerate(path):
                total += world.model(path[:depth], code)
            assert score == total


class _ForeignPlan:
    """A draft that plans nodes below other prefixes than it was asked about, each time the same."""

    async def plan(self, below: Beams) -> Plan:
        return Plan(below, np.array([1]), np.zeros(1), np.zeros(1))


def test_evaluated_nodes_never_change() -> None:
    """A plan that repeats a known node neither asks for it again nor changes its scores."""
    naive = NaiveTrie({"a": (0, 0, 0), "b": (1, 0, 0), "c": (1, 1, 1), "d": (1, 1, 0)}, (2, 2, 2))
    world = World.random(naive, ScoringRule.VOCAB, 3)
    run = search(world, Strict(BeamWidths.of(3)), _ForeignPlan())
    assert [node for nodes in run.passes for node in nodes].count(1) == 1
    assert [(naive.nodes[leaf], score) for leaf, score in run.list] == expected_levels(world, BeamWidths.of(3), [])[-1]


def test_memo_distinguishes_drafted_recovered_and_forced_nodes() -> None:
    """The origin of an item in the reply: the plan, a recovery pass, or a path without a choice."""
    naive = NaiveTrie({"a": (0, 0), "b": (0, 1), "c": (1, 0)}, (2, 2))
    world = World.random(naive, ScoringRule.VOCAB, 0)
    memo = search(world, Strict(BeamWidths.of(4)), only({1})).result.memo
    assert (memo.drafted, memo.recovered, memo.used) == ({1}, {2}, {0, 1, 2})
    leaves = {path: naive.id_of[path] for path in naive.items.values()}
    assert [memo.was_recovered(leaves[path]) for path in ((0, 0), (0, 1), (1, 0))] == [False, False, True]
    assert [memo.is_forced(leaves[path]) for path in ((0, 0), (0, 1), (1, 0))] == [False, False, True]
    assert not memo.is_forced(0)


@pytest.mark.parametrize("likelier", [True, False])
def test_a_beam_below_which_nothing_can_be_chosen_is_never_evaluated(likelier: bool) -> None:
    """Two beams, of which the plan held one: if both its children are above the other beam, that one's cannot matter."""
    naive = NaiveTrie({"a": (0, 0), "b": (0, 1), "c": (1, 0)}, (2, 2))
    world = World.random(naive, ScoringRule.VOCAB, 0)
    logits = np.zeros_like(world.logits)
    logits[0, :2] = (4.0, 0.0) if likelier else (1.0, 0.9)
    world = replace(world, logits=logits, log_normalizer=np.log(np.exp(logits).sum(axis=1)))
    run = search(world, Strict(BeamWidths.of(2)), only({1}))
    assert [(world.naive.nodes[leaf], score) for leaf, score in run.list] == expected_levels(
        world, BeamWidths.of(2), ()
    )[-1]
    assert run.passes == ([[0, 1]] if likelier else [[0, 1], [2]])
    assert run.result.memo.spared == (1 if likelier else 0)


@given(worlds(), beam_widths, choices(), st.integers(0, 2**64))
def test_every_beam_is_used_or_spared(world: World, widths: BeamWidths, choice: Choice, seed: int) -> None:
    """A spared beam has no child among the beams of the search that evaluates everything."""
    for policy in (Strict(widths), ExactSampling(widths, Perturbation(seed, 1.0))):
        memo, whole = (search(world, policy, chosen).result.memo for chosen in (choice, everything))
        assert memo.used <= whole.used
        assert len(memo.used) + memo.spared == len(whole.used) + whole.spared
        spared = {int(node) for node in whole.used - memo.used}
        assert not any(int(world.trie.parent[node]) in spared for node in whole.used if node)


def test_a_failing_target_fails_the_search() -> None:
    """No policy turns a target's error into a shorter list."""

    class Broken:
        async def evaluate(self, nodes: object) -> None:
            raise ConnectionError("gone")

    naive = NaiveTrie({"a": (0, 0), "b": (0, 1)}, (1, 2))
    world = World.random(naive, ScoringRule.VOCAB, 0)
    draft = ScriptedDraft(world.trie, nothing)
    with pytest.raises(ConnectionError):
        run_now(beam_search(world.trie, world.rule, Strict(BeamWidths.of(1)), Broken(), draft))  # type: ignore[arg-type]


@given(naive_tries())
def test_the_memo_knows_ended_paths_by_itself_and_under_rule_trie_single_children(naive: NaiveTrie) -> None:
    world = World.random(naive, ScoringRule.TRIE, 0)
    trie, vocab = Memo(world.trie, ScoringRule.TRIE), Memo(world.trie, ScoringRule.VOCAB)
    for node in naive.inner():
        assert trie.knows(node) == (len(naive.children(naive.nodes[node])) == 1)
        assert vocab.knows(node) == naive.has_ended(naive.nodes[node])
    for node, children in trie.evaluated.items():
        honest = dict(world.evaluate(np.array([node]), world.pruning([]), 9).items())[node]
        assert (children.node.tolist(), children.logp.tolist()) == (honest.node.tolist(), honest.logp.tolist())
        assert children.log_mass == honest.log_mass
