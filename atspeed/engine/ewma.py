"""Means and lines that forget exponentially: recent values weigh most (EWMA)."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

MEMORY = 100
"""Values that an estimate remembers.

Chosen by simulation: after a draft became useful, the planner used it for good after 121 requests. With a memory of 400 it
took 202, and lists took the same time (docs/log.md). Shorter memories were not tried.
"""
# Variance of x up to which a line keeps the slope that it began with. x is a count here: counts that differ by one tell no slope.
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
    is negative. The line is level until one group has shown different x, or through the origin if `proportional`. A group
    without points uses the line of the group that was seen last. Groups are numbered by the caller.
    """

    def __init__(self, memory: int = MEMORY, *, proportional: bool = False) -> None:
        self._proportional = proportional
        self._memory = memory
        self._means: dict[int, tuple[Ewma, Ewma]] = {}  # group -> mean x, mean y
        self._variance = Ewma(0.0, memory)
        self._covariance = Ewma(0.0, memory)
        self._last = 0

    def add(self, x: float, y: float, group: int = 0) -> None:
        """Add a point."""
        if group in self._means:
            mean_x, mean_y = self._means[group]
            deviation = x - mean_x.value
            self._variance.add(deviation**2)
            self._covariance.add(deviation * (y - mean_y.value))
        else:
            mean_x, mean_y = self._means[group] = Ewma(0.0, self._memory), Ewma(0.0, self._memory)
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
        if not self._means:
            return 0.0, 0.0, 0.0
        x, y = self._means[group if group in self._means else self._last]
        mean_x, mean_y, slope = x.value, y.value, 0.0
        if self._proportional and mean_x > 0:
            slope = mean_y / mean_x
        if self._variance.value > _MIN_VARIANCE:
            slope = max(0.0, self._covariance.value) / self._variance.value
        if slope * mean_x > mean_y:  # the intercept would be negative: take the line through the origin
            slope = mean_y / mean_x
        return mean_x, mean_y, slope
