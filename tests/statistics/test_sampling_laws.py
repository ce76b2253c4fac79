"""The policies' promises: laws of samples against enumerated ones, and the bound of the tolerance.

On multiple testing: seeds are the numbers from 0, and the statistics were written down before they were first computed.
A p-value is a function of the code alone; one below its threshold means that the code draws from another law.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given
from hypothesis import strategies as st

from atspeed.engine.arrays import Int64
from atspeed.engine.search import search_rules
from atspeed.engine.search.beam_widths import BeamWidths
from atspeed.engine.search.beams import (
    Beams,
    children_by_gumbel,
    children_by_score,
    level_log_distribution,
    sample_without_replacement,
)
from atspeed.engine.search.plan import Plan
from atspeed.engine.search.sampling import Stream
from atspeed.engine.search.scoring import Children, Perturbation, ScoringRule
from atspeed.engine.search.search_rules import EvaluatedNodes
from orchestrator.search.beam_loop import Draft
from orchestrator.search.policies import ExactSampling, Policy, RelaxedSampling, Strict
from tests.oracles.naive_search import (
    draws_without_replacement,
    level_by_level_sets,
    path_law,
    relaxed_rule,
)
from tests.oracles.naive_trie import NaiveTrie, Path
from tests.oracles.policies import NAIVE, RAGGED, search
from tests.oracles.statistics import chi_square_p, detectable_effect, same_law_p
from tests.oracles.worlds import ScriptedDraft, World, at_random, everything, naive_tries, nothing, run_now
from tests.profiles import either

SIGNIFICANT = 0.01
SEEDS = either(1_200, 20_000)
RELAXED_SEEDS = either(500, 1_500)


def test_laws_find_small_differences() -> None:
    """Effect sizes that a chi-square over these draws finds in 99 of 100 cases; 0.1 is a small effect, 0.3 a medium one.

    The lists have at most 7 first places and 21 sets of two.
    """
    assert detectable_effect(SEEDS, 7, SIGNIFICANT) < 0.18
    assert detectable_effect(RELAXED_SEEDS, 21, SIGNIFICANT / 3) < 0.34


def lists(
    world: World, policies: Iterable[Policy], draft: Draft, excluded: Sequence[str] = ()
) -> list[tuple[Path, ...]]:
    """The list of every policy, as paths."""

    pruning = world.pruning(excluded)

    async def run() -> list[tuple[Path, ...]]:
        leaves = [(await search(world, policy, draft, pruning)).leaves for policy in policies]
        return [tuple(world.paths(listed.node)) for listed in leaves]

    return run_now(run())


@pytest.mark.parametrize(
    ("policy", "builder"),
    [
        (Strict(BeamWidths.of(3)), "children_by_score"),
        (ExactSampling(BeamWidths.of(3), Perturbation(1, 1.0)), "children_by_gumbel"),
    ],
)
def test_the_children_of_an_evaluated_level_are_built_once(
    policy: Policy, builder: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Asking what is missing once built them all too, only to find that nothing was."""
    built: list[int] = []
    build = getattr(search_rules, builder)

    def counted(*arguments: Any) -> Beams:
        children: Beams = build(*arguments)
        built.append(len(children))
        return children

    monkeypatch.setattr(search_rules, builder, counted)
    world = World.random(NAIVE, ScoringRule.VOCAB, seed=5)
    run_now(search(world, policy, ScriptedDraft(world.trie, everything)))
    assert sum(count > 0 for count in built) == NAIVE.levels


# Exact sampling


@dataclass(frozen=True)
class _Everything:
    """A draft with one plan, made once."""

    below_root: Plan

    async def plan(self, below: Beams) -> Plan:
        return self.below_root


