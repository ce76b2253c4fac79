"""The best-first plan against its definition, on random catalogues with tables in place of the draft."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from types import SimpleNamespace
from typing import Any

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from atspeed.engine.arrays import Int64
from atspeed.engine.model.pass_stats import PassStats
from atspeed.engine.model.tree_session import Found, PassProgram, Selection
from atspeed.engine.search.beam_widths import BeamWidths
from atspeed.engine.search.beams import Beams, children_by_gumbel, children_by_score
from atspeed.engine.search.plan import Plan, PlanSize, Proposal, Shortlist, free_nodes
from atspeed.engine.search.scoring import Evaluation, Perturbation, ScoringRule
from atspeed.engine.search.trie import ROOT, Pruning
from draft_service.drafter import DraftRequest
from draft_service.language_model_drafter import LanguageModelDrafter
from orchestrator.search.beam_loop import beam_search
from orchestrator.search.policies import ExactSampling, Policy, Strict
from tests.oracles.models import ModelDraft
from tests.oracles.naive_plan import NaivePlan, naive_plan, never_needs_a_pass
from tests.oracles.naive_search import naive_beam_search
from tests.oracles.naive_trie import NaiveTrie, Path
from tests.oracles.worlds import (
    ScriptedDraft,
    TableTarget,
    World,
    beam_widths,
    naive_tries,
    nothing,
    run_now,
    run_steps,
)
from tests.profiles import either

AMPLE = 1_000
NOISE = Perturbation(seed=5, temperature=0.8)


@dataclass
class TableEvaluator:
    """A TreeEvaluator that looks its answers up. asked: the nodes of every pass."""

    world: World
    scales: Sequence[float] | None = None
    asked: list[list[int]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.trie, self.rule = self.world.trie, self.world.rule
        self.entry = SimpleNamespace(plan_scale=None if self.scales is None else tuple(self.scales))

    async def open(self, prompt: Int64, *, tenant: str = "", user_key: bytes = b"") -> None:
        """Nothing has to be opened."""

    def end(self, tree: None) -> None:
        """Or closed."""

    async def run_steps(self, tree: None, steps: PassProgram[Found], selection: Selection) -> tuple[Found, PassStats]:
        """Pass after pass."""
        return run_steps(steps, lambda nodes: self._evaluate(nodes, selection)), PassStats()

    def _evaluate(self, nodes: Int64, selection: Selection) -> Evaluation:
        """One pass, over nodes that none has seen and whose parents one has."""
        seen = {node for asked in self.asked for node in asked}
        assert nodes.tolist() == sorted(set(nodes.tolist()) - seen)
        assert 0 < len(nodes) == len(set(nodes.tolist()) & set(self.world.naive.inner()))
        assert {int(self.trie.parent[node]) for node in nodes.tolist() if node != ROOT} <= seen | set(nodes.tolist())
        self.asked.append(nodes.tolist())
        return self.world.evaluate(nodes, selection.pruning, selection.limit, selection.perturbation)


@dataclass(frozen=True)
class Case:
    """A catalogue with a draft's table over it, what is excluded, how much to plan and in which units."""

    world: World
    excluded: list[str]
    size: PlanSize
    scales: list[float]
    proposal: Proposal

    @property
    def pruning(self) -> Pruning:
        return self.world.pruning(self.excluded)

    @property
    def order(self) -> DraftRequest:
        prompt = np.array([1], dtype=np.int64)
        return DraftRequest(prompt, Beams.root(), self.size, self.proposal, self.pruning, NOISE)

    def free(self, path: Path) -> bool:
        return never_needs_a_pass(self.world.naive, self.world.rule, path)

    def alive(self, path: Path) -> bool:
        return self.world.naive.alive(path, self.excluded)

    @property
    def inner(self) -> list[Path]:
        """All live inner paths below the root that the target can be asked for."""
        naive = self.world.naive
        paths = (naive.nodes[node] for node in naive.inner() if node != ROOT)
        return [path for path in paths if self.alive(path) and not self.free(path)]

    @property
    def plannable(self) -> list[Path]:
        """Those of the levels that are asked for."""
        return [path for path in self.inner if len(path) <= self.size.last_depth(self.world.trie, 0)]


@st.composite
def cases(draw: st.DrawFn, proposals: Sequence[Proposal] = (Proposal.TOP, Proposal.PERTURBED)) -> Case:
    """Every rule; coarse logits make ties; budgets from one node to more than there are, on all levels or the first few."""
    naive = draw(naive_tries(levels=(2, 3, 4), max_items=30))
    world = World.random(
        naive, draw(st.sampled_from(ScoringRule)), draw(st.integers(0, 2**32)), coarse=draw(st.booleans())
    )
    items = sorted(naive.items)
    excluded = draw(st.lists(st.sampled_from(items), max_size=min(len(items) - 1, 4), unique=True))
    max_nodes = draw(st.integers(1, 20))
    width = draw(st.sampled_from([1, 2, 5, max_nodes, AMPLE]))
    size = PlanSize(draw(beam_widths), width, max_nodes, draw(st.none() | st.integers(1, naive.levels)))
    scales = draw(st.lists(st.sampled_from([0.25, 1.0, 3.0]), min_size=naive.levels - 1, max_size=naive.levels - 1))
    return Case(world, excluded, size, scales, draw(st.sampled_from(list(proposals))))


