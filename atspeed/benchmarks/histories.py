"""Histories of the users whose lists are measured, and their prompts."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from atspeed.benchmarks.results import BenchmarkError
from atspeed.engine.arrays import Int64
from atspeed.engine.bundle.catalogue import Catalogue
from atspeed.engine.bundle.manifest import ModelEntry
from atspeed.importing.histories import histories_of

History = tuple[str, ...]
_LONGEST_RANDOM = 30  # longer than the prompts of the trained bundles, so that their window is used


def choose_histories(
    catalogue: Catalogue,
    path: Path | None,
    users: int,
    seed: int,
    *,
    least_items: int = 1,
    most_items: int | None = None,
) -> list[History]:
    """Return the histories of `users` users, drawn from a file, or random ones where there is no file.

    A file with fewer such users gives all of them. Raises BenchmarkError when it has none.
    """
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
    """Read a file of histories that `atspeed import` reads. Raises ImportingError or LineError that names file and line."""
    return list(histories_of(path, catalogue.known_ids(), Path("the bundle's catalogue")).values())


def _random_history(catalogue: Catalogue, rng: np.random.Generator, least_items: int, longest: int) -> History:
    items = rng.integers(catalogue.items, size=rng.integers(least_items, longest + 1))
    return tuple(catalogue.id_of(int(item)) for item in items)


def prompt_tokens(catalogue: Catalogue, entry: ModelEntry, history: Sequence[int]) -> Int64:
    """Return a model's prompt for a history of item indices, as serving builds it; int64 [prompt]."""
    window = np.asarray(history, dtype=np.int64)[entry.prompt.window_start(len(history)) :]
    return entry.prompt.tokens(catalogue.spelled_tokens(window, entry.code_tokens))
