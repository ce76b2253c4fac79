"""Result files of benchmarks, and the tables and pages that are made of their rows.

A row is a frozen dataclass. Its JSON is `asdict`, and it is read back by its types. The columns of a table are declared once
and serve the terminal and the page.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol, TypeVar

from pydantic import TypeAdapter, ValidationError
from rich import box
from rich.table import Table

from atspeed.benchmarks.near_ties import Verdict
from atspeed.engine.files.json_file import with_nulls, write_json

Row = TypeVar("Row")
Columns = Sequence[tuple[str, Callable[[Row], str]]]
"""The name of each column, and how its cell is spelled."""

_TEXT_COLUMNS = {"", "mode", "way", "rule", "draft", "prefix"}  # aligned to the left; all others are numbers


class BenchmarkError(Exception):
    """Error of a measurement that cannot be made. The text is one line and names what to change."""


@dataclass(frozen=True)
class Result:
    """The content of a result file.

    Attributes:
        header: where the result comes from, and what was asked for.
        rows: what was measured, as JSON values.
    """

    header: Mapping[str, Any]
    rows: Sequence[Mapping[str, Any]]

    def write(self, path: Path) -> None:
        """Write the file, and its folder where there is none. What is no number becomes null, so that the rest is kept."""
        write_json(path, with_nulls({"header": self.header, "rows": self.rows}))

    @classmethod
    def read(cls, path: Path) -> Result:
        """Read a result file. Raises BenchmarkError that names the file."""
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
            return cls(dict(content["header"]), [dict(row) for row in content["rows"]])
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise BenchmarkError(f"{path}: not a result file: {error!r}") from error

    def rows_of(self, benchmark: str, row: type[Row], *, kind: str | None = None) -> list[Row]:
        """Return the rows as dataclasses; of files with several kinds of rows, those of one kind.

        Raises BenchmarkError when the file is the result of another benchmark.
        """
        if self.header.get("benchmark") != benchmark:
            raise BenchmarkError(f"the result file is not one of the benchmark {benchmark}")
        found = [one for one in self.rows if kind is None or one["kind"] == kind]
        try:
            return TypeAdapter(list[row]).validate_python(found)  # type: ignore[valid-type] # a type of run time
        except ValidationError as error:
            first = error.errors()[0]
            place = ".".join(map(str, first["loc"]))
            raise BenchmarkError(
                f"the result file of {benchmark} has another format: {place}: {first['msg']}"
            ) from error


def to_json(rows: Iterable[Any], *, omit_none: bool = False, **labels: str) -> list[dict[str, Any]]:
    """Return the JSON values of rows. labels: written before the fields of every row."""
    values = [{**labels, **asdict(row)} for row in rows]
    return [{name: each for name, each in row.items() if not (omit_none and each is None)} for row in values]


class Compared(Protocol):
    """Row with counts of lists that were compared with reference lists."""

    @property
    def identical(self) -> int:
        """Lists that are the reference's."""

    @property
    def near_ties(self) -> int:
        """Lists that differ by near-ties only."""

    @property
    def different(self) -> int:
        """Lists that differ."""


COMPARISON_COLUMNS: Columns[Compared] = (
    ("same", lambda row: str(row.identical)),
    ("near ties", lambda row: str(row.near_ties)),
    ("differ", lambda row: str(row.different)),
)


def comparison_counts(verdicts: Sequence[Verdict]) -> dict[str, int]:
    """Count verdicts, by the names of a row's fields."""
    names = {"identical": Verdict.IDENTICAL, "near_ties": Verdict.NEAR_TIE, "different": Verdict.DIFFERENT}
    return {name: verdicts.count(verdict) for name, verdict in names.items()}


def cells(columns: Columns[Row], rows: Iterable[Row]) -> list[list[str]]:
    """Return the cells of a table, line by line."""
    return [[spell(row) for _, spell in columns] for row in rows]


def terminal_table(title: str, columns: Columns[Row], rows: Iterable[Row]) -> Table:
    """Return a table for the terminal. Column names are broken at spaces, so that many columns fit."""
    return grid(title, [name for name, _ in columns], cells(columns, rows))


def grid(title: str, names: Iterable[str], lines: Iterable[Sequence[str]]) -> Table:
    """Return a table of given cells for the terminal."""
    table = Table(title=title, box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False)
    for name in names:
        table.add_column(name.replace(" ", "\n"), justify="left" if name in _TEXT_COLUMNS else "right")
    for line in lines:
        table.add_row(*line)
    return table