def drafted(case: Case, below: Beams | None = None) -> tuple[Plan, list[list[int]]]:
    """The drafter's plan, checked as the orchestrator does, and what its passes read."""
    evaluator = TableEvaluator(case.world, case.scales)
    order = case.order if below is None else DraftRequest(**{**vars(case.order), "below": below})
    made = run_now(LanguageModelDrafter(evaluator).plan(order))  # type: ignore[arg-type]
    made.plan.check(case.world.trie, limit=case.size.max_nodes)
    assert made.passes == len(evaluator.asked)
    return made.plan, evaluator.asked


def whole_tree(case: Case, start: Beams) -> dict[int, Beams]:
    """Every live node below some beams as a beam of its own."""
    trie, noise = case.world.trie, NOISE if case.proposal is Proposal.PERTURBED else None
    found, level = {int(node): start.take(np.array([row])) for row, node in enumerate(start.node)}, start
    for _ in range(int(trie.depth(start.node[:1])[0]), trie.levels - 1):
        known = dict(case.world.evaluate(np.sort(level.node), case.pruning, AMPLE, noise).items())
        level = children_by_gumbel(trie, level, known, noise) if noise else children_by_score(level, known)
        found |= {int(node): level.take(np.array([row])) for row, node in enumerate(level.node)}
    return found


def by_definition(case: Case, start: Beams) -> NaivePlan:
    nodes = case.world.naive.nodes
    priority = {nodes[node]: float(beam.priority[0]) for node, beam in whole_tree(case, start).items()}
    return naive_plan(case.world.naive, case.world.paths(start.node), priority, case.size, case.scales, case.free)


@given(st.lists(st.integers(0, 3), min_size=1, max_size=12), st.data())
def test_the_best_of_some_rows_are_those_that_sorting_would_take(scores: list[int], data: st.DataObject) -> None:
    """Ties included, which the node's id decides."""
    count, priority = len(scores), np.array(scores, dtype=np.float64)
    node = np.array(data.draw(st.permutations(range(count))))
    rows = np.array(sorted(data.draw(st.sets(st.integers(0, count - 1)))), dtype=np.int64)
    width, some = data.draw(st.integers(0, count + 1)), Beams(node, priority, priority, priority)
    assert sorted(node[some.best_among(rows, width)]) == sorted(some.take(rows).best(width).node)


@settings(max_examples=either(80, 400))
@given(cases())
def test_plan_matches_its_definition(case: Case) -> None:
    """The nodes, and what was expanded on the way to them: nothing that had been cut already."""
    plan, asked = drafted(case)
    expected = by_definition(case, Beams.root())
    assert (case.world.paths(plan.node), plan.margin.tolist()) == (expected.planned, expected.margins)
    assert [case.world.paths(np.array(nodes)) for nodes in asked] == expected.expanded


@settings(max_examples=either(40, 200))
@given(cases(), st.data())
def test_plan_below_deep_beams_matches_its_definition(case: Case, data: st.DataObject) -> None:
    """After a miss, with the target's scores at the start in place of the draft's."""
    depth = data.draw(st.integers(1, case.world.naive.levels - 1))
    there = [path for path in case.inner if len(path) == depth]
    if not there:
        return
    paths = data.draw(st.lists(st.sampled_from(there), min_size=1, max_size=4, unique=True))
    node = np.array(sorted(case.world.naive.id_of[path] for path in paths))
    score = -np.arange(1.0, len(node) + 1)
    start = Beams(node, score, score, score - 0.5)
    plan, asked = drafted(case, start)
    expected = by_definition(case, start)
    assert (case.world.paths(plan.node), plan.margin.tolist()) == (expected.planned, expected.margins)
    assert len(asked) == (len(expected.expanded) if depth < case.world.naive.levels - 1 else 0)


@given(cases())
def test_a_plan_may_be_cut_anywhere_by_its_margins(case: Case) -> None:
    """The first nodes by margin, in a tie by node, hang together; as every smaller plan has to."""
    plan, _ = drafted(case)
    order = np.argsort(-plan.margin, kind="stable")
    for count in range(len(order)):
        plan.take(np.sort(order[:count])).check(case.world.trie, limit=count)


