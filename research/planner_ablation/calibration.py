"""Check of the simulated users: shares of lists that a plan covers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from atspeed.benchmarks.results import Result
from atspeed.engine.search.beams import Beams
from research.acceptance import parse_budget
from research.acceptance_search import Budget
from research.planner_ablation.serving import drafted
from research.planner_ablation.users import Model, Users

NAME = "calibration"
BUDGETS = tuple(map(parse_budget, ("2k", "120", "240")))


@dataclass(frozen=True)
class CalibrationRow:
    """Share of requests whose plan covers all levels, so that one target pass makes the list.

    Attributes:
        simulated: of simulated users.
        recorded: of docs/benchmarks/acceptance.json.
    """

    k: int
    budget: str
    simulated: float
    recorded: float


def run(benchmarks: Path, users: int = 100) -> list[CalibrationRow]:
    """Return a row for each recorded K and size of plans."""
    recorded = {
        (row["k"], row["budget"]): row["one_pass_share"]
        for row in Result.read(benchmarks / "acceptance.json").rows
        if row["mode"] == "strict" and row["draft"] == "draft"
    }
    simulated = Users(seed=0)
    rows = []
    for k in sorted({k for k, _ in recorded}):
        needed = [_needed(simulated.user(number).target, k) for number in range(users)]
        for budget in BUDGETS:
            share = _share_covered(simulated, needed, k, budget)
            rows.append(CalibrationRow(k, budget.label, round(share, 3), recorded[k, budget.label]))
    return rows


def _share_covered(users: Users, needed: Sequence[set[int]], k: int, budget: Budget) -> float:
    size = budget.size(k, users.trie.levels)
    plans = (drafted(users.user(number).draft, Beams.root(), size).plan for number in range(len(needed)))
    return float(np.mean([beams <= set(plan.node.tolist()) for beams, plan in zip(needed, plans, strict=True)]))


def _needed(model: Model, k: int) -> set[int]:
    """Return the beams of a plain beam search on the levels that need a pass."""
    node, score, needed = np.zeros(1, dtype=np.int64), np.zeros(1), set[int]()
    for _ in range(model.trie.levels - 1):
        row, child = model.trie.children_of(node)
        total = score[row] + model.logp[child]
        best = np.sort(np.argsort(-total, kind="stable")[:k])
        node, score = child[best], total[best]
        needed.update(node.tolist())
    return needed
