"""Options that the benchmark commands share, and how they write results."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Protocol

import typer

from atspeed.benchmarks.provenance import provenance
from atspeed.benchmarks.results import Result
from atspeed.cli.options import err, optional, out
from atspeed.engine.bundle.manifest import Bundle
from atspeed.engine.search.list_comparison import Verdict


def _require_plots(folder: Path | None) -> Path | None:
    """Fail before the measurement, not after it, if pages cannot be drawn."""
    if folder is not None:
        optional("matplotlib")
    return folder


JsonFile = Annotated[Path | None, typer.Option("--json", help="Write the result to this file.")]
Histories = Annotated[
    Path | None, typer.Option("--histories", help="Lines of `user item item ...`; random histories without it.")
]
Users = Annotated[int, typer.Option(min=1, help="Number of users.")]
LeastItems = Annotated[
    int, typer.Option("--min-items", min=2, help="Only users with at least so many items. The last one is new.")
]
MostItems = Annotated[
    int | None,
    typer.Option(
        "--max-items", min=2, help="Only users with at most so many items: a window that moves keeps no prefix."
    ),
]
Seed = Annotated[int, typer.Option(min=0, help="Seed of everything random.")]
Tolerance = Annotated[float, typer.Option(min=0, help="Largest score gap of mode tolerance.")]
Threads = Annotated[int, typer.Option(min=1, help="Threads of a pass.")]
PageFolder = Annotated[
    Path | None,
    typer.Option("--report", help="Write a page into this folder.", file_okay=False, callback=_require_plots),
]


class PageWriter(Protocol):
    """Module that writes the page of a result file."""

    def write(self, result: Result, folder: Path) -> Path:
        """Write the page. Returns its path."""


def source_of(histories: Path | None) -> str:
    """Return the name of the histories' source for readers of the result."""
    return histories.name if histories else "random items"


def save(
    path: Path | None,
    bundle: Bundle | None,
    seed: int,
    rows: Sequence[Mapping[str, Any]],
    about: Mapping[str, Any] | None = None,
    *,
    page: tuple[Path | None, str] = (None, ""),
) -> None:
    """Add the provenance to a result, and write its file and its page if they are asked for.

    about: more fields of the header. page: the page's folder, and the module that writes it.
    """
    result = Result(provenance(bundle, seed=seed) | dict(about or {}), rows)
    if path is not None:
        result.write(path)
        print_written(path)
    folder, module = page
    if folder is not None:
        write_page(module, result, folder)


def write_page(module: str, result: Result, folder: Path) -> None:
    """Write the page of a result."""
    writer: PageWriter = optional(module)
    print_written(writer.write(result, folder))


def print_written(path: Path) -> None:
    """Print the path of a written file."""
    err.print(f"written to {path}", highlight=False, soft_wrap=True)


def print_identity(reference: str, rows: Iterable[Any], suffix: str = "") -> None:
    """Print whether all lists are the reference's (yes, near-tie or NO), and how many are not."""
    counts = dict.fromkeys((Verdict.IDENTICAL, Verdict.NEAR_TIE, Verdict.DIFFERENT), 0)
    for row in rows:
        counts[Verdict.IDENTICAL] += row.identical
        counts[Verdict.NEAR_TIE] += row.near_ties
        counts[Verdict.DIFFERENT] += row.different
    worst = Verdict.worst(verdict for verdict, count in counts.items() if count)
    answer = f"{worst.answer} ({', '.join(f'{count} {verdict}' for verdict, count in counts.items())})"
    out.print(f"identical to {reference}: {answer}{suffix}", highlight=False)
