"""Comparison of our lists with Hugging Face `generate` on the same checkpoint.

Our lists come from the real services. With `render`, `generate` reads the prompts that the user's own text and tokenizer give,
whatever the bundle's template says. Where prompts hold fields of users, both sides read the same values of the bundle.

Three things are counted and fail no comparison: prompts that are not the bundle's, lists that differ when the checkpoint runs
in bfloat16, and illegal items, which are paths that no item has. These appear when each level allows all of its codes, the
constraint of some authors.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from atspeed.benchmarks.generate_reference import Reference, Render
from atspeed.benchmarks.histories import History, user_fields
from atspeed.benchmarks.near_ties import compare
from atspeed.benchmarks.results import COMPARISON_COLUMNS, Columns, comparison_counts
from atspeed.benchmarks.services import ServiceOptions, ask, mean, progress_bar, services
from atspeed.engine.bundle.bundle import Bundle
from atspeed.engine.search.list_comparison import RankedList, largest_gap
from atspeed.engine.search.mode import Mode
from atspeed_client import Recommendation, RecommendRequest

WIDTHS = (1, 5, 10, 20)
MODES = (Mode.TARGET_ONLY, Mode.STRICT)


@dataclass(frozen=True)
class ParityRow:
    """One K in one mode. The last three counts are those of the reference alone.

    Attributes:
        largest_score_gap: the largest difference of scores at the same rank, over all users.
        prompts_different: users whose prompt is not the bundle's.
        bfloat16_different: lists of the checkpoint in bfloat16 that differ from those in float32; None if not counted.
        illegal_items: paths of no item among users x K, with sets of codes per level; None if not counted.
    """

    k: int
    mode: str
    users: int
    identical: int
    near_ties: int
    different: int
    largest_score_gap: float
    target_passes_mean: float
    accepted_levels_mean: float
    prompts_different: int
    bfloat16_different: int | None
    illegal_items: int | None


async def run(
    root: Path,
    model: PreTrainedModel,
    histories: Sequence[History],
    widths: Sequence[int] = WIDTHS,
    *,
    render: Render | None = None,
    counts: bool = False,
) -> list[ParityRow]:
    """Compare every K in both modes.

    Args:
        root: the bundle.
        model: its checkpoint, in float32.
        histories: the users.
        widths: the values of K.
        render: the user's own prompts; None: those of the bundle.
        counts: whether lists in bfloat16 and illegal items are counted, with two more searches per K.

    Raises BenchmarkError if bundle and checkpoint cannot be compared.
    """
    bundle = Bundle(root)
    template = bundle.manifest.target.prompt
    reference = Reference(bundle, model, render)
    other_prompts = sum(reference.prompt(history) != reference.bundle_prompt(history) for history in histories)
    rows = []
    with progress_bar() as progress:
        async with services(root, ServiceOptions(planner="fixed")) as client:
            for k in widths:
                expected = reference.lists(histories, k, progress)
                counted = {
                    "prompts_different": other_prompts,
                    "bfloat16_different": reference.bfloat16_different(histories, expected, k, progress)
                    if counts
                    else None,
                    "illegal_items": reference.illegal_items(histories, k, progress) if counts else None,
                }
                for mode in MODES:
                    requests = [
                        RecommendRequest(history=h, k=k, beam_width=k, mode=mode, user_fields=user_fields(template, h))
                        for h in histories
                    ]
                    replies = await ask(client, requests, progress=progress, title=f"services, K = {k}, {mode}")
                    rows.append(_row(k, mode, replies, expected, counted))
    return rows


COLUMNS: Columns[ParityRow] = (
    ("K", lambda row: str(row.k)),
    ("mode", lambda row: row.mode),
    *COMPARISON_COLUMNS,
    ("score gap", lambda row: f"{row.largest_score_gap:.0e}"),
    ("target passes", lambda row: f"{row.target_passes_mean:.2f}"),
    ("levels accepted", lambda row: f"{row.accepted_levels_mean:.2f}"),
    ("other prompts", lambda row: str(row.prompts_different)),
    ("bfloat16 differ", lambda row: _count(row.bfloat16_different)),
    ("illegal items", lambda row: _count(row.illegal_items)),
)


def _count(value: int | None) -> str:
    return "" if value is None else str(value)


def _row(
    k: int,
    mode: Mode,
    replies: Sequence[Recommendation],
    expected: Sequence[RankedList],
    counted: Mapping[str, Any],
) -> ParityRow:
    lists = [RankedList.of(reply.items) for reply in replies]
    verdicts = [compare(actual, wanted) for actual, wanted in zip(lists, expected, strict=True)]
    return ParityRow(
        k=k,
        mode=str(mode),
        users=len(verdicts),
        **comparison_counts(verdicts),
        largest_score_gap=max(map(largest_gap, lists, expected), default=0.0),
        target_passes_mean=mean([reply.statistics.target_passes for reply in replies]),
        accepted_levels_mean=mean([reply.statistics.accepted_levels for reply in replies]),
        **counted,
    )
