"""Catalogues of any size, made by numpy in seconds: skewed codes, as residual quantisation has them."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from atspeed.engine.bundle.catalogue import Catalogue
from atspeed.engine.bundle.id_index import Ids

_SKEW = 0.6  # exponent of the Zipf law of a level's codes: 10^7 items then fill a third of the third level's prefixes
_DIGITS = 9


def synthetic_catalogue(items: int, codebook_sizes: tuple[int, ...], seed: int) -> Catalogue:
    """So many items, some of which share a path, under ids in no relation to their paths. At most 10^9."""
    rng = np.random.default_rng(seed)
    codes = np.empty((items, len(codebook_sizes)), dtype=np.int32)
    for level, size in enumerate(codebook_sizes):
        share = np.arange(1, size + 1) ** -_SKEW
        codes[:, level] = np.searchsorted(np.cumsum(share / share.sum())[:-1], rng.random(items))
    return Catalogue.build(_ids(rng.permutation(items)), codes, codebook_sizes)


def _ids(numbers: npt.NDArray[np.int64]) -> Ids:
    """`B` and the number in digits; [n]."""
    letters = np.empty((len(numbers), 1 + _DIGITS), dtype=np.uint8)
    letters[:, 0] = ord("B")
    for place in range(_DIGITS, 0, -1):
        letters[:, place] = ord("0") + numbers % 10
        numbers = numbers // 10
    return letters.view(f"S{1 + _DIGITS}").ravel()
