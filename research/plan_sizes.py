"""Target passes under rules for planned nodes, compared at equal mean nodes.

The rules are in plan_size_rules.py. Passes are counted for several values of each rule. Between two values, they lie on a line.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np

from atspeed.benchmarks import markdown
from atspeed.benchmarks.histories import prompt_tokens
from atspeed.benchmarks.intervals import half_width
from atspeed.benchmarks.markdown import origin, paragraphs, row_table, table
from atspeed.benchmarks.results import BenchmarkError, Columns, Result
from atspeed.engine.bundle.bundle import Bundle
from atspeed.engine.bundle.manifest import LANGUAGE_MODEL, MANIFEST
from atspeed.engine.model.tree_session import Selection
from atspeed.engine.search.beam_widths import BeamWidths
from atspeed.engine.search.beams import Beams
from atspeed.engine.search.plan import PlanSize, Proposal
from atspeed.engine.search.scoring import ScoringRule
from atspeed.engine.search.trie import Pruning
from draft_service.drafter import Drafter, DraftRequest
from orchestrator.planning.sized_draft import NoDraft
from orchestrator.search.beam_loop import SearchResult, beam_search
from orchestrator.search.policies import Strict
from research.eval_examples import HeldOutCase
from research.plan_size_rules import MOST_NODES, RULES, drafter_of
from research.shared_tree_models import (
    SharedTreeDraft,
    SharedTreeEvaluator,
    SharedTreeTarget,
    load_decoder_of,
    prefix_cache,
    shared_evaluator,
)

NAME = "plan-sizes"
WIDTHS = (10, 20, 50)
NODES = (60, 120, 240)  # mean nodes at which the rules are compared


@dataclass(frozen=True)
class PlanSizeRow:
    """Strict lists of one K under one rule.

    Attributes:
        rule: name of the rule.
        value: its value.
        k: K.
        nodes_mean: distinct planned nodes of all plans of a list.
        target_passes_mean: passes of the target.
        target_passes_ci95: half width of its interval.
        identical: lists that are the target's own.
        users: lists.
    """

    rule: str
    value: float
    k: int
    nodes_mean: float
    target_passes_mean: float
    target_passes_ci95: float
    identical: int
    users: int


COLUMNS: Columns[PlanSizeRow] = (
    ("K", lambda row: str(row.k)),
    ("rule", lambda row: row.rule),
    ("value", lambda row: f"{row.value:g}"),
    ("nodes", lambda row: f"{row.nodes_mean:.0f}"),
    ("target passes", lambda row: f"{row.target_passes_mean:.2f} ±{row.target_passes_ci95:.2f}"),
    ("identical", lambda row: f"{row.identical} of {row.users}"),
)


def run(bundle: Bundle, cases: Sequence[HeldOutCase], widths: Sequence[int]) -> list[PlanSizeRow]:
    """Count target passes of strict lists under every rule and value.

    Raises BenchmarkError for a bundle whose draft is no language model, or whose rule has forced nodes.
    """
    if bundle.model("draft").draft_kind != LANGUAGE_MODEL:
        raise BenchmarkError(f"{MANIFEST}: draft.draft_kind: must be {LANGUAGE_MODEL}")
    if bundle.manifest.scoring_rule is ScoringRule.TRIE:
        raise BenchmarkError(f"{MANIFEST}: scoring_rule: must not be {ScoringRule.TRIE}, which has forced nodes")
    return asyncio.run(_Study(bundle, widths).rows(cases))


@dataclass
class _Counts:
    """Lists under one value of a rule. nodes, passes: of each list."""

    nodes: list[int] = field(default_factory=list)
    passes: list[int] = field(default_factory=list)
    identical: int = 0


class _Study:
    """Loaded models of a bundle."""

    def __init__(self, bundle: Bundle, widths: Sequence[int]) -> None:
        self._catalogue = catalogue = bundle.catalogue()
        self._widths = widths
        entry, rule = bundle.manifest.target, bundle.manifest.scoring_rule
        decoder, cache = load_decoder_of(bundle, "target", 1), prefix_cache(entry)
        # One for the searches without a draft and one for those with it, as in acceptance_search.py.
        self._alone, self._speculating = (shared_evaluator(decoder, entry, catalogue, rule, cache) for _ in range(2))
        draft = bundle.model("draft")
        self._draft = shared_evaluator(load_decoder_of(bundle, "draft", 1), draft, catalogue, rule, prefix_cache(draft))

    async def rows(self, cases: Sequence[HeldOutCase]) -> list[PlanSizeRow]:
        """Count all lists of all cases."""
        asked = [(k, rule, value) for k in self._widths for rule, values in RULES.items() for value in values]
        counts = {one: _Counts() for one in asked}
        for case in cases:
            for k, found in groupby(asked, key=lambda one: one[0]):
                expected, _ = await self._search(self._alone, case, k, None)
                for one in found:
                    drafter = drafter_of(self._draft, one[1], one[2])
                    result, passes = await self._search(self._speculating, case, k, drafter)
                    counts[one].nodes.append(len(result.memo.drafted))
                    counts[one].passes.append(passes)
                    counts[one].identical += result.leaves.node.tolist() == expected.leaves.node.tolist()
        for evaluator in (self._alone, self._speculating, self._draft):
            await evaluator.close()
        return [_row(k, rule, value, counts[k, rule, value]) for k, rule, value in asked]

    async def _search(
        self, evaluator: SharedTreeEvaluator, case: HeldOutCase, k: int, drafter: Drafter | None
    ) -> tuple[SearchResult, int]:
        """Search for one list. Returns it and the number of target passes."""
        policy, trie = Strict(BeamWidths.of(k)), evaluator.trie
        prompt = prompt_tokens(self._catalogue, evaluator.entry, case.history)
        most = policy.max_children or max(trie.codebook_sizes)
        target = SharedTreeTarget(evaluator, prompt, Selection(Pruning.none(), most))
        size = PlanSize(BeamWidths.of(k), width=MOST_NODES, max_nodes=MOST_NODES)
        drafted = prompt_tokens(self._catalogue, self._draft.entry, case.history)
        request = DraftRequest(drafted, Beams.root(), size, Proposal.TOP, Pruning.none())
        draft = SharedTreeDraft(drafter, trie, request) if drafter else NoDraft()
        result = await beam_search(trie, evaluator.rule, policy, target, draft)
        return result, len(target.pass_levels)


def _row(k: int, rule: str, value: float, counts: _Counts) -> PlanSizeRow:
    passes = counts.passes
    return PlanSizeRow(
        rule=rule,
        value=value,
        k=k,
        nodes_mean=round(fmean(counts.nodes), 3),
        target_passes_mean=round(fmean(passes), 4),
        target_passes_ci95=round(half_width(passes), 4),
        identical=counts.identical,
        users=len(passes),
    )


def passes_at(rows: Sequence[PlanSizeRow], rule: str, k: int, nodes: float) -> float | None:
    """Return the target passes of a rule at so many mean nodes, on the line between neighbours; None outside its values."""
    points = sorted((row.nodes_mean, row.target_passes_mean) for row in rows if (row.rule, row.k) == (rule, k))
    x, y = zip(*points, strict=True)
    return float(np.interp(nodes, x, y)) if x[0] <= nodes <= x[-1] else None


def header(dataset: str, users: int, widths: Sequence[int]) -> dict[str, Any]:
    """Return what a result says of itself."""
    return {"benchmark": NAME, "data": dataset, "users": users, "widths": [*widths]}


def comparison(rows: Sequence[PlanSizeRow], widths: Sequence[int]) -> list[tuple[str, ...]]:
    """Return the lines of the comparison: K, nodes, and the passes of each rule."""
    return [
        (
            str(k),
            str(nodes),
            *("" if at is None else f"{at:.2f}" for at in (passes_at(rows, rule, k, nodes) for rule in RULES)),
        )
        for k in widths
        for nodes in NODES
    ]


def write(result: Result, folder: Path) -> Path:
    """Write the page of a result. Returns its path."""
    return markdown.write(folder / "plan-sizes.md", _page(result))


def _page(result: Result) -> Iterator[str]:
    about, rows = result.header, result.rows_of(NAME, PlanSizeRow)
    yield from paragraphs(
        "# Rules for the size of a plan",
        f"Target passes of strict lists for {about['users']} users of {about['data']}.\n"
        "A rule chooses the planned nodes of each request, and rules are compared at equal mean nodes of a list.",
    )
    yield from table(
        ("rule", "planned nodes"),
        [
            ("nodes", "those of the highest margins, as many for every request"),
            ("margin", "all down to a margin, the same for every request"),
            (
                "confidence",
                "the draft's own beams, and 7, 5, 3 or 1 times a factor of each planned node's children, by its best child",
            ),
            ("mass", "the draft's own beams, and each planned node's best children up to a share of their probability"),
        ],
    )
    yield from paragraphs("## Target passes at equal nodes", "On the line between neighbours of the table below.")
    yield from table(("K", "nodes", *RULES), comparison(rows, about["widths"]))
    yield from paragraphs("## All values")
    yield from row_table(COLUMNS, rows)
    yield from origin(about, [])
