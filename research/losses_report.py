"""Page about `research losses`, named after its data set."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

from atspeed.benchmarks import markdown
from atspeed.benchmarks.markdown import origin, paragraphs, row_table, table
from atspeed.benchmarks.results import Result
from atspeed.engine.search.mode import Mode
from research.acceptance import NAME as ACCEPTANCE
from research.acceptance import AcceptanceRow
from research.acceptance_search import NO_DRAFT
from research.draft_groups import groups, identity, passes_of, spread
from research.losses import COLUMNS, NAME, SettingRow


def write(result: Result, folder: Path) -> Path:
    """Write the page. Returns its path."""
    return markdown.write(folder / f"{result.header['data']}.md", _page(result))


def _page(result: Result) -> Iterator[str]:
    about = result.header
    yield from paragraphs(
        "# Alignment losses, each at its best setting",
        f"Drafts of one target differ in their loss alone, {about['seeds']} seeds each, for {about['users']} test users of "
        f"{about['data']}.\nA search without a draft takes one target pass per code.",
    )
    training = ", ".join(f"{name} {value:,}" for name, value in about["training"].items())
    yield from origin(about, [("recipe", about["recipe"]), ("training of each draft", training)])
    rows = result.rows_of(NAME, AcceptanceRow, kind=ACCEPTANCE)
    tried = result.rows_of(NAME, SettingRow, kind=NAME)
    for mode in dict.fromkeys(row.mode for row in rows if row.draft != NO_DRAFT):
        yield from _passes(rows, tried, Mode(mode))
    yield from identity(rows)
    yield from paragraphs(
        "## Settings",
        "The first seed of each setting, on validation users.\n"
        "An accepted level holds all of the target's beams among the draft's nodes, and so do the levels before it.\n"
        "The best setting is chosen; of equal ones, the one that covers more beams.",
    )
    yield from row_table(COLUMNS, tried)


def _passes(rows: Sequence[AcceptanceRow], tried: Sequence[SettingRow], mode: Mode) -> Iterator[str]:
    yield from paragraphs(f"## Target passes: {mode}", "The mean over seeds, ± their standard deviation.")
    chosen = {row.loss: row.setting for row in tried if row.chosen}
    cells = list(dict.fromkeys((row.budget, row.k) for row in rows if row.mode == mode and row.draft != NO_DRAFT))
    lines = [
        (group, chosen.get(group, ""), *(spread(passes_of(rows, group, k, budget, mode)) for budget, k in cells))
        for group in groups(rows)
    ]
    yield from table(("loss", "setting", *(f"{budget}, K = {k}" for budget, k in cells)), lines)
