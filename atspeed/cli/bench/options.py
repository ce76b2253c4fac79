"""What the benchmarks' commands share: options, whose histories they ask, and where results go."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from atspeed.cli.options import err
from atspeed.engine.bundle.manifest import Bundle

if TYPE_CHECKING:
    from atspeed.benchmarks.results import Result

JsonFile = Annotated[Path | None, typer.Option("--json", help="Write the result to this file.")]
Histories = Annotated[
    Path | None, typer.Option("--histories", help="Lines of `user item item ...`; random histories without it.")
]
Users = Annotated[int, typer.Option(min=1, help="How many users.")]
LeastItems = Annotated[
    int, typer.Option("--min-items", min=2, help="Only users with so many items: one comes after the prefix is kept.")
]
MostItems = Annotated[
    int | None,
    typer.Option("--max-items", min=2, help="Only users with at most so many: a window that moves on keeps no prefix."),
]
Seed = Annotated[int, typer.Option(min=0, help="Seed of everything random.")]
Tolerance = Annotated[float, typer.Option(min=0, help="Mode tolerance: largest score gap.")]
Page = Annotated[Path | None, typer.Option("--report", help="Write a page about it into this folder.", file_okay=False)]


def chosen_histories(bundle: Bundle, path: Path | None, users: int, seed: int) -> list[tuple[str, ...]]:
    """Real users' histories from a file, or random ones without it."""
    from atspeed.benchmarks.histories import choose_histories

    return choose_histories(bundle.catalogue(), path, users, seed)


def save(
    path: Path | None,
    bundle: Bundle | None,
    seed: int,
    rows: Sequence[Mapping[str, Any]],
    about: Mapping[str, Any] | None = None,
) -> Result:
    """The result with where it comes from, and the file where one is wanted. about: more of the header."""
    from atspeed.benchmarks.provenance import provenance
    from atspeed.benchmarks.results import Result

    result = Result(provenance(bundle, seed=seed) | dict(about or {}), rows)
    if path is not None:
        result.write(path)
        written(path)
    return result


def written(path: Path) -> None:
    """Say where something was written to."""
    err.print(f"written to {path}", highlight=False, soft_wrap=True)
