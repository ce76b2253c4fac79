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
