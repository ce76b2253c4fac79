"""Quotas of callers: token buckets, one for each caller of a replica.

A bucket holds `burst` requests and is filled at `rate` requests a second. A replica counts its own calls only: behind a balancer
a caller gets the quota of each replica.
"""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import Callable, Hashable
from dataclasses import dataclass
from typing import Final

from atspeed.errors import Reason, ResourceExhaustedError

# Chosen: the buckets of this many callers take about 2 MB. The caller that has been silent longest is dropped first; its bucket
# was probably full again.
_MAX_CALLERS: Final = 10_000

LARGEST_CALL = 3
"""Requests that an explanation with items counts as, the most expensive call.

Its searches are the list, the paths of the items and the wider list; see orchestrator/explanation/explain.py.
"""


@dataclass(frozen=True)
class Quota:
    """The requests that a caller may make.

    Attributes:
        rate: requests a second, above 0.
        burst: requests at once, at least 1.
    """

    rate: float
    burst: float


def quota_of(rate: float | None, burst: float | None) -> Quota | None:
    """Return the quota of a rate in requests a second; None without a rate.

    The default burst is that of two seconds, and large enough for the most expensive call.
    """
    return None if rate is None else Quota(rate, burst if burst is not None else max(LARGEST_CALL, 2 * rate))


class Quotas:
    """The buckets of all callers. For one thread. clock: returns seconds."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        # Caller -> (requests in the bucket, time at which they were counted).
        self._buckets: OrderedDict[Hashable, tuple[float, float]] = OrderedDict()

    def take(self, caller: Hashable, quota: Quota, requests: int) -> None:
        """Take requests out of a caller's bucket. Raises ResourceExhaustedError, with the time until they would be there.

        A refused call takes nothing. A call of more requests than `burst` can never succeed, and its error has no such time.
        """
        now = self._clock()
        held, counted = self._buckets.pop(caller, (quota.burst, now))
        held = min(quota.burst, held + (now - counted) * quota.rate)
        missing = requests - held
        self._buckets[caller] = (held if missing > 0 else -missing, now)
        if len(self._buckets) > _MAX_CALLERS:
            self._buckets.popitem(last=False)
        if requests > quota.burst:
            problem = f"{requests} requests in one call are more than the quota allows at once ({quota.burst:g})"
            raise ResourceExhaustedError(problem, reason=Reason.QUOTA_EXCEEDED)
        if missing > 0:
            problem = f"the quota of {quota.rate:g} requests a second is used up"
            raise ResourceExhaustedError(
                problem, reason=Reason.QUOTA_EXCEEDED, retry_after_seconds=missing / quota.rate
            )
