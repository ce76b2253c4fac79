"""Plans: their shape, their limits, and that a draft which is the target foresees everything."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import numpy as np
import pytest

from atspeed.engine.arrays import Float64, Int64
from atspeed.engine.model.tree_session import Selection
from atspeed.engine.search.beam_widths import BeamWidths
from atspeed.engine.search.beams import Beams
from atspeed.engine.search.plan import Plan, PlanSize, Proposal
from atspeed.engine.search.scoring import Perturbation
from atspeed.engine.search.trie import ROOT, Pruning
from draft_service.drafter import Drafter, DraftRequest
from draft_service.language_model_drafter import LanguageModelDrafter
from orchestrator.planning.sized_draft import NoDraft
from orchestrator.search.beam_loop import SearchResult, beam_search
from orchestrator.search.policies import ExactSampling, Policy, RelaxedSampling, Strict, Tolerance
from tests.bundles import write_bundle
from tests.catalogues import random_catalogue
from tests.oracles.models import ModelDraft, Models, ModelTarget

SIZE = PlanSize(beam_widths=BeamWidths.of(3), width=6, max_nodes=100)
NOISE = Perturbation(seed=3, temperature=0.8)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Models:
    return Models.load(write_bundle(tmp_path_factory.mktemp("bundle"), random_catalogue(60, (6, 5, 4, 4), seed=4)))


@asynccontextmanager
async def drafter(models: Models, role: str = "draft") -> AsyncIterator[Drafter]:
    evaluator = models.evaluator(role, memory_blocks=100)
    yield LanguageModelDrafter(evaluator)
    await evaluator.close()


def order(models: Models, **changes: object) -> DraftRequest:
    plain = DraftRequest(models.prompt(5, seed=1), Beams.root(), SIZE, Proposal.TOP, Pruning.none())
    return dataclasses.replace(plain, **changes)  # type: ignore[arg-type]


async def plan(models: Models, **changes: object) -> Plan:
    async with drafter(models) as drafting:
        return (await drafting.plan(order(models, **changes))).plan


def by_level(models: Models, plan: Plan) -> list[list[int]]:
    depths = models.catalogue.trie.depth(plan.node)
    return [plan.node[depths == depth].tolist() for depth in range(1, models.naive.levels)]


@pytest.mark.parametrize("proposal", Proposal)
@pytest.mark.parametrize("width", [1, 6, 40])
async def test_a_plan_is_closed_sorted_and_within_its_width(models: Models, proposal: Proposal, width: int) -> None:
    """Every level is as wide as asked while the catalogue has so many nodes, and only inner nodes are planned.

    Of a sample only the first 2K draws of a level are expanded, whatever their number of children.
    """
    made = await plan(models, proposal=proposal, noise=NOISE, size=PlanSize(BeamWidths.of(3), width, 1000))
    made.check(models.catalogue.trie, limit=width * models.naive.levels)
    levels = by_level(models, made)
    children = len(models.naive.children(()))
    assert len(levels[0]) == min(width, children)
    for above, below in itertools.pairwise(levels):
        children_of = [len(models.naive.children(models.naive.nodes[node])) for node in above]
        assert len(below) <= min(width, sum(children_of))
        if proposal is not Proposal.SAMPLE or len(above) <= 6:
            assert len(below) == min(width, sum(children_of))
    parents = {ROOT, *made.node.tolist()}
    assert all(int(models.catalogue.trie.parent[node]) in parents for node in made.node.tolist())


@pytest.mark.parametrize("proposal", [Proposal.TOP, Proposal.PERTURBED])
async def test_a_plan_spends_its_budget_and_stays_closed(models: Models, proposal: Proposal) -> None:
    """With shares per level and without; `check` refuses an orphan."""
    whole = await plan(models, proposal=proposal, noise=NOISE)
    for count in range(1, len(whole.node) + 1):
        for width in (SIZE.width, 100):
            size = PlanSize(SIZE.beam_widths, width, count)
            part = await plan(models, proposal=proposal, noise=NOISE, size=size)
            part.check(models.catalogue.trie, limit=count)
            assert len(part.node) == count


async def test_scores_are_the_drafts_log_probabilities_of_the_paths(models: Models) -> None:
    async with drafter(models) as drafting:
        prompt, everything = models.prompt(5, seed=1), Selection(Pruning.none(), 100)
        made = (await drafting.plan(order(models))).plan
    evaluator = models.evaluator("draft")
    evaluation, _ = await evaluator.evaluate(await evaluator.open(prompt), np.array(models.naive.inner()), everything)
    await evaluator.close()
    logp = dict(zip(evaluation.child.tolist(), evaluation.logp.tolist(), strict=True))
    for node, score in zip(made.node.tolist(), made.score.tolist(), strict=True):
        path = models.naive.nodes[node]
        total = sum(logp[models.naive.id_of[path[:end]]] for end in range(1, len(path) + 1))
        assert score == pytest.approx(total, abs=1e-4)


@pytest.mark.parametrize("proposal", Proposal)
async def test_a_plan_is_a_function_of_its_order(models: Models, proposal: Proposal) -> None:
    """The second one stands on the cache that the first one left; another seed gives another sample."""
    asked = order(models, proposal=proposal, noise=NOISE)
    async with drafter(models) as drafting:
        first, second = (await drafting.plan(asked), await drafting.plan(asked))
    assert first.plan.node.tolist() == second.plan.node.tolist()
    assert first.plan.score == pytest.approx(second.plan.score, abs=1e-4)
    assert first.passes == second.passes == models.naive.levels - 1
    other = await plan(models, proposal=proposal, noise=Perturbation(99, 0.8))
    assert (other.node.tolist() == first.plan.node.tolist()) == (proposal is Proposal.TOP)


async def test_what_is_pruned_is_never_planned(models: Models) -> None:
    catalogue, naive = models.catalogue, models.naive
    whole = await plan(models)
    gone = [item for item, path in naive.items.items() if path[:2] == naive.nodes[by_level(models, whole)[1][0]]]
    made = await plan(models, pruning=catalogue.pruning(excluded=catalogue.find(gone)))
    assert made.node.tolist() != whole.node.tolist()
    assert all(naive.alive(naive.nodes[node], gone) for node in made.node.tolist())


async def test_only_a_relaxed_order_gets_the_drafts_own_evaluation(models: Models) -> None:
    """All children of every expanded node, so that q is a whole distribution."""
    assert (await plan(models)).evaluated == {}
    made = await plan(models, proposal=Proposal.SAMPLE, noise=NOISE, with_evaluation=True)
    *expanded, _ = by_level(models, made)
    assert {ROOT, *(node for level in expanded for node in level)} == set(made.evaluated)
    for node, children in made.evaluated.items():
        assert sorted(children.node.tolist()) == models.catalogue.trie.children(node).tolist()


def beams_at(models: Models, depth: int, count: int) -> Beams:
    """Some nodes of a depth with made-up scores, in the order of their ids."""
    node = np.array([n for n in models.naive.inner() if len(models.naive.nodes[n]) == depth])[:count]
    score: Float64 = -np.arange(1.0, len(node) + 1)
    return Beams(node, score, score, score)


@pytest.mark.parametrize("depth", [1, 2, 3])
@pytest.mark.parametrize("proposal", Proposal)
async def test_a_new_plan_hangs_below_deep_beams(models: Models, depth: int, proposal: Proposal) -> None:
    """After a miss: nothing above the beams is planned again, and below the last inner level there is nothing to plan."""
    beams = beams_at(models, depth, 3)
    async with drafter(models) as drafting:
        drafted = await drafting.plan(order(models, below=beams, proposal=proposal, noise=NOISE))
    made, trie = drafted.plan, models.catalogue.trie
    made.check(trie, limit=SIZE.width * models.naive.levels)
    assert drafted.passes == models.naive.levels - 1 - depth
    assert (len(made.node) > 0) == (depth < models.naive.levels - 1)
    for node in made.node.tolist():
        assert trie.find(models.naive.nodes[node][:depth]) in beams.node


async def search(models: Models, policy: Policy, draft_role: str | None, size: PlanSize) -> tuple[SearchResult, int]:
    """One search with the real target: (result, target passes)."""
    target_model, trie, prompt = models.evaluator("target"), models.catalogue.trie, models.prompt(5, seed=1)
    selection = Selection(Pruning.none(), policy.max_children or 100, policy.noise if policy.perturbed else None)
    target = ModelTarget(target_model, prompt, selection)
    if draft_role is None:
        result = await beam_search(trie, models.rule, policy, target, NoDraft())
    else:
        async with drafter(models, draft_role) as drafting:
            relaxed = policy.proposal is Proposal.SAMPLE
            asked = order(
                models, size=size, proposal=policy.proposal, noise=policy.noise, with_evaluation=relaxed, prompt=prompt
            )
            result = await beam_search(trie, models.rule, policy, target, ModelDraft(drafting, trie, asked))
    await target_model.close()
    return result, target.passes


@pytest.mark.parametrize("width", [1, 5, 10])
async def test_a_draft_that_is_the_target_foresees_everything(models: Models, width: int) -> None:
    """One pass for the strict rule and for every seed of exact sampling: draft and target perturb alike."""
    size = PlanSize(BeamWidths.of(width), width, width * models.naive.levels)
    policies: list[Policy] = [Strict(BeamWidths.of(width)), Tolerance(BeamWidths.of(width), 0.1)]
    policies += [ExactSampling(BeamWidths.of(width), Perturbation(seed, 0.7)) for seed in range(8)]
    for policy in policies:
        result, passes = await search(models, policy, "target", size)
        assert passes == 1
        assert len(result.leaves) == width
        assert not result.memo.recovered


@pytest.mark.parametrize("width", [1, 5, 10])
async def test_a_draft_that_errs_costs_passes_and_no_list_changes(models: Models, width: int) -> None:
    """The real draft, whose weights are the target's with noise: fewer passes than levels, the same lists as alone."""
    policies: list[Policy] = [
        Strict(BeamWidths.of(width)),
        *(ExactSampling(BeamWidths.of(width), Perturbation(seed, 0.7)) for seed in range(5)),
    ]
    passes = []
    for policy in policies:
        alone, levels = await search(models, policy, None, SIZE)
        budget = 2 * width * (models.naive.levels - 1)
        drafted, needed = await search(models, policy, "draft", PlanSize(BeamWidths.of(width), 2 * width, 1000))
        best_first, _ = await search(models, policy, "draft", PlanSize(BeamWidths.of(width), budget, budget))
        assert best_first.leaves.node.tolist() == alone.leaves.node.tolist()
        assert drafted.leaves.node.tolist() == alone.leaves.node.tolist()
        assert drafted.leaves.score == pytest.approx(alone.leaves.score, abs=1e-4)
        assert levels == models.naive.levels
        passes.append(needed)
    assert np.mean(passes) < models.naive.levels - 0.5


