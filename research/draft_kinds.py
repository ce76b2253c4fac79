"""Drafts of several kinds for one target: target passes, time of a plan, cost.

The drafts are trained alike, by a comparison file (atspeed/training/comparison.py). A finished draft is not trained again, and
its counts are kept beside it, so the command resumes where it was stopped. The time of a plan is measured each time.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

from atspeed.benchmarks.histories import prompt_tokens
from atspeed.benchmarks.results import Columns
from atspeed.engine.bundle.bundle import Bundle
from atspeed.engine.bundle.catalogue import Catalogue
from atspeed.engine.model.tree_evaluator import TreeEvaluator
from atspeed.engine.search.beam_widths import BeamWidths
from atspeed.engine.search.beams import Beams
from atspeed.engine.search.mode import Mode
from atspeed.engine.search.plan import PlanSize, Proposal
from atspeed.engine.search.trie import Pruning
from draft_service.draft_kinds import drafter_of
from draft_service.drafter import Drafter, DraftRequest
from research import kept_counts
from research.acceptance import AcceptanceConfig, AcceptanceRow, parse_budget
from research.eval_examples import HeldOutCase
from research.shared_tree_models import kv_layout, load_decoder_of, prefix_cache

NAME = "draft-kinds"
TARGET_STATE = "target-state"  # rows of research/target_state.py
WIDTHS = (5, 10, 20, 50)
NODES = (60, 120, 240)
TIMED_WIDTH = 20  # K of the timed plans
_STAGES = ("pretrained-draft", "draft")  # whose time is the cost of a draft


@dataclass(frozen=True)
class DraftKindsConfig:
    """Configuration of the study.

    Attributes:
        widths, nodes: K and plan sizes whose passes are counted.
        timed: users whose plans are timed.
        seed: seed of the choice of users.
        workers: processes that count.
        threads: threads of a pass.
    """

    widths: Sequence[int] = WIDTHS
    nodes: Sequence[int] = NODES
    timed: int = 50
    seed: int = 1
    workers: int = 1
    threads: int = 1


@dataclass(frozen=True)
class DraftKindRow:
    """One trained draft.

    Attributes:
        draft: its name, NAME/seedN.
        draft_kind: its kind, as the bundle names it.
        parameters: number of weights.
        training_seconds: wall time of its pretraining and its alignment, the teacher's apart.
        plan_ms: median time of a plan by its nodes, ms; K is TIMED_WIDTH and the prompt's prefix is cached.
        draft_passes: draft passes of such a plan.
    """

    draft: str
    draft_kind: str
    parameters: int
    training_seconds: float
    plan_ms: Mapping[str, float]
    draft_passes: int


COLUMNS: Columns[DraftKindRow] = (
    ("draft", lambda row: row.draft),
    ("kind", lambda row: row.draft_kind),
    ("parameters", lambda row: f"{row.parameters:,}"),
    ("training, s", lambda row: f"{row.training_seconds:.0f}"),
    ("draft passes", lambda row: str(row.draft_passes)),
    ("ms per plan", lambda row: ", ".join(f"{nodes}: {spent:.2f}" for nodes, spent in row.plan_ms.items())),
)


def count_passes(
    bundles: Mapping[str, Bundle], cases: Sequence[HeldOutCase], config: DraftKindsConfig
) -> list[AcceptanceRow]:
    """Count target passes of strict lists for each draft, or read what an earlier run has counted."""
    asked = AcceptanceConfig(
        budgets=[parse_budget(f"{nodes}/all") for nodes in config.nodes],
        widths=config.widths,
        modes=[Mode.STRICT],
        seed=config.seed,
        workers=config.workers,
        threads=config.threads,
    )
    return kept_counts.count(bundles, cases, asked, study=NAME)


def describe(
    bundles: Mapping[str, Bundle], cases: Sequence[HeldOutCase], config: DraftKindsConfig
) -> list[DraftKindRow]:
    """Describe each draft, with the time of its plans. Drafts take turns, so that other work slows all of them alike."""
    return asyncio.run(_described(bundles, cases[: config.timed], config))


async def _described(
    bundles: Mapping[str, Bundle], cases: Sequence[HeldOutCase], config: DraftKindsConfig
) -> list[DraftKindRow]:
    catalogue = next(iter(bundles.values())).catalogue()
    opened = {name: _Opened.of(bundle, catalogue, config.threads) for name, bundle in bundles.items()}
    spent = {(name, nodes): list[float]() for name in opened for nodes in config.nodes}
    for case in cases:
        for name, draft in opened.items():
            await draft.plan(case, config.nodes[0])  # fills the prefix cache, as the request before does
            for nodes in config.nodes:
                spent[name, nodes].append(await draft.plan(case, nodes))
    rows = []
    for name, draft in opened.items():
        await draft.evaluator.close()
        rows.append(
            DraftKindRow(
                draft=name,
                draft_kind=draft.evaluator.entry.draft_kind,
                parameters=draft.evaluator.entry.parameters,
                training_seconds=round(sum(_stage_seconds(bundles[name])), 1),
                plan_ms={str(nodes): round(median(spent[name, nodes]), 3) for nodes in config.nodes},
                draft_passes=draft.passes,
            )
        )
    return rows


@dataclass
class _Opened:
    """A draft in this process.

    Attributes:
        evaluator: its model.
        drafter: its drafter.
        catalogue: the catalogue.
        passes: the draft passes of its last plan.
    """

    evaluator: TreeEvaluator
    drafter: Drafter
    catalogue: Catalogue
    passes: int = 0

    @classmethod
    def of(cls, bundle: Bundle, catalogue: Catalogue, threads: int) -> _Opened:
        entry, decoder = bundle.model("draft"), load_decoder_of(bundle, "draft", threads)
        rule, layout = bundle.manifest.scoring_rule, kv_layout(entry)
        evaluator = TreeEvaluator(decoder, entry, catalogue.trie, rule, layout, prefix_cache(entry))
        return cls(evaluator, drafter_of(evaluator), catalogue)

    async def plan(self, case: HeldOutCase, nodes: int) -> float:
        """Make a plan. Returns its time, ms."""
        request = DraftRequest(
            prompt=prompt_tokens(self.catalogue, self.evaluator.entry, case.history),
            below=Beams.root(),
            size=PlanSize(BeamWidths.of(TIMED_WIDTH), width=nodes, max_nodes=nodes),
            proposal=Proposal.TOP,
            pruning=Pruning.none(),
        )
        begun = time.perf_counter()
        drafted = await self.drafter.plan(request)
        spent = 1000 * (time.perf_counter() - begun)
        self.passes = drafted.passes
        return spent


def _stage_seconds(bundle: Bundle) -> Iterator[float]:
    """Yield the time of each stage of a draft's training. A pretrained draft of a seed is in a folder of its own."""
    own = bundle.root.parent
    shared = own.with_name(f"seed{own.name.rpartition('-seed')[2]}")
    for stage in _STAGES:
        for folder in (own, shared):
            marker = folder / "stages" / f"{stage}.json"
            if marker.exists():
                yield float(json.loads(marker.read_bytes())["seconds"])
                break


def header(config: DraftKindsConfig, *, data: str, users: int) -> dict[str, Any]:
    """Return the header's fields."""
    return {
        "benchmark": NAME,
        "data": data,
        "users": users,
        "timed_users": min(users, config.timed),
        "timed_k": TIMED_WIDTH,
        "widths": list(config.widths),
        "nodes": list(config.nodes),
        "threads": config.threads,
    }