@pytest.mark.parametrize(
    ("naive", "rule", "temperature", "excluded"),
    [
        (NAIVE, ScoringRule.VOCAB, 1.0, ()),
        (NAIVE, ScoringRule.TRIE, 0.6, ("b", "d", "f")),
        (RAGGED, ScoringRule.CODES, 0.8, ("e",)),
    ],
)
def test_an_exact_sample_has_the_law_of_draws_without_replacement(
    naive: NaiveTrie, rule: ScoringRule, temperature: float, excluded: tuple[str, ...]
) -> None:
    """Four statistics of lists of three, over many seeds, against the enumerated law.

    The first place; the ordered pair of the first two; the set of all three; and each path's inclusion in the list,
    whose seven tests share one threshold (Bonferroni). The law is the product of the steps' probabilities, at the
    temperature and renormalised over the children that the request leaves alive. The draft plans everything, which
    makes one pass of three and changes no list (held by the next test and in test_beam_loop).
    """
    world = World.random(naive, rule, seed=5)
    draft = _Everything(run_now(ScriptedDraft(world.trie, everything).plan(Beams.root())))
    policies = (ExactSampling(BeamWidths.of(3), Perturbation(seed, temperature)) for seed in range(SEEDS))
    drawn = lists(world, policies, draft, excluded)

    law = path_law(naive, world.model, temperature, lambda path: naive.alive(path, excluded))
    assert 4 <= len(law) <= 7
    triples = draws_without_replacement(law, 3)
    sets: defaultdict[frozenset[Path], float] = defaultdict(float)
    inclusion: defaultdict[Path, float] = defaultdict(float)
    for draw, probability in triples.items():
        sets[frozenset(draw)] += probability
        for path in draw:
            inclusion[path] += probability

    assert chi_square_p(Counter(draw[0] for draw in drawn), law) > SIGNIFICANT
    assert chi_square_p(Counter(draw[:2] for draw in drawn), draws_without_replacement(law, 2)) > SIGNIFICANT
    assert chi_square_p(Counter(frozenset(draw) for draw in drawn), sets) > SIGNIFICANT
    included = Counter(path for draw in drawn for path in draw)
    for path, probability in inclusion.items():
        observed = Counter({True: included[path], False: SEEDS - included[path]})
        assert chi_square_p(observed, {True: probability, False: 1 - probability}) > SIGNIFICANT / len(inclusion)


@pytest.mark.parametrize("excluded", [(), ("b", "d", "f")])
def test_a_draft_of_random_nodes_changes_no_exact_sample(excluded: tuple[str, ...]) -> None:
    """For every seed of the first ones: the same list without a plan, with random ones and with all nodes planned."""
    world = World.random(NAIVE, ScoringRule.VOCAB, seed=5)
    policies = [ExactSampling(BeamWidths.of(3), Perturbation(seed, 0.8)) for seed in range(either(50, 150))]
    alone = lists(world, policies, ScriptedDraft(world.trie, nothing), excluded)
    for choice in (at_random(11, 0.5), everything):
        assert lists(world, policies, ScriptedDraft(world.trie, choice), excluded) == alone


def test_wider_exact_samples_begin_with_the_narrower_ones() -> None:
    """One seed's sample of three is the beginning of its sample of five: beams are an exact prefix of the same draw."""
    world, draft = World.random(NAIVE, ScoringRule.VOCAB, seed=5), ScriptedDraft(NAIVE_TRIE, everything)
    wide, narrow = (
        lists(world, [ExactSampling(BeamWidths.of(width), Perturbation(seed, 1.0)) for seed in range(50)], draft)
        for width in (5, 3)
    )
    assert [draw[:3] for draw in wide] == narrow


def test_an_exact_sample_of_everything_is_everything() -> None:
    """Also where one path takes nearly all of the probability: at temperature 0.05 perturbed scores span hundreds."""
    world, draft = World.random(NAIVE, ScoringRule.VOCAB, seed=5), ScriptedDraft(NAIVE_TRIE, nothing)
    for drawn in lists(world, [ExactSampling(BeamWidths.of(9), Perturbation(seed, 0.05)) for seed in range(50)], draft):
        assert sorted(drawn) == sorted(set(NAIVE.items.values()))


@given(naive_tries(), st.integers(0, 2**64), st.sampled_from([0.01, 0.5, 1.0, 100.0]))
def test_perturbed_scores_fall_from_parent_to_child(naive: NaiveTrie, seed: int, temperature: float) -> None:
    """The best child inherits its parent's perturbed score exactly, the others lie below: what cutting a plan relies on."""
    world, noise = World.random(naive, ScoringRule.VOCAB, seed), Perturbation(seed, temperature)
    inner = np.array(naive.inner())
    nodes = EvaluatedNodes(world.trie, world.rule)
    nodes.evaluated |= world.evaluate(inner, world.pruning([]), 100, noise).items()
    beams = Beams.root()
    for _ in range(naive.levels):
        below = children_by_gumbel(world.trie, nodes.known(beams), nodes.evaluated, noise)
        assert np.isfinite(below.priority).all()
        for node, priority in zip(beams.node.tolist(), beams.priority.tolist(), strict=True):
            children = below.priority[world.trie.parent[below.node] == node]
            assert children.max() == priority
        beams = below


