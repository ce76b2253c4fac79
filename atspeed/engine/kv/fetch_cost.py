"""Whether to ask Redis for keys and values: what reading takes, measured by real reads, against what computing takes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

RecomputeNs = Callable[[int, int], float]
"""Nanoseconds that a pass takes longer for computing (missing tokens, on so many cached ones) instead of finding them."""

# A server on the same network; forgotten as soon as real reads say otherwise.
_PRIOR_LATENCY_NS = 500_000.0
_PRIOR_NS_PER_BYTE = 1.0
_PRIOR_WEIGHT = 0.1
_PRIOR_BYTES = 2.0**20
_DECAY = 0.95
# A single read that the machine held up counts as one this many times slower than expected, no more.
_WORST = 8.0
_EXPLORE_EVERY = 16


@dataclass(frozen=True)
class FetchStatistics:
    """What was decided so far, in look-ups that memory could not answer whole. hits: those asked that found something.

    asked: look-ups for which Redis was read; explored: those among them that did not seem worth it. not_worth: look-ups that
    were spared. writes_not_worth: prompts that were not written because reading them would never pay.
    """

    asked: int = 0
    hits: int = 0
    explored: int = 0
    not_worth: int = 0
    writes_not_worth: int = 0


class FetchCost:
    """Nanoseconds of a read, latency + bytes * time per byte: least squares over the latest reads, older ones count less.

    A read that finds nothing tells the latency, so both terms are always known. `found` is the share of what was asked for
    that was there, decayed alike.
    """

    def __init__(self) -> None:
        self.found = 1.0
        self._weight = 2 * _PRIOR_WEIGHT
        self._x = _PRIOR_WEIGHT * _PRIOR_BYTES
        self._xx = _PRIOR_WEIGHT * _PRIOR_BYTES**2
        at_prior = _PRIOR_LATENCY_NS + _PRIOR_NS_PER_BYTE * _PRIOR_BYTES
        self._y = _PRIOR_WEIGHT * (_PRIOR_LATENCY_NS + at_prior)
        self._xy = _PRIOR_WEIGHT * _PRIOR_BYTES * at_prior
        self._prior = (self._weight, self._x, self._xx, self._y, self._xy)

    def predict(self, size: float) -> float:
        """Nanoseconds of a read that finds `size` bytes."""
        variance = self._weight * self._xx - self._x**2
        per_byte = max(0.0, (self._weight * self._xy - self._x * self._y) / variance)
        latency = (self._y - per_byte * self._x) / self._weight
        if latency < 0:
            return size * self._xy / self._xx
        return latency + per_byte * size

    def observe(self, asked: int, found: int, ns: float) -> None:
        """Learn from one read: so many bytes asked for, so many found."""
        ns = min(ns, _WORST * max(_PRIOR_LATENCY_NS, self.predict(found)))
        self.found += (1 - _DECAY) * (found / max(1, asked) - self.found)
        # The prior itself does not decay: it stands in for what the latest reads do not tell, such as the time per byte.
        weight, x, xx, y, xy = self._prior
        self._weight = weight + _DECAY * (self._weight - weight) + 1
        self._x = x + _DECAY * (self._x - x) + found
        self._xx = xx + _DECAY * (self._xx - xx) + found**2
        self._y = y + _DECAY * (self._y - y) + ns
        self._xy = xy + _DECAY * (self._xy - xy) + found * ns


class FetchPolicy:
    """Decides for each look-up whether Redis is read, and for each prompt whether it is written.

    Without `recompute_ns`, always. With it, where reading is expected to be quicker: the share that is usually found times the
    time that it saves, against what such a read takes. Every sixteenth look-up that does not seem worth it is made all the
    same, so that the estimate recovers when Redis does. For the event loop only.
    """

    def __init__(self, bytes_per_token: int, recompute_ns: RecomputeNs | None = None) -> None:
        self.cost = FetchCost()
        self.recompute_ns = recompute_ns
        self._bytes_per_token = bytes_per_token
        self._spared = 0
        self._asked = self._hits = self._explored = self._not_worth = self._writes_not_worth = 0

    @property
    def statistics(self) -> FetchStatistics:
        """A snapshot of the counters."""
        return FetchStatistics(self._asked, self._hits, self._explored, self._not_worth, self._writes_not_worth)

    def wants_read(self, missing: int, cached: int) -> bool:
        """Whether to ask Redis for `missing` tokens that follow `cached` ones, which memory has. Counts the answer."""
        if not self._pays(missing, cached, self.cost.found):
            self._spared += 1
            if self._spared % _EXPLORE_EVERY:
                self._not_worth += 1
                return False
            self._explored += 1
        self._asked += 1
        return True

    def wants_write(self, tokens: int) -> bool:
        """Whether to write a prompt of so many tokens: not where even finding it whole would save nothing. Counts refusals."""
        wanted = self._pays(tokens, 0, 1.0)
        self._writes_not_worth += not wanted
        return wanted

    def observe(self, asked: int, found: int, ns: float) -> None:
        """A read that Redis answered: so many tokens asked for, so many found."""
        self._hits += found > 0
        self.cost.observe(asked * self._bytes_per_token, found * self._bytes_per_token, ns)

    def _pays(self, missing: int, cached: int, found: float) -> bool:
        if self.recompute_ns is None:
            return True
        saved = found * self.recompute_ns(missing, cached)
        return saved > self.cost.predict(found * missing * self._bytes_per_token)
