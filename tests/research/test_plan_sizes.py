"""`research plan-sizes`: plans by their definitions, exact lists, and the command from a bundle to a page."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from atspeed.benchmarks.results import BenchmarkError
from atspeed.engine.model.tree_session import Selection
from atspeed.engine.search.beam_widths import BeamWidths
from atspeed.engine.search.beams import Beams
from atspeed.engine.search.plan import Plan, PlanSize, Proposal
from atspeed.engine.search.scoring import Children
from atspeed.engine.search.trie import ROOT, Pruning
from draft_service.drafter import DraftRequest
from draft_service.language_model_drafter import LanguageModelDrafter
from research import plan_sizes
from research.eval_examples import HeldOutCase
from research.plan_size_rules import RULES, PerNodeDrafter, children_by_confidence, children_by_mass, drafter_of
from research.plan_sizes import PlanSizeRow, passes_at
from tests.bundles import write_bundle
from tests.catalogues import random_catalogue
from tests.oracles.models import Models

K = 4


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Models:
    catalogue = random_catalogue(80, (6, 5, 4, 4), seed=4)
    return Models.load(write_bundle(tmp_path_factory.mktemp("bundle"), catalogue, draft_noise=0.2))


def request(models: Models, below: Beams | None = None, nodes: int = 300) -> DraftRequest:
    prompt = models.prompt(5, seed=1)
    size = PlanSize(BeamWidths.of(K), width=nodes, max_nodes=nodes)
    return DraftRequest(prompt, below or Beams.root(), size, Proposal.TOP, Pruning.none())


def children_of(*probabilities: float) -> Children:
    return Children(np.arange(len(probabilities)), np.log(np.array(probabilities, dtype=np.float32)), 0.0)


def test_numbers_of_children_follow_the_confidence() -> None:
    found = [children_by_confidence(children_of(best, 0.01), 2.0) for best in (0.2, 0.5, 0.7, 0.95)]
    assert found == [14, 10, 6, 2]
    shares = [children_by_mass(children_of(0.5, 0.2, 0.05), share) for share in (0.0, 0.5, 0.7, 0.95, 1.0)]
    assert shares == [0, 1, 2, 3, 3]


async def test_plan_per_node_has_own_beams_and_the_first_children(models: Models) -> None:
    """From the definition: the plan of K beams by the draft alone, and two children of each planned node."""
    evaluator, trie = models.evaluator("draft"), models.catalogue.trie
    asked = request(models)
    own = (await LanguageModelDrafter(evaluator).plan(replace(asked, size=replace(asked.size, width=K)))).plan
    drafted = await PerNodeDrafter(evaluator, lambda _: 2).plan(asked)
    drafted.plan.check(trie, limit=300)
    tree = await evaluator.open(asked.prompt)
    inner = np.array([ROOT, *own.node.tolist(), *drafted.plan.node.tolist()])
    everything, _ = await evaluator.evaluate(tree, np.unique(inner), Selection(Pruning.none(), 10))
    best = {node: children.node[:2].tolist() for node, children in everything.items()}
    await evaluator.close()
    expected, level = set(own.node.tolist()), [ROOT]
    for depth in range(1, trie.levels):
        level = [node for parent in level for node in best[parent]]
        level += [node for node in own.node.tolist() if trie.depth_of(node) == depth]
        expected |= set(level)
    assert set(drafted.plan.node.tolist()) == expected
    assert drafted.passes == trie.levels - 1


async def test_plans_have_their_limit_of_nodes_also_below_beams(models: Models) -> None:
    trie, evaluator = models.catalogue.trie, models.evaluator("draft")
    below = trie.children(ROOT)[:3].astype(np.int64)
    beams = Beams(below, *(np.zeros(len(below)) for _ in range(3)))
    for start in (None, beams):
        asked = request(models, start, nodes=9)
        for rule, values in RULES.items():
            plan: Plan = (await drafter_of(evaluator, rule, values[-1]).plan(asked)).plan
            plan.check(trie, limit=9)
            assert len(plan.node) == 9
    await evaluator.close()


async def test_plans_by_margin_are_cuts_of_one_order(models: Models) -> None:
    evaluator = models.evaluator("draft")
    whole = (await LanguageModelDrafter(evaluator).plan(request(models))).plan
    few = (await drafter_of(evaluator, "nodes", 20).plan(request(models))).plan
    deep = (await drafter_of(evaluator, "margin", 1.0).plan(request(models))).plan
    await evaluator.close()
    assert len(few.node) == 20
    assert few.margin.min() >= np.sort(whole.margin)[-20]
    assert deep.node.tolist() == whole.node[whole.margin >= -1.0].tolist()


def test_lists_are_the_targets_and_larger_plans_take_fewer_passes(models: Models) -> None:
    cases = [HeldOutCase((seed, seed + 7, seed + 3), (1,), seed) for seed in range(3)]
    rows = plan_sizes.run(models.bundle.bundle, cases, [K])
    assert len(rows) == sum(map(len, RULES.values()))
    assert all(row.identical == row.users == 3 for row in rows)
    for rule in RULES:
        found = [row for row in rows if row.rule == rule]
        nodes = [row.nodes_mean for row in found]
        assert found[-1].target_passes_mean <= found[0].target_passes_mean
        assert nodes[0] < nodes[-1]


def test_passes_between_two_values_are_on_their_line() -> None:
    rows = [PlanSizeRow("nodes", n, 10, nodes, passes, 0.1, 5, 5) for n, nodes, passes in ((30, 40, 2), (60, 80, 1))]
    assert passes_at(rows, "nodes", 10, 60) == pytest.approx(1.5)
    assert passes_at(rows, "nodes", 10, 100) is None


def test_page_has_a_column_for_each_rule(tmp_path: Path) -> None:
    rows = [PlanSizeRow(rule, 1, 10, nodes, 1.5, 0.1, 5, 5) for rule in RULES for nodes in (50.0, 130.0)]
    lines = plan_sizes.comparison(rows, [10])
    assert lines == [("10", str(nodes), *("1.50" if nodes <= 130 else "" for _ in RULES)) for nodes in (60, 120, 240)]


def test_bundle_without_a_language_model_is_refused(tmp_path: Path) -> None:
    heads = write_bundle(tmp_path / "heads", random_catalogue(30, (4, 4, 4), seed=1), draft_heads=True)
    with pytest.raises(BenchmarkError, match=r"draft\.draft_kind: must be language-model"):
        plan_sizes.run(heads.bundle, [], [K])