async def test_relaxed_sampling_runs_on_real_models(models: Models) -> None:
    for seed in range(5):
        result, passes = await search(
            models,
            RelaxedSampling(BeamWidths.of(5), Perturbation(seed, 1.0)),
            "draft",
            PlanSize(BeamWidths.of(5), 10, 1000),
        )
        assert 1 <= passes <= models.naive.levels
        assert len(set(result.leaves.node.tolist())) == 5


# A plan that comes over the wire is checked before it is used.


@pytest.mark.parametrize(
    ("node", "score", "problem"),
    [
        ([1, 2, 3], [0, 0, 0], "at most 2 allowed"),
        ([1, 2], [0], "2 nodes, 1 scores"),
        ([2, 1], [0, 0], "ascending"),
        ([1, 1], [0, 0], "ascending"),
        ([0, 1], [0, 0], "inner"),
        ([-1, 1], [0, 0], "inner"),
        ([1, 10**9], [0, 0], "inner"),
        ([1, -2], [0, 0], "ascending"),
        ([1], [np.nan], "not finite"),
        ([1], [np.inf], "not finite"),
    ],
)
def test_a_plan_that_no_honest_draft_makes_is_refused(
    models: Models, node: list[int], score: list[float], problem: str
) -> None:
    made = Plan(Beams.root(), np.array(node, dtype=np.int64), np.array(score, dtype=float), np.zeros(len(node)))
    with pytest.raises(ValueError, match=problem):
        made.check(models.catalogue.trie, limit=2)


