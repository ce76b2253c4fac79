"""Autonomous searches: fewer passes by prefetching, and none under load."""

from __future__ import annotations

from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any, cast

import numpy as np

from atspeed.engine.arrays import Int64
from atspeed.engine.model.cost_curve import CostCurve
from atspeed.engine.model.pass_stats import PassStats
from atspeed.engine.model.tree_session import CompletedPass, PassProgram, Selection
from atspeed.engine.search.beam_widths import BeamWidths
from atspeed.engine.search.scoring import Evaluation, ScoringRule
from atspeed.engine.search.trie import ROOT, Pruning
from target_service.search_runner import Search, SearchRunner
from tests.catalogues import random_catalogue
from tests.oracles.naive_trie import NaiveTrie
from tests.oracles.worlds import World, run_steps

WIDTH = 5


@dataclass
class TableEvaluator:
    """A TreeEvaluator over a table. queue_ns: wait of each pass in the queue."""

    world: World
    queue_ns: int = 0

    @property
    def trie(self) -> Any:
        """The world's."""
        return self.world.trie

    @property
    def rule(self) -> ScoringRule:
        """The world's."""
        return self.world.rule

    async def run_steps(self, tree: Any, steps: PassProgram[Any], selection: Selection) -> tuple[Any, PassStats]:
        """Pass after pass, each of a microsecond."""

        def evaluate(nodes: Int64) -> Evaluation:
            cost = PassStats(self.queue_ns, 1000, new_tokens=len(nodes), batch_requests=1, batch_tokens=len(nodes))
            tree.passes.append(CompletedPass(len(nodes), cost, 0, self.queue_ns + 2000))
            return self.world.evaluate(nodes, selection.pruning, selection.limit)

        return run_steps(steps, evaluate), PassStats()


def world() -> World:
    catalogue = random_catalogue(300, (10, 8, 8, 6), seed=1)
    items = {catalogue.id_of(item): tuple(catalogue.codes[item].tolist()) for item in range(catalogue.items)}
    return World.random(NaiveTrie(items, (10, 8, 8, 6)), ScoringRule.VOCAB, seed=2)


async def passes(runner: SearchRunner, *, prefetches: bool = True) -> int:
    tree = SimpleNamespace(passes=[], tokens=SimpleNamespace(prompt=np.zeros(4)))
    selection = Selection(Pruning.none(), WIDTH)
    search = Search(BeamWidths.of(WIDTH), prefetches)
    found = await runner.search(cast("Any", tree), np.array([ROOT]), selection, search)
    assert [len(one.evaluation.node) for one in found] == [record.nodes for record in tree.passes]
    return len(found)


async def test_nothing_is_prefetched_while_passes_wait() -> None:
    evaluator = TableEvaluator(world())
    curve = CostCurve.smoothed([1, 256], [0], np.array([[1000.0], [1000.0]]))
    runner = SearchRunner(cast("Any", evaluator), curve, max_nodes=100)
    for _ in range(20):
        await passes(runner)
    assert await passes(runner) < 4
    evaluator.queue_ns = 5000
    made = [await passes(runner) for _ in range(30)]
    assert set(made[10:]) == {4}
    evaluator.queue_ns = 0
    made = [await passes(runner) for _ in range(30)]
    assert max(made[20:]) < 4
    assert await passes(runner, prefetches=False) == 4
