"""When a request must be done."""

from __future__ import annotations

import time

from atspeed.rpc.errors import DeadlineExceededError, is_over


class Deadline:
    """When a request must be done, on the monotonic clock. The time left travels with every call."""

    def __init__(self, seconds: float) -> None:
        self._seconds, self._at = seconds, time.monotonic() + seconds

    @property
    def passed(self) -> bool:
        """Whether it has passed, as far as the two ends' clocks and gRPC's rounding can tell."""
        return is_over(self._at - time.monotonic(), self._seconds)

    def left(self) -> float:
        """Seconds left. Raises DeadlineExceededError when there are none."""
        left = self._at - time.monotonic()
        if left <= 0:
            raise DeadlineExceededError("the request's deadline has passed")
        return left