@given(cases())
def test_the_budget_is_spent_to_the_last_node(case: Case) -> None:
    """Without shares of levels a plan has as many nodes as asked for, or all that there are, and expands no more."""
    best_first = Case(case.world, case.excluded, _without_shares(case.size), case.scales, case.proposal)
    plan, asked = drafted(best_first)
    assert len(plan.node) == min(case.size.max_nodes, len(case.plannable))
    assert sum(map(len, asked)) <= 1 + sum(min(case.size.max_nodes, size) for size in _level_sizes(case))
    assert all(len(nodes) <= case.size.max_nodes for nodes in asked)


@given(cases())
def test_an_ample_budget_lists_every_level_whole(case: Case) -> None:
    """All that is alive and that the target can be asked for."""
    ample = replace(case, size=replace(case.size, width=AMPLE, max_nodes=AMPLE))
    plan, _ = drafted(ample)
    assert case.world.paths(plan.node) == case.plannable


@given(cases(proposals=[Proposal.TOP]), st.integers(0, 6))
def test_a_draft_that_agrees_with_the_target_is_never_wrong(case: Case, more: int) -> None:
    """The draft's own K beams of every level are planned, whatever the scales, in shares per level and without.

    Its N best of a level, N > K, need not hold them: a node may be good enough below a parent that is not.
    """
    naive, levels, widths = case.world.naive, case.world.naive.levels, case.size.beam_widths
    own = naive_beam_search(naive, case.world.model, widths.listed, case.alive)[1:-1]
    expected = {path for level in own for path, _ in level if not case.free(path)}
    width, room = widths.largest + more, sum(widths.at(level) for level in range(1, levels)) + more
    for size in (PlanSize(widths, width, width * (levels - 1)), PlanSize(widths, AMPLE, room)):
        plan, _ = drafted(Case(case.world, case.excluded, size, case.scales, case.proposal))
        assert expected <= set(case.world.paths(plan.node))
        assert size.width == AMPLE or np.bincount(case.world.trie.depth(plan.node), minlength=1).max() <= width


@given(cases(proposals=[Proposal.TOP]), st.integers(1, 6))
def test_a_plan_of_k_per_level_is_the_drafts_beam_search(case: Case, width: int) -> None:
    """Nothing else has a place in it, unless a beam needs no pass."""
    levels = case.world.naive.levels
    size = PlanSize(BeamWidths.of(width), width, width * (levels - 1))
    plan, _ = drafted(Case(case.world, case.excluded, size, case.scales, case.proposal))
    own = naive_beam_search(case.world.naive, case.world.model, [width], case.alive)[1:-1]
    beams = {path for level in own for path, _ in level}
    planned = set(case.world.paths(plan.node))
    assert {path for path in beams if not case.free(path)} <= planned
    assert planned <= beams or any(map(case.free, beams))