# Relaxed sampling


@dataclass
class SamplingDraft:
    """Draft that plans N nodes per level, drawn with the request's noise from the softmax of a table's scores, with q."""

    world: World
    width: int
    noise: Perturbation

    async def plan(self, below: Beams) -> Plan:
        """Below any beams."""
        trie, frontier = self.world.trie, below
        evaluated: dict[int, Children] = {}
        levels: list[Beams] = []
        depth = int(trie.depth(below.node[:1])[0])
        for _ in range(depth, trie.levels - 1):
            asked = np.sort(frontier.node)
            evaluated |= dict(self.world.evaluate(asked, self.world.pruning([]), 100).items())
            candidates = children_by_score(frontier, evaluated)
            log_q, seed = level_log_distribution(candidates, self.noise.temperature), self.noise.seed
            rows = sample_without_replacement(
                trie, candidates.node, log_q, self.width, seed=seed, stream=Stream.PROPOSAL
            )
            frontier = candidates.take(rows)
            levels.append(frontier)
        node = np.concatenate([np.empty(0, dtype=np.int64), *(level.node for level in levels)])
        score = np.concatenate([np.empty(0), *(level.score for level in levels)])
        order = np.argsort(node)
        plan = Plan(below, node[order], score[order], np.full(len(node), np.inf), evaluated)
        plan.check(trie, limit=trie.nodes)
        return plan


def drafted_lists(
    target: World, draft: World, policies: Iterable[RelaxedSampling], proposals: int
) -> list[tuple[Path, ...]]:
    """The list of every policy, as paths, with a draft that draws with the same noise."""

    async def run() -> list[tuple[Path, ...]]:
        found = [await search(target, policy, SamplingDraft(draft, proposals, policy.noise)) for policy in policies]
        return [tuple(target.paths(result.leaves.node)) for result in found]

    return run_now(run())


def relaxed(width: int, seeds: int, temperature: float = 1.0) -> list[RelaxedSampling]:
    return [RelaxedSampling(BeamWidths.of(width), Perturbation(seed, temperature)) for seed in range(seeds)]


@pytest.mark.parametrize(("naive", "temperature"), [(NAIVE, 1.0), (NAIVE, 0.5), (RAGGED, 1.0)])
def test_without_a_plan_every_level_is_an_exact_draw_from_p(naive: NaiveTrie, temperature: float) -> None:
    """Lists of two as sets, over many seeds, against the law of drawing level by level."""
    world = World.random(naive, ScoringRule.VOCAB, seed=5)
    drawn = lists(world, relaxed(2, RELAXED_SEEDS, temperature), ScriptedDraft(world.trie, nothing))
    law = level_by_level_sets(naive, world.model, temperature, 2)
    assert chi_square_p(Counter(frozenset(draw) for draw in drawn), law) > SIGNIFICANT


def test_a_low_temperature_still_fills_the_list() -> None:
    """At temperature 0.01 all probabilities but the best underflow; their logs keep an order and can be drawn."""
    world = World.random(NAIVE, ScoringRule.VOCAB, seed=5)
    draft = ScriptedDraft(world.trie, nothing)
    for seed in range(20):
        result = run_now(search(world, RelaxedSampling(BeamWidths.of(5), Perturbation(seed, 0.001)), draft))
        assert len(result.leaves) == 5


def test_a_draft_that_is_the_target_is_always_accepted() -> None:
    """q = p and everything planned: every ratio is at least 1, so one pass is enough, for any seed."""
    world = World.random(NAIVE, ScoringRule.VOCAB, seed=5)

    async def run() -> None:
        for policy in relaxed(3, 50):
            draft = SamplingDraft(world, 100, policy.noise)
            result = await search(world, policy, draft)
            assert result.memo.passes == 1
            assert len(result.leaves) == 3

    run_now(run())


@pytest.mark.parametrize("proposals", [3, 5, 9])
def test_a_draft_that_is_the_target_leaves_its_law(proposals: int) -> None:
    """q = p: drawing more than K and keeping the first K is drawing K. Three cases, a third of the threshold each."""
    world = World.random(NAIVE, ScoringRule.VOCAB, seed=5)
    drawn = drafted_lists(world, world, relaxed(2, RELAXED_SEEDS), proposals)
    law = level_by_level_sets(NAIVE, world.model, 1.0, 2)
    assert chi_square_p(Counter(frozenset(draw) for draw in drawn), law) > SIGNIFICANT / 3


