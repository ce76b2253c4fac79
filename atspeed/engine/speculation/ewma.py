"""Averages that forget."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from atspeed.engine.search.beams import Float64

MEMORY = 100
"""Values that an average remembers, about."""


class Ewma:
    """A mean that forgets: of many values each has a `memory`-th of the weight when it comes, the guess that of `trust` ones."""

    def __init__(self, guess: float, memory: int = MEMORY, trust: int = 0) -> None:
        self.value, self._memory, self._count = guess, memory, trust

    def add(self, value: float) -> None:
        """One value more."""
        self._count = min(self._memory, self._count + 1)
        self.value += (value - self.value) / self._count


class EwmaRegression:
    """y = a + b * x by least squares that forget, neither negative: one b, an `a` for each kind of x (0, 1, ...).

    So what tells the kinds apart is not taken for the slope, though their x differ too. Level until values of x that differ
    have been seen of one kind; a kind that was never seen is taken for the one that was seen last.
    """

    def __init__(self, kinds: int, memory: int = MEMORY) -> None:
        self._x, self._y = ([Ewma(0.0, memory) for _ in range(kinds)] for _ in range(2))
        self._xx, self._xy = Ewma(0.0, memory), Ewma(0.0, memory)
        self._seen, self._last = [False] * kinds, 0

    def add(self, x: float, y: float, kind: int = 0) -> None:
        """One point more."""
        mean_x, mean_y = self._x[kind], self._y[kind]
        if self._seen[kind]:
            off_x, off_y = x - mean_x.value, y - mean_y.value
            self._xx.add(off_x**2)
            self._xy.add(off_x * off_y)
        self._seen[kind], self._last = True, kind
        mean_x.add(x)
        mean_y.add(y)

    def at(self, x: npt.ArrayLike, kind: int = 0) -> Float64:
        """A kind's line at these places."""
        known = kind if self._seen[kind] else self._last
        mean_x, mean_y = self._x[known].value, self._y[known].value
        slope = max(0.0, self._xy.value) / self._xx.value if self._xx.value > 1.0 else 0.0
        if slope * mean_x > mean_y:  # it would be negative at 0
            slope = mean_y / mean_x
        return np.maximum(0.0, mean_y + slope * (np.asarray(x, dtype=np.float64) - mean_x))
