"""Decision to read keys and values from Redis: mean time of reads, or recomputing."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from atspeed.engine.ewma import Ewma

RecomputeNs = Callable[[int, int], float]
"""Extra nanoseconds of a pass that computes (missing tokens, on so many cached ones) instead of reading them."""

# Time of a read before the first one: half a millisecond, a server on the same network.
_GUESS_NS = 500_000.0
# Reads that the means remember. Redis is shared and its load changes within seconds, so this is less than `ewma.MEMORY`.
# The number was chosen, not measured.
_MEMORY = 20
# Largest ratio of a read's time to the mean that is learned from: a read that the machine held up says little of the next.
# Chosen, not measured: eight still lets the mean follow a slower server within a few reads.
_MAX_SLOWDOWN = 8.0
# One look-up in so many that do not pay is a probe (6 %), so that a Redis that recovers is noticed.
_PROBE_INTERVAL = 16


@dataclass
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


class FetchPolicy:
    """Decision for each look-up to read Redis, and for each prompt to write it. Use it from the event loop only.

    Without `recompute_ns` the answer is always yes. With it, a read pays if the time that it saves, times the share that reads
    find, exceeds the mean time of recent reads.

    Attributes:
        recompute_ns: time of computing tokens instead.
        statistics: the counters.
    """

    def __init__(self, recompute_ns: RecomputeNs | None = None) -> None:
        self.recompute_ns = recompute_ns
        self.statistics = FetchStatistics()
        self._read_ns = Ewma(_GUESS_NS, _MEMORY)
        self._found_share = Ewma(1.0, _MEMORY, guess_weight=_MEMORY)

    def should_read(self, missing: int, cached: int) -> bool:
        """Decide to read `missing` tokens that follow `cached` ones, which memory holds. Counts the answer."""
        counts = self.statistics
        if not self._pays(missing, cached, self._found_share.value):
            if (counts.not_worth + counts.explored + 1) % _PROBE_INTERVAL:
                counts.not_worth += 1
                return False
            counts.explored += 1
        counts.asked += 1
        return True

    def should_write(self, tokens: int) -> bool:
        """Decide to write a prompt of so many tokens: no if even finding all of it would save nothing. Counts refusals."""
        pays = self._pays(tokens, 0, 1.0)
        self.statistics.writes_not_worth += not pays
        return pays

    def observe(self, asked: int, found: int, ns: float) -> None:
        """Learn from a read of `asked` tokens that found `found` of them."""
        self.statistics.hits += found > 0
        self._found_share.add(found / max(1, asked))
        self._read_ns.add(min(ns, _MAX_SLOWDOWN * max(_GUESS_NS, self._read_ns.value)))

    def _pays(self, missing: int, cached: int, found_share: float) -> bool:
        return self.recompute_ns is None or found_share * self.recompute_ns(missing, cached) > self._read_ns.value
