"""The cost curve: the time of a pass by its tokens, measured at warm-up."""

from __future__ import annotations

import time
from bisect import bisect_right
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import numpy.typing as npt

from atspeed.engine.arrays import Float64, Int64
from atspeed.engine.model.pass_stats import PassStats

MeasurePass = Callable[[int, int], Awaitable[PassStats]]
"""Makes a pass over (new tokens, cached tokens)."""

# New tokens that are measured. The most informative sizes come first, as the time may be up before the last.
NEW_TOKENS = (1, 64, 16, 256, 4, 128)
_MIN_SIZES = 2  # a line needs two points
_REPEATS = 5  # the median then ignores two disturbed passes


@dataclass(frozen=True)
class CostCurve:
    """The time of a pass of one model on one machine, on a grid of new and cached tokens.

    Raises ValueError when an array breaks its rules.

    Attributes:
        new_tokens: int64 [n], ascending, at least 1.
        cached_tokens: int64 [c], ascending, at least 0.
        forward_ns: nanoseconds, float64 [n, c]. They fall along neither axis.
    """

    new_tokens: Int64
    cached_tokens: Int64
    forward_ns: Float64

    def __post_init__(self) -> None:
        for name, axis, least in (("new_tokens", self.new_tokens, 1), ("cached_tokens", self.cached_tokens, 0)):
            if not len(axis) or axis[0] < least or (np.diff(axis) <= 0).any():
                raise ValueError(f"{name}: must be ascending and begin with at least {least}")
        if self.forward_ns.shape != (len(self.new_tokens), len(self.cached_tokens)):
            raise ValueError("forward_ns: must have a value for every pair of new and cached tokens")
        if not np.isfinite(self.forward_ns).all() or (self.forward_ns <= 0).any():
            raise ValueError("forward_ns: must be finite and above 0")
        if (np.diff(self.forward_ns, axis=0) < 0).any() or (np.diff(self.forward_ns, axis=1) < 0).any():
            raise ValueError("forward_ns: must not fall with the tokens")

    @classmethod
    def smoothed(cls, new_tokens: Sequence[int], cached_tokens: Sequence[int], forward_ns: Float64) -> CostCurve:
        """Build a curve from noisy measurements [n, c]: a larger pass gets at least the time of a smaller one."""
        risen = np.maximum.accumulate(np.maximum.accumulate(forward_ns, axis=0), axis=1)
        return cls(np.asarray(new_tokens, dtype=np.int64), np.asarray(cached_tokens, dtype=np.int64), risen)

    def predict(self, new_tokens: npt.ArrayLike, cached_tokens: npt.ArrayLike = 0) -> Float64:
        """Return the nanoseconds of passes of these sizes, broadcast.

        The prediction is bilinear on the grid, linear beyond the most new tokens, and constant beyond the other ends.
        """
        if np.ndim(cached_tokens) == 0:  # the planner's case, several times per request
            return self._at(np.asarray(new_tokens, dtype=np.float64), float(cached_tokens))  # type: ignore[arg-type]
        low, high, share = _between(self.new_tokens, np.asarray(new_tokens, dtype=np.float64))
        left, right, part = _between(self.cached_tokens, np.asarray(cached_tokens, dtype=np.float64))
        part = np.minimum(part, 1.0)  # constant beyond the most cached tokens
        grid = self.forward_ns
        # Interpolate along the cached tokens, at both neighbours of the new tokens, then between these two.
        at_low = grid[low, left] + part * (grid[low, right] - grid[low, left])
        at_high = grid[high, left] + part * (grid[high, right] - grid[high, left])
        predicted: Float64 = at_low + share * (at_high - at_low)
        return predicted

    def pass_ns(self, new_tokens: float, cached_tokens: float) -> float:
        """Return `predict` of one pass, without arrays: each pass of a request is predicted once or twice."""
        axis, cached_axis, columns = self._lists
        right = bisect_right(cached_axis, cached_tokens)
        low = bisect_right(axis, new_tokens, hi=max(1, len(axis) - 1)) - 1
        if right in {0, len(cached_axis)}:
            return _on_line(axis, columns[max(0, right - 1)], low, new_tokens)
        share = (cached_tokens - cached_axis[right - 1]) / (cached_axis[right] - cached_axis[right - 1])
        shorter, longer = (_on_line(axis, columns[at], low, new_tokens) for at in (right - 1, right))
        return shorter + share * (longer - shorter)

    @cached_property
    def _lists(self) -> tuple[list[int], list[int], list[list[float]]]:
        """Return the axes and the columns of the grid, of one number of cached tokens each."""
        return self.new_tokens.tolist(), self.cached_tokens.tolist(), self.forward_ns.T.tolist()

    def _at(self, new: Float64, cached: float) -> Float64:
        """Return the nanoseconds of passes over new tokens, broadcast, on the same cached ones."""
        axis, ns = self.new_tokens, self._column(cached)
        if len(axis) == 1:
            return np.full_like(new, ns[0])
        slope = (ns[-1] - ns[-2]) / (axis[-1] - axis[-2])
        return np.asarray(np.interp(new, axis, ns) + slope * np.maximum(0.0, new - axis[-1]))

    def _column(self, cached: float) -> Float64:
        """Return the nanoseconds of passes over each of `self.new_tokens` on `cached` tokens: float64 [n]."""
        axis = self.cached_tokens
        right = int(np.searchsorted(axis, cached, side="right"))
        if right in {0, len(axis)}:
            return np.asarray(self.forward_ns[:, max(0, right - 1)])
        share = (cached - axis[right - 1]) / (axis[right] - axis[right - 1])
        shorter, longer = self.forward_ns[:, right - 1], self.forward_ns[:, right]
        return np.asarray(shorter + share * (longer - shorter))

    def saved(self, found: int, cached: int) -> float:
        """Return the nanoseconds that a pass on `cached` tokens saves when the KV of `found` more is read from a cache."""
        return float(self.predict(1 + found, cached) - self.predict(1, cached + found))


