"""Histories of the users whose lists are measured, and their prompts."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from zlib import crc32

import numpy as np

from atspeed.benchmarks.results import BenchmarkError
from atspeed.engine.arrays import Int64
from atspeed.engine.bundle.catalogue import Catalogue
from atspeed.engine.bundle.manifest import ModelEntry
from atspeed.engine.bundle.prompt import PromptTemplate
from atspeed.engine.bundle.prompts import Prompts
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
    unserved: frozenset[str] = frozenset(),
) -> list[History]:
    """Return the histories of `users` users, drawn from a file, or random ones where there is no file.

    A file with fewer such users gives all of them. unserved: items that the histories of the file may hold besides those of the
    catalogue. Raises BenchmarkError when it has none.
    """
    if most_items is not None and most_items < least_items:
        raise BenchmarkError(f"--max-items {most_items} is less than --min-items {least_items}")
    rng = np.random.default_rng(seed)
    if path is None:
        longest = most_items or max(least_items, _LONGEST_RANDOM)
        return [_random_history(catalogue, rng, least_items, longest) for _ in range(users)]
    histories = [
        history
        for history in read_histories(path, catalogue, unserved)
        if least_items <= len(history) <= (most_items or len(history))
    ]
    if not histories:
        bound = "or more" if most_items is None else f"to {most_items}"
        raise BenchmarkError(f"{path}: no user with {least_items} {bound} items")
    chosen = np.sort(rng.permutation(len(histories))[:users])
    return [histories[index] for index in chosen]


def read_histories(path: Path, catalogue: Catalogue, unserved: frozenset[str] = frozenset()) -> list[History]:
    """Read a file of histories that `atspeed import` reads. Raises ImportingError or LineError that names file and line."""
    return list(histories_of(path, catalogue.known_ids() | unserved, Path("the bundle's catalogue")).values())


def served_parts(histories: Sequence[History], catalogue: Catalogue) -> list[History]:
    """Return histories without the items that the catalogue lacks, which serving leaves out too. Empty ones are dropped."""
    known = catalogue.known_ids()
    parts = (tuple(item for item in history if item in known) for history in histories)
    return [history for history in parts if history]


def user_fields(template: PromptTemplate, history: Sequence[str]) -> dict[str, str]:
    """Return values of the users' fields that prompts hold. They depend on the items only, and all values occur."""
    return template.mixed(crc32("\n".join(history).encode()))


def _random_history(catalogue: Catalogue, rng: np.random.Generator, least_items: int, longest: int) -> History:
    items = rng.integers(catalogue.items, size=rng.integers(least_items, longest + 1))
    return tuple(catalogue.id_of(int(item)) for item in items)


def prompt_tokens(catalogue: Catalogue, entry: ModelEntry, history: Sequence[int]) -> Int64:
    """Return the prompt of a model whose items are their codes, int64 [prompt]. history: item indices."""
    return Prompts.of(entry, catalogue).tokens(np.asarray(history, dtype=np.int64))
