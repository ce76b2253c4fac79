"""How far a mean over users can be trusted."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

_RESAMPLES = 2000
_NORMAL_95 = 1.96


@dataclass(frozen=True)
class Interval:
    """A mean with its 95 % interval."""

    value: float
    low: float
    high: float


def half_width(values: Sequence[float]) -> float:
    """Half of the 95 % interval of a mean, by the normal law; 0 of fewer than two."""
    return float(_NORMAL_95 * np.std(values, ddof=1) / np.sqrt(len(values))) if len(values) > 1 else 0.0


def bootstrap(values: Sequence[float], *, seed: int) -> Interval:
    """The mean and its 95 % percentile interval over resamples of the users; for paired measures, of their differences."""
    array, rng = np.asarray(values, dtype=np.float64), np.random.default_rng(seed)
    means = [array[rng.integers(len(array), size=len(array))].mean() for _ in range(_RESAMPLES)]
    low, high = np.percentile(means, [2.5, 97.5])
    return Interval(float(array.mean()), float(low), float(high))
