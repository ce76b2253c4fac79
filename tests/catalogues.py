"""Random catalogues."""

from __future__ import annotations

import numpy as np

from atspeed.engine.bundle.catalogue import Catalogue


def random_catalogue(items: int, codebook_sizes: tuple[int, ...], seed: int) -> Catalogue:
    """Random code paths, some of them shared, under ids `item-<n>`."""
    rng = np.random.default_rng(seed)
    codes = np.stack([np.minimum(rng.geometric(0.15, items) - 1, size - 1) for size in codebook_sizes], axis=1)
    return Catalogue.build([f"item-{n}" for n in range(items)], codes, codebook_sizes)


def new_catalogue(seed: int = 1, items: int = 400) -> Catalogue:
    """Random items, several of which share a code path."""
    return random_catalogue(items, (16, 12, 10, 8), seed)


def tailed_catalogue(items: int, codebook_sizes: tuple[int, ...], seed: int) -> Catalogue:
    """Random paths of one to L codes, each with a scored tail token behind it: the last code of every level but the first.

    The items of a path are in a random order.
    """
    rng = np.random.default_rng(seed)
    codes = np.full((items, len(codebook_sizes) + 1), -1)
    for level, size in enumerate(codebook_sizes):
        codes[:, level] = np.minimum(rng.geometric(0.3, items) - 1, size - 1)
    ends, tails = rng.integers(1, len(codebook_sizes) + 1, items), np.array([*codebook_sizes, 0])
    for path, end in zip(codes, ends.tolist(), strict=True):
        path[end:] = [tails[end], *[-1] * (len(path) - end - 1)]
    sizes = (codebook_sizes[0], *(size + 1 for size in codebook_sizes[1:]), 1)
    ids, rank = [f"item-{n}" for n in range(items)], rng.permutation(items)
    return Catalogue.build(ids, codes, sizes, tail_start=[*codebook_sizes, 0], rank=rank)
