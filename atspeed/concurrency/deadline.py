"""The deadline of a request."""

from __future__ import annotations

import time

from atspeed.errors import DeadlineExceededError


class Deadline:
    """The deadline of a request, on the monotonic clock. Every call carries the remaining time."""

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds
        self._at = time.monotonic() + seconds

    @property
    def passed(self) -> bool:
        """Return whether it has passed, within the tolerance of `is_over`."""
        return is_over(self._at - time.monotonic(), self._seconds)

    def left(self) -> float:
        """Return the remaining seconds. Raises DeadlineExceededError if there are none."""
        left = self._at - time.monotonic()
        if left <= 0:
            raise DeadlineExceededError("the request's deadline has passed")
        return left


def is_over(left: float, seconds: float) -> bool:
    """Return whether a cancellation with `left` seconds left of `seconds` was the deadline.

    gRPC rounds the time that it sends up, by 1 % at most. The caller may cancel some milliseconds before the deadline on the
    server's clock.
    """
    # 20 ms cover these milliseconds on a busy machine.
    return left <= 0.02 + 0.01 * seconds
