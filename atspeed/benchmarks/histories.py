"""Whose lists are measured: real users' histories from a file, or random ones from the catalogue."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from atspeed.benchmarks.errors import BenchmarkError
from atspeed.engine.bundle.catalogue import Catalogue
from atspeed.engine.errors import LineError
from atspeed.engine.files.lines import read_lines, words

History = tuple[str, ...]
_LONGEST_RANDOM = 30


def choose_histories(
    catalogue: Catalogue,
    path: Path | None,
    users: int,
    seed: int,
    *,
    least_items: int = 1,
    most_items: int | None = None,
) -> list[History]:
    """`users` histories of so many items out of a file (all, where it has fewer), or as many random ones without one."""
    if most_items is not None and most_items < least_items:
        raise BenchmarkError(f"--max-items {most_items} is less than --min-items {least_items}")
    rng = np.random.default_rng(seed)
    if path is None:
        longest = most_items or max(least_items, _LONGEST_RANDOM)
        return [_random_history(catalogue, rng, least_items, longest) for _ in range(users)]
    histories = [
        history
        for history in read_histories(path, catalogue)
        if least_items <= len(history) <= (most_items or len(history))
    ]
    if not histories:
        bound = "or more" if most_items is None else f"to {most_items}"
        raise BenchmarkError(f"{path}: no user with {least_items} {bound} items")
    chosen = np.sort(rng.permutation(len(histories))[:users])
    return [histories[index] for index in chosen]


def read_histories(path: Path, catalogue: Catalogue) -> list[History]:
    """Lines of `user item item ...`; users without items are left out. Raises BenchmarkError naming file and line."""
    try:
        lines = list(read_lines(path))
    except LineError as error:
        raise BenchmarkError(str(error)) from error
    histories = []
    for number, line in lines:
        _, *items = words(line)
        unknown = next((item for item, index in zip(items, catalogue.find(items), strict=True) if index < 0), None)
        if unknown is not None:
            raise BenchmarkError(f"{path}:{number}: item {unknown!r} is not in the bundle's catalogue")
        if items:
            histories.append(tuple(items))
    if not histories:
        raise BenchmarkError(f"{path}: no user with an item")
    return histories


def _random_history(catalogue: Catalogue, rng: np.random.Generator, least_items: int, longest: int) -> History:
    items = rng.integers(catalogue.items, size=rng.integers(least_items, longest + 1))
    return tuple(catalogue.id_of(int(item)) for item in items)
