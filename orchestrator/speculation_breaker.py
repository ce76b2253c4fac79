"""The circuit breaker of speculation, opened by differences in shadow checks."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable


class SpeculationBreaker:
    """Disable speculation for the life of the process after `mismatches` differences within `window_seconds`.

    Attributes:
        enabled: whether requests may speculate. Always true when `mismatches` is 0.
    """

    def __init__(
        self, mismatches: int = 3, window_seconds: float = 3_600.0, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._window_seconds = window_seconds
        self._clock = clock
        self._mismatch_times: deque[float] = deque(maxlen=mismatches)
        self.enabled = True

    def record_mismatch(self) -> None:
        """Count a speculative list that was not the target's own."""
        now = self._clock()
        times = self._mismatch_times
        times.append(now)
        if times and len(times) == times.maxlen and now - times[0] <= self._window_seconds:
            self.enabled = False