@pytest.mark.parametrize("planned", [1, 2, 3])
def test_an_exhausted_residual_is_filled_from_p(planned: int) -> None:
    """q = p leaves a residual of zeros where fewer nodes were planned than are asked for."""
    world = World.random(NAIVE, ScoringRule.VOCAB, seed=5)

    async def run() -> None:
        for policy in relaxed(4, 40):
            draft = SamplingDraft(world, planned, policy.noise)
            result = await search(world, policy, draft)
            assert len(result.leaves) == 4
            assert result.leaves.score.tolist() == sorted(result.leaves.score.tolist(), reverse=True)

    run_now(run())


def test_plan_without_evaluations_is_no_proposal() -> None:
    """Without the draft's evaluation there is no q: the level is drawn from p, as without a plan."""
    world = World.random(NAIVE, ScoringRule.VOCAB, seed=5)
    policies = relaxed(3, 50)
    blind = lists(world, policies, ScriptedDraft(world.trie, everything))
    assert blind == lists(world, policies, ScriptedDraft(world.trie, nothing))


# One level that decides, and a forced one below: five paths, p and q far apart.
ONE_LEVEL = NaiveTrie({name: (code, 0) for code, name in enumerate("abcde")}, (5, 1))
NAIVE_TRIE = World.random(NAIVE, ScoringRule.VOCAB, seed=5).trie


@pytest.mark.parametrize(("width", "proposals"), [(1, 1), (1, 3), (2, 3), (2, 4), (3, 3)])
def test_relaxed_sampling_follows_its_written_rule(width: int, proposals: int) -> None:
    """Accept by u <= p / q, keep the first K of the accepted, else fill from the residual.

    Loss included: this is the rule's law and not p's. Five cases, so each has a fifth of the threshold.
    """
    target, other = (World.random(ONE_LEVEL, ScoringRule.TRIE, seed) for seed in (1, 2))
    p, q = (_first_level(world) for world in (target, other))
    assert np.abs(p - q).sum() > 0.5
    ours = drafted_lists(target, other, relaxed(width, RELAXED_SEEDS), proposals)
    rng = np.random.default_rng(4)
    theirs = Counter(relaxed_rule(rng, p, q, proposals, width) for _ in range(4 * RELAXED_SEEDS))
    assert same_law_p(Counter(frozenset(path[0] for path in draw) for draw in ours), theirs) > SIGNIFICANT / 5


def test_one_proposal_of_one_is_drawn_from_p() -> None:
    """K = N = 1 is ordinary speculative sampling, the one case in which the rule keeps the target's law."""
    target, other = (World.random(ONE_LEVEL, ScoringRule.TRIE, seed) for seed in (1, 2))
    drawn = Counter(draw[0][0] for draw in drafted_lists(target, other, relaxed(1, either(500, 2_000)), 1))
    assert chi_square_p(drawn, dict(enumerate(_first_level(target).tolist()))) > SIGNIFICANT


def _first_level(world: World) -> npt.NDArray[np.float64]:
    return np.exp([world.model((), code) for code in world.naive.children(())])


@pytest.mark.parametrize("stream", [Stream.PROPOSAL, Stream.RESIDUAL])
def test_sampling_without_replacement_has_its_law(stream: Stream) -> None:
    """Ordered pairs of four weights, one of them zero, over many seeds."""
    probability = np.array([0.5, 0.0, 0.3, 0.2])
    node = np.array([1, 2, 3, 4])
    law = draws_without_replacement({(0,): 0.5, (2,): 0.3, (3,): 0.2}, 2)
    drawn = Counter(
        tuple((row,) for row in _draw(node, probability, 2, seed, stream).tolist())
        for seed in range(either(2_000, 10_000))
    )
    assert chi_square_p(drawn, law) > SIGNIFICANT
    assert sorted(_draw(node, probability, 9, 0, stream).tolist()) == [0, 2, 3]
    assert _draw(node, probability, 0, 0, stream).tolist() == []


def _draw(node: Int64, probability: npt.NDArray[np.float64], count: int, seed: int, stream: Stream) -> Int64:
    with np.errstate(divide="ignore"):
        log_weight = np.log(probability)
    return sample_without_replacement(NAIVE_TRIE, node, log_weight, count, seed=seed, stream=stream)
