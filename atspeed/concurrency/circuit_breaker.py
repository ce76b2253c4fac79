"""A circuit breaker: calls to a dependency that fails are stopped for a while."""

from __future__ import annotations

import time
from collections.abc import Callable


class CircuitBreaker:
    """Stop the calls to a dependency after failures in a row.

    Closed: calls are made. Open: no call is made for `open_seconds`. Half-open: that time is over, and the next call is the
    probe; the other callers wait for its outcome as if the breaker were still open. A success closes the breaker.

    Args:
        failure_threshold: number of failures in a row that open the breaker.
        open_seconds: length of the open state.
        clock: seconds on a monotonic clock.
    """

    def __init__(
        self, failure_threshold: int, open_seconds: float, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._failure_threshold = failure_threshold
        self._open_seconds = open_seconds
        self._clock = clock
        self._failures = 0
        self._open_until = -float("inf")

    @property
    def is_open(self) -> bool:
        """Return whether calls are stopped now."""
        return self._clock() < self._open_until

    def allow(self) -> bool:
        """Return whether a call may be made. In the half-open state the first caller gets the probe."""
        if self.is_open:
            return False
        if self._failures >= self._failure_threshold:
            self._open_until = self._clock() + self._open_seconds
        return True

    def record_success(self) -> None:
        """Close the breaker."""
        self._failures = 0
        self._open_until = -float("inf")

    def record_failure(self, retry_after_seconds: float | None = None) -> None:
        """Count a failure. retry_after_seconds: a shorter open state, when the dependency asked for it."""
        self._failures += 1
        if self._failures >= self._failure_threshold:
            seconds = self._open_seconds if retry_after_seconds is None else retry_after_seconds
            self._open_until = self._clock() + min(self._open_seconds, seconds)
