"""Page about `research draft-kinds`: draft-kinds.md."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from atspeed.benchmarks import markdown
from atspeed.benchmarks.markdown import origin, paragraphs, row_table, table
from atspeed.benchmarks.results import Result
from research.acceptance import NAME as ACCEPTANCE
from research.acceptance import AcceptanceRow
from research.acceptance_search import NO_DRAFT
from research.draft_groups import groups, identity, passes_of, spread
from research.draft_kinds import COLUMNS, NAME, TARGET_STATE, DraftKindRow


def write(result: Result, folder: Path) -> Path:
    """Write the page. Returns its path."""
    return markdown.write(folder / "draft-kinds.md", _page(result))


def _page(result: Result) -> Iterator[str]:
    about = result.header
    yield from paragraphs(
        "# Kinds of drafts beside each other",
        f"Drafts of one target, trained alike, for {about['users']} users of {about['data']}.\n"
        "Lists are strict, and a search without a draft takes one target pass per code.",
    )
    yield from origin(about, [])
    rows = result.rows_of(NAME, AcceptanceRow, kind=ACCEPTANCE)
    yield from _passes(rows, about["widths"], about["nodes"])
    yield from identity(rows)
    yield from paragraphs(
        "## Cost",
        f"The time of a plan is the median over {about['timed_users']} users at K = {about['timed_k']}, with "
        f"{about['threads']} thread(s) and the prompt's prefix in the cache.\n"
        "Training is the pretraining and the alignment of the draft; the target's answers are made once for all drafts.",
    )
    yield from row_table(COLUMNS, result.rows_of(NAME, DraftKindRow, kind=NAME))
    yield from _on_target([row for row in result.rows if row["kind"] == TARGET_STATE])


def _on_target(rows: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    """Yield the section of heads on the target's state, if they were trained."""
    if not rows:
        return
    yield from paragraphs(
        "## Heads on the target's state",
        "The state is known after the target's pass over the prompt, so two passes are the least.\n"
        "The drafter is not served; its passes are counted in one process.",
    )
    names = ("draft", "parameters", "k", "nodes", "target_passes_mean", "identical", "users")
    yield from table(names, [[str(row[name]) for name in names] for row in rows])


def _passes(rows: Sequence[AcceptanceRow], widths: Sequence[int], nodes: Sequence[int]) -> Iterator[str]:
    yield from paragraphs("## Target passes", "The mean over seeds, ± their standard deviation.")
    alone = {row.k: row.target_passes_mean for row in rows if row.draft == NO_DRAFT}
    found = groups(rows)
    lines = [
        (str(k), str(count), f"{alone[k]:.2f}", *(spread(passes_of(rows, group, k, f"{count}/all")) for group in found))
        for count in nodes
        for k in widths
    ]
    yield from table(("K", "nodes", "no draft", *found), lines)