@given(cases(proposals=[Proposal.SAMPLE]))
def test_a_sample_keeps_within_its_budget(case: Case) -> None:
    """Level for level an equal share, and no more in all than asked for, however small that is; 2K of a level are expanded."""
    plan, asked = drafted(case)
    assert all(len(nodes) <= 2 * case.size.beam_widths.at(level) for level, nodes in enumerate(asked[1:], start=1))
    share = max(1, case.size.max_nodes // case.size.last_depth(case.world.trie, 0))
    assert np.bincount(case.world.trie.depth(plan.node)).max() <= min(share, case.size.width)


@given(cases(proposals=[Proposal.SAMPLE]))
def test_a_sample_says_all_that_the_draft_knew(case: Case) -> None:
    """All live children of every node that was expanded, those whose path has ended included: q is a whole distribution."""
    order = replace(case.order, with_evaluation=True)
    plan = run_now(LanguageModelDrafter(TableEvaluator(case.world)).plan(order)).plan  # type: ignore[arg-type]
    depth = case.world.trie.depth(plan.node)
    expanded = {ROOT, *plan.node[depth < case.size.last_depth(case.world.trie, 0)].tolist()}
    assert set(plan.evaluated) <= expanded
    for node, children in plan.evaluated.items():
        path = case.world.naive.nodes[node]
        live = {code for code in case.world.naive.children(path) if case.alive((*path, code))}
        assert {code for *_, code in case.world.paths(children.node)} == live
        for child, logp in zip(case.world.paths(children.node), children.logp.tolist(), strict=True):
            assert logp == case.world.model(path, child[-1])


@given(naive_tries(), st.sampled_from(ScoringRule))
def test_free_nodes_are_those_with_one_path_below(naive: NaiveTrie, rule: ScoringRule) -> None:
    """Under rule `trie`; under the others every node has to be evaluated that has children."""
    world = World.random(naive, rule, 0)
    free = free_nodes(world.trie, rule)
    expected = [never_needs_a_pass(naive, rule, path) for path in naive.nodes]
    assert free.tolist() == expected


def test_a_forced_tail_neither_costs_nor_hides_a_node() -> None:
    """Rule `trie`: one path each below (0,) and (1,), which take places among the beams, and a choice below (2,)."""
    naive = NaiveTrie({"a": (0, 0, 0), "b": (1, 0, 0), "c": (2, 0, 0), "d": (2, 0, 1), "e": (2, 1, 0)}, (3, 2, 2))
    world = World.random(naive, ScoringRule.TRIE, 0)
    for count in (1, 2):
        plan, _ = drafted(Case(world, [], PlanSize(BeamWidths.of(3), count, count), [1.0, 1.0], Proposal.TOP))
        assert world.paths(plan.node) == [(2,), (2, 0)][:count]
    evaluated, _ = drafted(
        Case(World.random(naive, ScoringRule.VOCAB, 0), [], PlanSize(BeamWidths.of(3), 9, 9), [1, 1], Proposal.TOP)
    )
    assert len(evaluated.node) == 7


def test_a_forced_tail_keeps_its_place_among_the_beams_of_every_level() -> None:
    """The only beam of the search passes through it, so all nodes below the other one have to exceed its score."""
    naive = NaiveTrie({"a": (0, 0, 0, 0), "b": (1, 0, 0, 0), "c": (1, 1, 0, 0), "d": (1, 1, 0, 1)}, (2, 2, 1, 2))
    trie = World.random(naive, ScoringRule.TRIE, 0).trie
    free, listed = free_nodes(trie, ScoringRule.TRIE), Shortlist.of(Beams.root())
    size = PlanSize(BeamWidths.of(1), 9, 9)
    for paths, scores in (([(0,), (1,)], [-1.0, -2.0]), ([(1, 0), (1, 1)], [-4.0, -3.0]), ([(1, 1, 0)], [-3.0])):
        score = np.array(scores)
        children = Beams(np.array([naive.id_of[path] for path in paths]), score, score, score)
        listed = listed.grown(trie, children, size, 1.0, free)
    assert [naive.nodes[node] for node in listed.beams.node.tolist()] == [(), (1,), (1, 1), (1, 1, 0)]
    assert listed.margin.tolist() == [np.inf, -1.0, -2.0, -2.0]


def test_the_scale_of_a_level_draws_nodes_to_it() -> None:
    """Nodes below the threshold are more probable beams on a level where the draft errs more."""
    naive = NaiveTrie({f"{a}{b}": (a, b, 0) for a in range(4) for b in range(4)}, (4, 4, 1))
    world = World.random(naive, ScoringRule.VOCAB, 1)
    deep = []
    for scale in (0.1, 1.0, 10.0):
        plan, _ = drafted(Case(world, [], PlanSize(BeamWidths.of(2), 10, 10), [1.0, scale], Proposal.TOP))
        deep.append(int((world.trie.depth(plan.node) == 2).sum()))
    assert deep == sorted(deep)
    assert deep[0] < deep[-1]


@st.composite
def policies(draw: st.DrawFn) -> Policy:
    width = draw(st.integers(1, 6))
    both: list[Policy] = [Strict(BeamWidths.of(width)), ExactSampling(BeamWidths.of(width), NOISE)]
    return draw(st.sampled_from(both))


@settings(max_examples=either(40, 200))
@given(cases(), policies(), st.integers(0, 2**32))
def test_no_plan_size_changes_a_list(case: Case, policy: Policy, seed: int) -> None:
    """A draft with another table than the target's, or the same one: lists are the target's own, score for score."""
    truth = World.random(case.world.naive, case.world.rule, seed)
    noise = policy.noise if policy.perturbed else None

    def search(draft: Any) -> list[tuple[int, float]]:
        target = TableTarget(truth, case.pruning, policy.max_children, noise)
        leaves = run_now(beam_search(truth.trie, truth.rule, policy, target, draft)).leaves
        return list(zip(leaves.node.tolist(), leaves.score.tolist(), strict=True))

    alone = search(ScriptedDraft(truth.trie, nothing))
    for table in (case.world, truth):
        drafter = LanguageModelDrafter(TableEvaluatorPerPlan(table, case.scales))  # type: ignore[arg-type]
        order = DraftRequest(**{**vars(case.order), "proposal": policy.proposal})
        assert search(ModelDraft(drafter, truth.trie, order)) == alone


class TableEvaluatorPerPlan(TableEvaluator):
    """Every plan is a call of its own and stands on a tree of its own."""

    async def open(self, prompt: Int64, *, tenant: str = "", user_key: bytes = b"") -> None:
        """Forget the call before."""
        self.asked.clear()


def _without_shares(size: PlanSize) -> PlanSize:
    return replace(size, width=size.max_nodes)


def _level_sizes(case: Case) -> list[int]:
    return [sum(len(path) == level for path in case.inner) for level in range(1, case.world.naive.levels)]
