"""Page about `research planner`: planner.md."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

from atspeed.benchmarks import markdown
from atspeed.benchmarks.markdown import figures, origin, paragraphs, row_table, table
from atspeed.benchmarks.results import Columns, Result
from research.planner_ablation import calibration, fetch
from research.planner_ablation.calibration import CalibrationRow
from research.planner_ablation.fetch import FetchRow
from research.planner_ablation.study import ADAPTIVE, ALONE, NAME, Load, PlannerRow

LIMIT = 1.02
"""Largest ratio to today's planner at which a simpler one may take its place."""
_CALIBRATION_COLUMNS: Columns[CalibrationRow] = (
    ("K", lambda row: str(row.k)),
    ("nodes", lambda row: row.budget),
    ("simulated", lambda row: f"{row.simulated:.2f}"),
    ("recorded", lambda row: f"{row.recorded:.2f}"),
)


def write(result: Result, folder: Path) -> Path:
    """Write the page. Returns its path."""
    return markdown.write(folder / "planner.md", _page(result))


def _page(result: Result) -> Iterator[str]:
    rows = result.rows_of(NAME, PlannerRow, kind=NAME)
    reads = result.rows_of(NAME, FetchRow, kind=fetch.NAME)
    question = result.header["question"]
    yield from paragraphs(
        "# Planners beside each other, simulated",
        f"Strict lists of {question['users']} simulated users, after {question['settle']} from which planners learn, "
        f"{question['seeds']} times with users and arrivals of their own. "
        "No model runs and no time is measured, so other work on the machine changes nothing.",
    )
    yield from origin(result.header, [])
    yield from figures(_figures(rows, reads))
    yield from _what_is_simulated()
    for load in Load:
        yield from _load(load, rows)
    yield from _fetch(reads)
    yield from paragraphs(
        "## Check of the simulated users",
        "Share of requests whose plan covers all levels, so that one target pass makes the list. "
        "`2k` is 2K nodes per level; other numbers are nodes in all. Recorded: [acceptance.md](acceptance.md).",
    )
    yield from row_table(_CALIBRATION_COLUMNS, result.rows_of(NAME, CalibrationRow, kind=calibration.NAME))


def _figures(rows: Sequence[PlannerRow], reads: Sequence[FetchRow]) -> Iterator[tuple[str, str]]:
    for load in Load:
        for name in _candidates(rows):
            found = [row for row in rows if row.candidate == name and row.load == load]
            worst = max(found, key=lambda row: row.ratio)
            above = sum(row.ratio > LIMIT for row in found)
            yield (
                f"{name}, {load}",
                f"more than 2 % slower in {above} of {len(found)} settings; at worst {worst.ratio:.2f} "
                f"± {worst.ratio_ci95:.2f} (K = {worst.k}, {worst.prefix}, {worst.precision})",
            )
    mean = [row for row in reads if row.rule == fetch.MEAN]
    yield (
        "reads of Redis by their mean time, over a line in the bytes, at worst",
        (
            f"{max(row.list_ratio for row in mean):.3f} of a list, {max(row.prompt_ratio for row in mean):.3f} of a prompt"
        ),
    )


def _what_is_simulated() -> Iterator[str]:
    yield from paragraphs("## What is simulated")
    yield from table(
        ("part", "simulated or recorded"),
        (
            ("time of a target pass", "recorded, by its new tokens: [precision.md](precision.md), float32 and int8"),
            ("time of a draft pass at K = 1", "recorded: [decode.md](decode.md); its time per token is modelled"),
            ("overhead of calls and passes", "recorded: [decode.md](decode.md), K = 1"),
            ("spread of a pass's time", "modelled: 10 %"),
            ("log-probabilities of target and draft", "modelled, so that plans cover what was recorded (last table)"),
            ("queue", "modelled: one pass at a time, the oldest request first, no shared passes"),
            ("cores", "each model has its own; on one machine they share them"),
            ("loop, drafter, planner, target prefetch", "the product's code"),
            ("0.5 ms for each comparison of sizes", "added to today's planner ([log](../log.md))"),
        ),
    )
    yield from paragraphs(
        "Lists of all planners are the target's own; the command fails otherwise. "
        "Under load, arrivals are a Poisson process of 70 % of what the target alone can serve. "
        "The only measured comparison is the table in the [log](../log.md), from a machine with other work.",
    )


def _load(load: Load, rows: Sequence[PlannerRow]) -> Iterator[str]:
    yield from paragraphs(
        f"## Load: {load}",
        f"Mean latency over that of today's planner (`{ADAPTIVE}`, in ms), with the 95 % interval over the seeds.",
    )
    names, here = _candidates(rows), [row for row in rows if row.load == load]
    lines = []
    for today in (row for row in here if row.candidate == ADAPTIVE):
        others = {row.candidate: row for row in here if _setting(row) == _setting(today)}
        lines.append(
            (
                today.precision,
                str(today.k),
                today.prefix,
                f"{today.mean_ms:.1f}",
                *(f"{others[name].ratio:.2f} ± {others[name].ratio_ci95:.2f}" for name in names),
            )
        )
    yield from table(("target", "K", "prefix", f"{ADAPTIVE}, ms", *names), lines)


def _fetch(reads: Sequence[FetchRow]) -> Iterator[str]:
    yield from paragraphs(
        "## Reads of Redis",
        "A read pays if it takes less time than computing what it finds. The product compares with the mean time of "
        "recent reads. Before, it fitted a line in the bytes by least squares. Times over those of the line, of a "
        "prompt and of the shortest list: one prompt and three passes of one token. Server: latency and time per byte.",
    )
    order = sorted(reads, key=lambda row: (row.rule != fetch.MEAN, -row.list_ratio))
    worst = [row for rule in (fetch.MEAN, fetch.ALWAYS) for row in [one for one in order if one.rule == rule][:6]]
    yield from paragraphs(f"The six worst of {len(reads) // 2} cases, for each rule:")
    yield from row_table(fetch.COLUMNS, worst)


def _candidates(rows: Sequence[PlannerRow]) -> list[str]:
    names = dict.fromkeys(row.candidate for row in rows)
    return [name for name in names if name not in {ADAPTIVE, ALONE}] + [ALONE]


def _setting(row: PlannerRow) -> tuple[str, int, str, str]:
    return row.precision, row.k, row.prefix, row.load