def _on_line(axis: list[int], ns: list[float], low: int, new: float) -> float:
    """Return the time at `new` tokens, on the line through the points `low` and `low + 1`; constant before the first point."""
    if low < 0 or len(axis) == 1:
        return ns[0]
    slope = (ns[low + 1] - ns[low]) / (axis[low + 1] - axis[low])
    return ns[low] + slope * (new - axis[low])


def _between(axis: Int64, at: Float64) -> tuple[Int64, Int64, Float64]:
    """Return each value's neighbours on an axis, by index, and its share of the way between them; above 1 beyond the end."""
    low = np.minimum(np.maximum(np.searchsorted(axis, at, side="right") - 1, 0), max(0, len(axis) - 2))
    high = np.minimum(low + 1, len(axis) - 1)
    share = np.maximum(0.0, at - axis[low]) / np.maximum(1, axis[high] - axis[low])
    return low, high, share


async def measure(
    measure_pass: MeasurePass, most_new_tokens: int, cached_tokens: Sequence[int], seconds: float
) -> CostCurve:
    """Measure a model's passes in rounds over the grid; the curve takes the median of each cell.

    The rounds end when the time is up or each cell has been measured `_REPEATS` times. At least the first two sizes are
    measured. A disturbance affects neighbouring cells in one round, and other cells in the next.
    """
    rounds: dict[int, list[list[int]]] = {}
    until = time.monotonic() + seconds
    for new in [new for new in NEW_TOKENS if new <= most_new_tokens] * _REPEATS:
        if time.monotonic() > until and len(rounds) >= _MIN_SIZES:
            break
        costs = [await measure_pass(new, cached) for cached in cached_tokens]
        rounds.setdefault(new, []).append([max(1, cost.forward_ns) for cost in costs])
    sizes = sorted(rounds)
    return CostCurve.smoothed(sizes, cached_tokens, np.asarray([np.median(rounds[new], axis=0) for new in sizes]))
