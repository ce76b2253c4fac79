"""A small synthetic data set that a model can learn, for tests and first trials."""

from __future__ import annotations

import numpy as np

from atspeed.training.data import CatalogueItem, Dataset, leave_last_out

_TERMS = "Made up; no terms."


def synthetic(*, items: int, users: int, levels: int, codebook_size: int, seed: int) -> Dataset:
    """Generate users who mostly move from each item to one of its two fixed successors, and sometimes to any item.

    Codes are random. The last item of every ten shares its code path with the one before it.
    """
    rng = np.random.default_rng(seed)
    codes = rng.integers(codebook_size, size=(items, levels))
    codes[9::10] = codes[8::10][: len(codes[9::10])]
    successors = rng.integers(items, size=(items, 2))
    histories = {str(user): _walk(rng, successors) for user in range(users)}
    catalogue = tuple(
        CatalogueItem(f"item-{index}", f"item number {index}", tuple(map(int, path)))
        for index, path in enumerate(codes)
    )
    named = {user: tuple(catalogue[index].id for index in walk) for user, walk in histories.items()}
    return leave_last_out("synthetic", _TERMS, catalogue, named)


def _walk(rng: np.random.Generator, successors: np.ndarray) -> list[int]:
    """Return 3 to 15 items; one step in ten goes to any item."""
    walk = [int(rng.integers(len(successors)))]
    for _ in range(int(rng.integers(2, 15))):
        anywhere = rng.random() < 0.1
        walk.append(int(rng.integers(len(successors)) if anywhere else rng.choice(successors[walk[-1]])))
    return walk
