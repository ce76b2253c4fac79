"""What `bench recommenders` found: rows for people, for the result file, and as a page written from the file alone."""

from __future__ import annotations

import shlex
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Group
from rich.table import Table

from atspeed.benchmarks.errors import BenchmarkError
from atspeed.benchmarks.intervals import Interval
from atspeed.benchmarks.results import Result
from atspeed.engine.files.atomic_write import replace_text

NAME = "recommenders"
PAGE = "recommenders.md"
CUTOFFS = (5, 10, 20)
REFERENCE = "item-knn"  # what the others are compared with, user by user
REFITTED = "item-knn-refitted"  # the same, counted on the validation split too
REFERENCE_CUTOFF = 10
_TABLES = {"all": "Nothing excluded", "unseen": "Items of the history excluded"}
_COLUMNS = [f"{name}@{cutoff}" for name in ("Recall", "NDCG") for cutoff in CUTOFFS]


@dataclass(frozen=True)
class Measure:
    """A mean over users. ci95: half width of its 95 % bootstrap interval."""

    mean: float
    ci95: float


@dataclass(frozen=True)
class RecommenderRow:
    """One method in one table: `all`, nothing excluded, or `unseen`, without the items of the history.

    recall, ndcg: by cutoff. recall_less_item_knn: Recall@10 less that of item-kNN for the same users, a paired bootstrap.
    train_seconds: of the processor; None for the run's own models, whose training may have been in several pieces.
    """

    method: str
    table: str
    users: int
    recall: Mapping[str, Measure]
    ndcg: Mapping[str, Measure]
    recall_less_item_knn: Interval | None = None
    train_seconds: float | None = None

    @property
    def measures(self) -> list[Measure]:
        """In the order of the columns."""
        return [measures[str(cutoff)] for measures in (self.recall, self.ndcg) for cutoff in CUTOFFS]


def to_json(rows: Sequence[RecommenderRow]) -> list[dict[str, Any]]:
    """The rows, for a result file; what a row does not have is left out."""
    return [{name: value for name, value in asdict(row).items() if value is not None} for row in rows]


def from_json(result: Result) -> list[RecommenderRow]:
    """The rows of a result file. Raises BenchmarkError when it is another benchmark's."""
    if result.header.get("benchmark") != NAME:
        raise BenchmarkError(f"the result is not one of bench {NAME}")
    return [_row(row) for row in result.rows]


def _row(row: Mapping[str, Any]) -> RecommenderRow:
    difference = row.get("recall_less_item_knn")
    measures = {name: {at: Measure(**value) for at, value in row[name].items()} for name in ("recall", "ndcg")}
    return RecommenderRow(**{**row, **measures, "recall_less_item_knn": Interval(**difference) if difference else None})


def table(rows: Sequence[RecommenderRow]) -> Group:
    """The rows, for people: a table with and one without the items of the history."""
    return Group(*(_shown(title, found) for title, found in _by_table(rows)))


def _shown(title: str, rows: Sequence[RecommenderRow]) -> Table:
    shown = Table(title=f"{title}, {rows[0].users} users", box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False)
    shown.add_column("")
    for name in (*_COLUMNS, f"Recall@{REFERENCE_CUTOFF}\nless {REFERENCE}", "training"):
        shown.add_column(name.replace("@", "\n@", 1) if name in _COLUMNS else name, justify="right")
    for row in rows:
        numbers = (f"{measure.mean:.4f}\n±{measure.ci95:.4f}" for measure in row.measures)
        shown.add_row(row.method, *numbers, _difference(row), _seconds(row))
    return shown


def write(result: Result, folder: Path) -> Path:
    """Write the page; its path. Raises BenchmarkError when the result is another benchmark's."""
    rows = from_json(result)
    page = folder / PAGE
    replace_text(page, "\n".join(["# Recommenders", "", *section(result.header, rows)]) + "\n")
    return page


def section(header: Mapping[str, Any], rows: Sequence[RecommenderRow]) -> Iterator[str]:
    """The lines of the page below its title."""
    machine, bundle = header["machine"], header["bundle"]
    yield (
        f"{header['users']} users of {header['data']}: the history before the test items is given, the set of the test items "
        f"is the answer. ± is half of a 95 % bootstrap interval over users; Recall@{REFERENCE_CUTOFF} less that of {REFERENCE} "
        "is over the same users, with its 95 % interval."
    )
    yield from ("", "```sh", shlex.join(header["command"]), "```", "")
    for title, found in _by_table(rows):
        names = ["", *_COLUMNS, f"Recall@{REFERENCE_CUTOFF} less {REFERENCE}", "training"]
        yield from (f"## {title}", "", f"| {' | '.join(names)} |", f"|{'---|' * len(names)}")
        for row in found:
            numbers = (f"{measure.mean:.4f} ±{measure.ci95:.4f}" for measure in row.measures)
            yield f"| {' | '.join([row.method, *numbers, _difference(row), _seconds(row)])} |"
        yield ""
    yield (
        f"Target and draft: {bundle['name']}, version {bundle['version']}, {_parameters(bundle['parameters'])}. "
        f"Training: processor time; of target and draft it is in the run's folder. Item-kNN: the newest {header['recent']} "
        f"items; all methods learn from the train split, {REFITTED} from the validation too. "
        f"{machine['processor']}, {machine['cores']} cores, revision {header['revision'] or 'unknown'}, "
        f"{header['created_at']}."
    )
    for method, settings in header["settings"].items():
        yield from ("", f"{method}: {', '.join(f'{name} {value}' for name, value in settings.items())}.")


def _by_table(rows: Iterable[RecommenderRow]) -> Iterator[tuple[str, list[RecommenderRow]]]:
    """Title and rows of each table that there is."""
    rows = list(rows)
    for name, title in _TABLES.items():
        if found := [row for row in rows if row.table == name]:
            yield title, found


def _difference(row: RecommenderRow) -> str:
    found = row.recall_less_item_knn
    return f"{found.value:+.4f} [{found.low:+.4f}, {found.high:+.4f}]" if found else ""


def _seconds(row: RecommenderRow) -> str:
    return "" if row.train_seconds is None else f"{row.train_seconds:.1f} s"


def _parameters(parameters: Mapping[str, int]) -> str:
    return ", ".join(f"{role} {count:,} parameters" for role, count in parameters.items())
