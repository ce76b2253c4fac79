"""Means and lines that forget exponentially: recent values weigh most (EWMA)."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

MEMORY = 100
"""Values that an estimate remembers.

Chosen by simulation: after a draft became useful, the planner used it for good after 121 requests. With a memory of 400 it
took 202, and lists took the same time (docs/log.md). Shorter memories were not tried.
"""
# Variance of x up to which a line stays level. x is a count here: counts that differ by one tell no slope.
_MIN_VARIANCE = 1.0


class Ewma:
    """Exponentially weighted moving average (EWMA).

    Up to `memory` values it is their plain mean. From then on each new value has the weight 1 / memory.

    Attributes:
        value: the mean; before the first value, the guess.
    """

    def __init__(self, guess: float, memory: int = MEMORY, guess_weight: int = 0) -> None:
        """Start at a guess that counts for `guess_weight` values."""
        self.value = guess
        self._memory = memory
        self._count = guess_weight

    def add(self, value: float) -> None:
        """Add a value."""
        self._count = min(self._memory, self._count + 1)
        self.value += (value - self.value) / self._count


class EwmaRegression:
    """Least squares that forget: y = a + b * x, with one slope b and an intercept a for each group of points.

    The slope comes from deviations within a group, so a difference between groups is not taken for a slope. Neither a nor b
    is negative. The line is level until one group has shown different x. A group without points uses the line of the
    group that was seen last.
    """

    def __init__(self, groups: int, memory: int = MEMORY) -> None:
        self._x = [Ewma(0.0, memory) for _ in range(groups)]
        self._y = [Ewma(0.0, memory) for _ in range(groups)]
        self._variance = Ewma(0.0, memory)
        self._covariance = Ewma(0.0, memory)
        self._seen = [False] * groups
        self._last = 0

    def add(self, x: float, y: float, group: int = 0) -> None:
        """Add a point."""
        mean_x = self._x[group]
        mean_y = self._y[group]
        if self._seen[group]:
            deviation = x - mean_x.value
            self._variance.add(deviation**2)
            self._covariance.add(deviation * (y - mean_y.value))
        self._seen[group] = True
        self._last = group
        mean_x.add(x)
        mean_y.add(y)

    def predict(self, x: npt.ArrayLike, group: int = 0) -> npt.NDArray[np.float64]:
        """Return the line of a group at x [...]."""
        mean_x, mean_y, slope = self._line(group)
        return np.maximum(0.0, mean_y + slope * (np.asarray(x, dtype=np.float64) - mean_x))

    def at(self, x: float, group: int = 0) -> float:
        """Return the line of a group at one x."""
        mean_x, mean_y, slope = self._line(group)
        return max(0.0, mean_y + slope * (x - mean_x))

    def _line(self, group: int) -> tuple[float, float, float]:
        """Return a point of a group's line, x and y, and the slope."""
        known = group if self._seen[group] else self._last
        mean_x, mean_y = self._x[known].value, self._y[known].value
        slope = 0.0
        if self._variance.value > _MIN_VARIANCE:
            slope = max(0.0, self._covariance.value) / self._variance.value
        if slope * mean_x > mean_y:  # the intercept would be negative: take the line through the origin
            slope = mean_y / mean_x
        return mean_x, mean_y, slope
