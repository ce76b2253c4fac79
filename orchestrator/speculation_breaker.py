"""Whether the draft may be asked: until too many of its lists have turned out wrong."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable

SWITCHED_OFF = "speculation: switched off, lists differed from the target's own"
"""What a list that did without the draft for this reason says of it."""


class SpeculationBreaker:
    """A switch that goes off for good, for this process, when `mismatches` come within `window_seconds`; at 0 it never does."""

    def __init__(
        self, mismatches: int = 3, window_seconds: float = 3_600.0, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._window_seconds = window_seconds
        self._clock = clock
        self._seen: deque[float] = deque(maxlen=mismatches)
        self.on = True

    def mismatch(self) -> None:
        """A list that the draft had a part in was not the target's own."""
        now = self._clock()
        self._seen.append(now)
        if self._seen and len(self._seen) == self._seen.maxlen and now - self._seen[0] <= self._window_seconds:
            self.on = False
