"""What `bench precision` found, for people: a table, and precision.md, written from the result file alone."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from rich import box
from rich.table import Table

from atspeed.benchmarks import markdown
from atspeed.benchmarks.intervals import Interval
from atspeed.benchmarks.precision import CUTOFF, REFERENCE, TOKENS, Row, from_json
from atspeed.benchmarks.results import Result

PAGE = "precision.md"


def write(result: Result, folder: Path) -> Path:
    """Write the page; its path. Raises BenchmarkError when the result is another benchmark's."""
    return markdown.write(folder / PAGE, _page(result.header, from_json(result)))


def table(rows: Sequence[Row]) -> Table:
    """The rows, for people."""
    shown = Table(title=f"Number formats, {rows[0].users} users", box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False)
    for name in ("", *(f"{new} new" for new in TOKENS), "moved", "same", f"Recall@{CUTOFF}"):
        shown.add_column(name, justify="right" if name else "left")
    for row in rows:
        times = (f"{row.pass_ms[str(new)]:.2f}" for new in TOKENS)
        shown.add_row(row.precision, *times, f"{row.moved_by_company:.1g}", str(row.identical), f"{row.recall:.4f}")
    return shown


def _page(header: Mapping[str, Any], rows: Sequence[Row]) -> Iterator[str]:
    asked = header["question"]
    yield from ("# What a number format costs and gives", "")
    yield (
        f"The bundle's target, exported anew in each format: lists of {rows[0].users} users of the test split, K = {asked['k']}, "
        f"by the target alone. Passes, with {asked['cached']} cached tokens and every new token's logits wanted, are timed of "
        f"{header['timed']}; formats take turns."
    )
    yield ""
    yield from markdown.origin(header, [("threads", str(asked["threads"]))])
    yield from ("## A pass", "", "Median in ms by new tokens; float32's over it. Size of the weights' file.", "")
    reference = next(row for row in rows if row.precision == REFERENCE)
    yield from markdown.table(
        ("", *map(str, TOKENS), "MB"),
        [(row.precision, *(_time(row, reference, str(new)) for new in TOKENS), f"{row.megabytes:.1f}") for row in rows],
    )
    yield from ("## What company changes", "")
    yield "Largest change of a log-probability between a node alone behind its prompt and the same node among 19 others."
    yield ""
    yield from markdown.table(("", "moved by"), [(row.precision, f"{row.moved_by_company:.1e}") for row in rows])
    yield from ("## Lists", "")
    yield (
        f"The first {CUTOFF} items beside float32's: the same in the same order, and the share in common. Recall and NDCG at "
        f"{CUTOFF}; less float32's for the same users, with 95 % bootstrap intervals."
    )
    yield ""
    yield from markdown.table(
        ("", "identical", "in common", "Recall", "less", "NDCG", "less"), [_quality(row) for row in rows]
    )


def _time(row: Row, reference: Row, new: str) -> str:
    times = f", **{reference.pass_ms[new] / row.pass_ms[new]:.2f}x**" if row is not reference else ""
    return f"{row.pass_ms[new]:.2f}{times}"


def _quality(row: Row) -> tuple[str, ...]:
    return (
        row.precision,
        f"{row.identical} of {row.users}",
        f"{row.overlap:.1%}",
        f"{row.recall:.4f}",
        _less(row, row.recall_less),
        f"{row.ndcg:.4f}",
        _less(row, row.ndcg_less),
    )


def _less(row: Row, interval: Interval) -> str:
    if row.precision == REFERENCE:
        return ""
    return f"{interval.value:+.4f} [{interval.low:+.4f}, {interval.high:+.4f}]"
