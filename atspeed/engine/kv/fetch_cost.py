"""Decision to read keys and values from Redis: measured reads against recomputing."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from atspeed.engine.ewma import Ewma

RecomputeNs = Callable[[int, int], float]
"""Extra nanoseconds of a pass that computes (missing tokens, on so many cached ones) instead of reading them."""

# Prior: a server on the same network, half a millisecond away, with a link of about 8 Gbit/s. It has the form of two reads,
# of nothing and of 1 MiB, each with a tenth of a real read's weight: the first real reads outweigh it.
_PRIOR_LATENCY_NS = 500_000.0
_PRIOR_NS_PER_BYTE = 1.0
_PRIOR_BYTES = 2.0**20
_PRIOR_WEIGHT = 0.1
# Reads that the estimates remember. Redis is shared and its load changes within seconds, so this is less than `ewma.MEMORY`.
# The number was chosen, not measured.
_MEMORY = 20
_DECAY = 1 - 1 / _MEMORY
# Largest ratio of a read's time to the expected one that is learned from: a read that the machine held up says little of the
# next. Chosen, not measured: eight still lets the estimate follow a slower server within a few reads.
_MAX_SLOWDOWN = 8.0
# One look-up in so many that do not pay is made all the same (6 %), so that a Redis that recovers is noticed.
_EXPLORATION_INTERVAL = 16


@dataclass(frozen=True)
class FetchStatistics:
    """Counts of look-ups that memory could not answer in full.

    Attributes:
        asked: look-ups that read Redis.
        hits: reads that found something.
        explored: reads that were not expected to pay.
        not_worth: look-ups that did not read Redis.
        writes_not_worth: prompts that were not written, because reading them would never pay.
    """

    asked: int = 0
    hits: int = 0
    explored: int = 0
    not_worth: int = 0
    writes_not_worth: int = 0


class FetchCost:
    """Time of a read, latency + bytes * time per byte, by least squares over decayed reads.

    The fit differs from `EwmaRegression`: its prior never fades, since reads of one size do not tell the time per byte.

    Attributes:
        hit_share: mean share of the bytes asked for that reads find; 1 before the first read.
    """

    def __init__(self) -> None:
        self._hit_share = Ewma(1.0, _MEMORY, guess_weight=_MEMORY)
        at_prior = _PRIOR_LATENCY_NS + _PRIOR_NS_PER_BYTE * _PRIOR_BYTES
        # Sums over reads of 1, x, x^2, y and x * y, where x is bytes and y nanoseconds: float64 [5].
        moments = [2.0, _PRIOR_BYTES, _PRIOR_BYTES**2, _PRIOR_LATENCY_NS + at_prior, _PRIOR_BYTES * at_prior]
        self._prior = _PRIOR_WEIGHT * np.array(moments)
        self._moments = self._prior

    @property
    def hit_share(self) -> float:
        """Return the mean share of the bytes asked for that reads find."""
        return self._hit_share.value

    def predict(self, size: float) -> float:
        """Return the nanoseconds of a read that finds `size` bytes."""
        weight, x, xx, y, xy = self._moments.tolist()
        variance = weight * xx - x**2
        per_byte = max(0.0, (weight * xy - x * y) / variance)
        latency = (y - per_byte * x) / weight
        if latency < 0:  # the best line through the origin
            return float(size * xy / xx)
        return float(latency + per_byte * size)

    def observe(self, asked: int, found: int, ns: float) -> None:
        """Learn from one read of `asked` bytes that found `found` of them."""
        ns = min(ns, _MAX_SLOWDOWN * max(_PRIOR_LATENCY_NS, self.predict(found)))
        self._hit_share.add(found / max(1, asked))
        newest = np.array([1.0, found, found**2, ns, found * ns], dtype=np.float64)
        self._moments = self._prior + _DECAY * (self._moments - self._prior) + newest


class FetchPolicy:
    """Decision for each look-up to read Redis, and for each prompt to write it.

    Without `recompute_ns` the answer is always yes. With it, a read pays if the time that it saves, times the share that reads
    find, exceeds the time of the read. Use it from the event loop only.
    """

    def __init__(self, bytes_per_token: int, recompute_ns: RecomputeNs | None = None) -> None:
        self.cost = FetchCost()
        self.recompute_ns = recompute_ns
        self._bytes_per_token = bytes_per_token
        self._unpaid = 0
        self._asked = 0
        self._hits = 0
        self._explored = 0
        self._not_worth = 0
        self._writes_not_worth = 0

    @property
    def statistics(self) -> FetchStatistics:
        """Return the counters as they are now."""
        return FetchStatistics(self._asked, self._hits, self._explored, self._not_worth, self._writes_not_worth)

    def should_read(self, missing: int, cached: int) -> bool:
        """Decide to read `missing` tokens that follow `cached` ones, which memory holds. Counts the answer."""
        if not self._pays(missing, cached, self.cost.hit_share):
            self._unpaid += 1
            if self._unpaid % _EXPLORATION_INTERVAL:
                self._not_worth += 1
                return False
            self._explored += 1
        self._asked += 1
        return True

    def should_write(self, tokens: int) -> bool:
        """Decide to write a prompt of so many tokens: no if even finding all of it would save nothing. Counts refusals."""
        pays = self._pays(tokens, 0, 1.0)
        self._writes_not_worth += not pays
        return pays

    def observe(self, asked: int, found: int, ns: float) -> None:
        """Learn from a read of `asked` tokens that found `found` of them."""
        self._hits += found > 0
        self.cost.observe(asked * self._bytes_per_token, found * self._bytes_per_token, ns)

    def _pays(self, missing: int, cached: int, found_share: float) -> bool:
        if self.recompute_ns is None:
            return True
        saved = found_share * self.recompute_ns(missing, cached)
        return saved > self.cost.predict(found_share * missing * self._bytes_per_token)
