"""What a pass costs on this machine: measured at warm-up, asked by everyone who has to weigh tokens against time."""

from __future__ import annotations

import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from atspeed.engine.arrays import Float64, Int64
from atspeed.engine.model.pass_stats import PassStats

Rehearse = Callable[[int, int], Awaitable[PassStats]]

# New tokens that are measured; those that say most of the curve come first, as time may be up before the last.
NEW_TOKENS = (1, 64, 16, 256, 4, 128)
_AT_LEAST = 2
_REPEATS = 5


@dataclass(frozen=True)
class CostCurve:
    """T(new tokens, cached tokens) of one model on one machine: nanoseconds of a pass, on a grid.

    new_tokens: int64 [n], cached_tokens: int64 [c], both ascending. forward_ns: float64 [n, c], falls in neither axis. Raises
    ValueError when it is not so.
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
        """From measurements [n, c], which noise may have made fall here and there: a larger pass costs as much at least."""
        risen = np.maximum.accumulate(np.maximum.accumulate(forward_ns, axis=0), axis=1)
        return cls(np.asarray(new_tokens, dtype=np.int64), np.asarray(cached_tokens, dtype=np.int64), risen)

    def predict(self, new_tokens: npt.ArrayLike, cached_tokens: npt.ArrayLike = 0) -> Float64:
        """Nanoseconds of passes of these shapes, broadcast: bilinear on the grid, linear beyond the most new tokens, level beyond
        its other ends.
        """
        if np.ndim(cached_tokens) == 0:  # all that a planner asks, several times for a request
            return self._at(np.asarray(new_tokens, dtype=np.float64), float(cached_tokens))  # type: ignore[arg-type]
        low, high, share = _between(self.new_tokens, np.asarray(new_tokens, dtype=np.float64))
        left, right, part = _between(self.cached_tokens, np.asarray(cached_tokens, dtype=np.float64))
        part = np.minimum(part, 1.0)
        grid = self.forward_ns
        at_low = grid[low, left] + part * (grid[low, right] - grid[low, left])
        at_high = grid[high, left] + part * (grid[high, right] - grid[high, left])
        predicted: Float64 = at_low + share * (at_high - at_low)
        return predicted

    def _at(self, new: Float64, cached: float) -> Float64:
        """Passes over new tokens, broadcast, on the same cached ones."""
        axis, ns = self.new_tokens, self._column(cached)
        if len(axis) == 1:
            return np.full_like(new, ns[0])
        slope = (ns[-1] - ns[-2]) / (axis[-1] - axis[-2])
        return np.asarray(np.interp(new, axis, ns) + slope * np.maximum(0.0, new - axis[-1]))

    def _column(self, cached: float) -> Float64:
        """Passes over each of `new_tokens` on so many cached ones: float64 [n]."""
        axis = self.cached_tokens
        right = int(np.searchsorted(axis, cached, side="right"))
        if right in {0, len(axis)}:
            return np.asarray(self.forward_ns[:, max(0, right - 1)])
        share = (cached - axis[right - 1]) / (axis[right] - axis[right - 1])
        shorter, longer = self.forward_ns[:, right - 1], self.forward_ns[:, right]
        return np.asarray(shorter + share * (longer - shorter))

    def saved(self, found: int, cached: int) -> float:
        """Nanoseconds that a pass on `cached` tokens gains where the keys and values of `found` more need not be computed."""
        return float(self.predict(1 + found, cached) - self.predict(1, cached + found))


def _between(axis: Int64, at: Float64) -> tuple[Int64, Int64, Float64]:
    """Each value's neighbours on an axis, by index, and its way from the first to the second; above 1 beyond the end."""
    low = np.minimum(np.maximum(np.searchsorted(axis, at, side="right") - 1, 0), max(0, len(axis) - 2))
    high = np.minimum(low + 1, len(axis) - 1)
    share = np.maximum(0.0, at - axis[low]) / np.maximum(1, axis[high] - axis[low])
    return low, high, share


async def measure(rehearse: Rehearse, most_new_tokens: int, cached_tokens: Sequence[int], seconds: float) -> CostCurve:
    """Measure a model by its own passes, `rehearse(new, cached)`: round after round over the grid until the time is up or
    each cell has been measured often enough, and the median of each.

    At least the first two sizes are measured. A disturbance meets neighbouring cells in one round and spares them in the next.
    """
    rounds: dict[int, list[list[int]]] = {}
    until = time.monotonic() + seconds
    for new in [new for new in NEW_TOKENS if new <= most_new_tokens] * _REPEATS:
        if time.monotonic() > until and len(rounds) >= _AT_LEAST:
            break
        costs = [await rehearse(new, cached) for cached in cached_tokens]
        rounds.setdefault(new, []).append([max(1, cost.forward_ns) for cost in costs])
    sizes = sorted(rounds)
    return CostCurve.smoothed(sizes, cached_tokens, np.asarray([np.median(rounds[new], axis=0) for new in sizes]))
