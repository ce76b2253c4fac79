"""Options that the benchmark commands share, and how they write results."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Protocol

import typer

from atspeed.benchmarks.near_ties import Verdict
from atspeed.benchmarks.provenance import provenance
from atspeed.benchmarks.results import BenchmarkError, Result
from atspeed.cli.options import MAX_SEED, MAX_THREADS, MAX_USERS, CommandError, err, optional, out
from atspeed.engine.bundle.bundle import Bundle


def _require_writable(path: Path | None) -> Path | None:
    """Fail before the measurement, not after it, if a path cannot be written."""
    if path is not None:
        existing = next(folder for folder in (path, *path.absolute().parents) if folder.exists())
        if not os.access(existing, os.W_OK) or (existing != path and not existing.is_dir()):
            raise typer.BadParameter(f"{existing} cannot be written to.")
    return path


def _require_plots(folder: Path | None) -> Path | None:
    """Fail before the measurement, not after it, if pages cannot be drawn or written."""
    if _require_writable(folder) is not None:
        optional("matplotlib")
    return folder


MAX_ITEMS = 100_000  # of a history, as a service may be set to allow
JsonFile = Annotated[
    Path | None,
    typer.Option("--json", help="Write the result to this file.", dir_okay=False, callback=_require_writable),
]
Histories = Annotated[
    Path | None,
    typer.Option(
        "--histories",
        help="Lines of `user item item ...`, or a .csv, .jsonl or .json of `atspeed import`; random histories without it.",
        exists=True,
        dir_okay=False,
    ),
]
Users = Annotated[int, typer.Option(min=1, max=MAX_USERS, help="Number of users.")]
LeastItems = Annotated[
    int,
    typer.Option(
        "--min-items", min=2, max=MAX_ITEMS, help="Only users with at least so many items. The last one is new."
    ),
]
MostItems = Annotated[
    int | None,
    typer.Option(
        "--max-items",
        min=2,
        max=MAX_ITEMS,
        help="Only users with at most so many items: a window that moves keeps no prefix.",
    ),
]
Seed = Annotated[int, typer.Option(min=0, max=MAX_SEED, help="Seed of everything random.")]
Tolerance = Annotated[float, typer.Option(min=0, help="Largest score gap of mode tolerance.")]
Threads = Annotated[int, typer.Option(min=1, max=MAX_THREADS, help="Threads of a pass.")]
PageFolder = Annotated[
    Path | None,
    typer.Option("--report", help="Write a page into this folder.", file_okay=False, callback=_require_plots),
]


ResultFile = Annotated[
    Path, typer.Argument(help="Result file that a benchmark wrote with --json.", exists=True, dir_okay=False)
]
OutFolder = Annotated[Path, typer.Option("--out", help="Folder for the page and its plots.", file_okay=False)]


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


def write_report(path: Path, folder: Path, pages: Mapping[str, str]) -> None:
    """Write the page of a result file. pages: the modules that write pages, by the `benchmark` of a header."""
    result = Result.read(path)
    benchmark = str(result.header.get("benchmark"))
    if benchmark not in pages:
        raise CommandError(f"{path}: the benchmark {benchmark} has no page; known are {', '.join(pages)}")
    try:
        write_page(pages[benchmark], result, folder)
    except BenchmarkError as error:
        raise CommandError(f"{path}: {error}") from error
    except (AttributeError, LookupError, TypeError, ValueError) as error:
        raise CommandError(f"{path}: not a result that {pages[benchmark]} can show: {error!r}") from error


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
