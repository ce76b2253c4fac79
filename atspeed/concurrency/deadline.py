"""When a request must be done."""

from __future__ import annotations

import time

from atspeed.errors import DeadlineExceededError


class Deadline:
    """When a request must be done, on the monotonic clock. The time left travels with every call."""

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds
        self._at = time.monotonic() + seconds

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


def is_over(left: float, seconds: float) -> bool:
    """Whether a cancellation with `left` seconds left of a deadline of `seconds` was that deadline.

    gRPC rounds the time that it sends up, by 1 % at most, and the caller may give up some milliseconds before the server's clock
    says so.
    """
    return left <= 0.02 + 0.01 * seconds