@pytest.mark.parametrize("margin", [[0.0], [0.0, 0.1], [np.nan, np.nan], [0.0, np.nan], [np.nan, 0.0], [0.0, np.inf]])
def test_margins_that_no_honest_draft_gives_are_refused(models: Models, margin: list[float]) -> None:
    """One for each node, and a child never above its parent: else a cut by them could tear the plan."""
    trie = models.catalogue.trie
    family = np.array([1, int(trie.children(1)[0])])
    with pytest.raises(ValueError, match="margins: not a number"):
        Plan(Beams.root(), family[:1], np.zeros(1), np.array([np.nan])).check(trie, limit=1)
    Plan(Beams.root(), family, np.zeros(2), np.array([0.1, 0.1])).check(trie, limit=2)
    with pytest.raises(ValueError, match="margins"):
        Plan(Beams.root(), family, np.zeros(2), np.array(margin)).check(trie, limit=2)


def test_a_plan_with_an_orphan_or_a_leaf_is_refused(models: Models) -> None:
    """An orphan could not be evaluated, and a leaf has nothing to evaluate."""
    trie, naive = models.catalogue.trie, models.naive
    orphan = next(node for node in naive.inner() if len(naive.nodes[node]) == 2)
    leaf = int(trie.level_start[trie.levels])
    for nodes, problem in (([orphan], "closed"), ([leaf], "inner")):
        made = Plan(Beams.root(), np.array(nodes), np.zeros(1), np.zeros(1))
        with pytest.raises(ValueError, match=problem):
            made.check(trie, limit=9)
    below = beams_at(models, 1, 1)
    stranger: Int64 = np.array([node for node in naive.inner() if len(naive.nodes[node]) == 2][-1:])
    with pytest.raises(ValueError, match="closed"):
        Plan(below, stranger, np.zeros(1), np.zeros(1)).check(trie, limit=9)
    Plan.empty(below).check(trie, limit=0)
