"""Confidence intervals of means over users."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

_RESAMPLES = 2000  # the ends of an interval then move by about 2 % of its width from seed to seed
_NORMAL_95 = 1.96  # quantile 0.975 of the normal distribution


@dataclass(frozen=True)
class Interval:
    """A mean with its 95 % interval."""

    value: float
    low: float
    high: float


def half_width(values: Sequence[float]) -> float:
    """Return half of the 95 % interval of a mean, by the normal distribution; 0 for fewer than two values."""
    return float(_NORMAL_95 * np.std(values, ddof=1) / np.sqrt(len(values))) if len(values) > 1 else 0.0


def bootstrap(values: Sequence[float], *, seed: int) -> Interval:
    """Return the mean and its 95 % percentile interval over resamples of the users. Pass differences for paired measures."""
    array, rng = np.asarray(values, dtype=np.float64), np.random.default_rng(seed)
    means = [array[rng.integers(len(array), size=len(array))].mean() for _ in range(_RESAMPLES)]
    low, high = np.percentile(means, [2.5, 97.5])
    return Interval(float(array.mean()), float(low), float(high))
