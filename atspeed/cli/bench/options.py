"""What the benchmarks' commands share: options, whose histories they ask, and where results go."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from atspeed.cli.options import MAX_SEED, MAX_USERS, err
from atspeed.engine.bundle.manifest import Bundle

if TYPE_CHECKING:
    from atspeed.benchmarks.results import Result


def _writable(path: Path | None) -> Path | None:
    """Refuse a path that cannot be written: after hours of measuring it would be too late."""
    if path is not None:
        there = next(folder for folder in (path, *path.absolute().parents) if folder.exists())
        if not os.access(there, os.W_OK) or (there != path and not there.is_dir()):
            raise typer.BadParameter(f"{there} cannot be written to.")
    return path


MAX_ITEMS = 100_000  # of a history, as a service may be set to allow
JsonFile = Annotated[
    Path | None, typer.Option("--json", help="Write the result to this file.", dir_okay=False, callback=_writable)
]
Histories = Annotated[
    Path | None,
    typer.Option(
        "--histories", help="Lines of `user item item ...`; random histories without it.", exists=True, dir_okay=False
    ),
]
Users = Annotated[int, typer.Option(min=1, max=MAX_USERS, help="How many users.")]
LeastItems = Annotated[
    int,
    typer.Option(
        "--min-items", min=2, max=MAX_ITEMS, help="Only users with so many items: one comes after the prefix is kept."
    ),
]
MostItems = Annotated[
    int | None,
    typer.Option(
        "--max-items",
        min=2,
        max=MAX_ITEMS,
        help="Only users with at most so many: a window that moves on keeps no prefix.",
    ),
]
Seed = Annotated[int, typer.Option(min=0, max=MAX_SEED, help="Seed of everything random.")]
Tolerance = Annotated[float, typer.Option(min=0, help="Mode tolerance: largest score gap.")]
Page = Annotated[
    Path | None,
    typer.Option("--report", help="Write a page about it into this folder.", file_okay=False, callback=_writable),
]


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
