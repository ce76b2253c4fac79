"""What a model's calls cost now: its published curve, held true by what calls really take."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from engine.beams import Float64
from engine.cost import PassCost
from engine.cost_curve import CostCurve

_MEMORY = 100
"""Calls that an average remembers, about."""
_TRUST = 3
"""Calls that a curve counts for: the first ones, on connections that are not open yet, do not decide alone."""
_OUTLIER = 4.0
_OUTLIER_NS = 500_000


class Decayed:
    """A mean that forgets: of many values each has a `memory`-th of the weight when it comes, the guess that of `trust` ones."""

    def __init__(self, guess: float, memory: int = _MEMORY, trust: int = 0) -> None:
        self.value, self._memory, self._count = guess, memory, trust

    def add(self, value: float) -> None:
        """One value more."""
        self._count = min(self._memory, self._count + 1)
        self.value += (value - self.value) / self._count


class DecayedLine:
    """y = a + b * x by least squares that forget, neither negative; level until values of x that differ have been seen."""

    def __init__(self, memory: int = _MEMORY) -> None:
        self._x, self._y, self._xx, self._xy = (Decayed(0.0, memory) for _ in range(4))

    def add(self, x: float, y: float) -> None:
        """One point more."""
        for mean, value in ((self._x, x), (self._y, y), (self._xx, x * x), (self._xy, x * y)):
            mean.add(value)

    def at(self, x: npt.ArrayLike) -> Float64:
        """The line at these places."""
        spread = self._xx.value - self._x.value**2
        slope = max(0.0, self._xy.value - self._x.value * self._y.value) / spread if spread > 1.0 else 0.0
        if slope * self._x.value > self._y.value:  # it would be negative at 0
            slope = self._y.value / self._x.value
        return np.maximum(0.0, self._y.value + slope * (np.asarray(x, dtype=np.float64) - self._x.value))


@dataclass(frozen=True)
class Pass:
    """The shape of a pass. new, cached: tokens computed and tokens found. nodes: trie nodes evaluated."""

    new: int
    cached: int
    nodes: int


class CallCosts:
    """What calls of one model cost: the passes by its curve, times how wrong that was lately, and what a call takes besides.

    Under load one pass computes several requests' tokens. What then counts is a request's share of it, T(c * new) / c for c
    requests in a pass; with c = 1 that is the latency. Times are in nanoseconds. A call that took far longer than expected counts
    as one that took four times as long: a pause of the machine says little of the next call, and a lasting change shows in many.
    """

    def __init__(self, curve: CostCurve) -> None:
        self._curve = curve
        self._log_error, self._besides = Decayed(0.0, trust=_TRUST), DecayedLine()
        self._together = Decayed(1.0)

    def forward(self, new: npt.ArrayLike, cached: npt.ArrayLike) -> Float64:
        """A request's share of passes in which it has so many tokens, broadcast."""
        together = self._together.value
        alone = self._curve.predict(together * np.asarray(new, dtype=np.float64), cached)
        return np.asarray(math.exp(self._log_error.value) / together * alone)

    def besides(self, nodes: npt.ArrayLike) -> Float64:
        """What a call over so many nodes takes outside its passes: choosing children, the network, turning arrays to messages."""
        return self._besides.at(nodes)

    def predict(self, passes: Sequence[Pass], cost: PassCost) -> float:
        """The time in the model of one call's passes that were made, with what other requests had in them; `observe` it later."""
        return math.exp(self._log_error.value) * self._by_curve(passes, cost)

    def observe(self, passes: Sequence[Pass], cost: PassCost, wait_ns: int) -> None:
        """One call that went well: its passes, what the service says that they took, and how long the answer took to come."""
        self._together.add(max(1, cost.batch_requests))
        known, outlier = self._log_error.value, math.log(_OUTLIER)
        error = math.log(max(1, cost.forward_ns) / self._by_curve(passes, cost))
        self._log_error.add(min(max(error, known - outlier), known + outlier))
        nodes, besides = sum(one.nodes for one in passes), max(0, wait_ns - cost.forward_ns - cost.queue_ns)
        self._besides.add(nodes, min(besides, _OUTLIER * float(self.besides(nodes)) + _OUTLIER_NS))

    def _by_curve(self, passes: Sequence[Pass], cost: PassCost) -> float:
        """Of the passes as they were, with the other requests' tokens and padding."""
        others = max(1.0, cost.batch_tokens / max(1, cost.new_tokens))
        return sum(float(self._curve.predict(others * one.new, one.cached)) for one in passes)
