"""Token buckets of callers: what they let through, and when a refused call may come again."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from atspeed.errors import Reason, ResourceExhaustedError
from atspeed.security.quotas import LARGEST_CALL, Quota, Quotas, quota_of


class Clock:
    """A clock that tests set."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


def refused(quotas: Quotas, quota: Quota, requests: int) -> ResourceExhaustedError | None:
    """The refusal of a call; None for a call that is let through."""
    try:
        quotas.take("shop", quota, requests)
    except ResourceExhaustedError as error:
        return error
    return None


@given(
    rate=st.floats(0.1, 100),
    burst=st.floats(1, 50),
    calls=st.lists(st.tuples(st.floats(0, 5), st.integers(1, 10)), max_size=60),
)
def test_no_stretch_of_time_has_more_requests_than_burst_and_rate_allow(
    rate: float, burst: float, calls: list[tuple[float, int]]
) -> None:
    clock = Clock()
    quotas, quota = Quotas(clock), Quota(rate, burst)
    taken: list[tuple[float, int]] = []
    for wait, requests in calls:
        clock.now += wait
        if (refusal := refused(quotas, quota, requests)) is not None:
            assert refusal.reason is Reason.QUOTA_EXCEEDED
            assert (refusal.retry_after_seconds is None) is (requests > burst)
            if refusal.retry_after_seconds is None:
                continue
            clock.now += refusal.retry_after_seconds + 1e-6
            assert refused(quotas, quota, requests) is None  # the hint is long enough
        taken.append((clock.now, requests))
    for first in range(len(taken)):
        for last in range(first, len(taken)):
            lasted = taken[last][0] - taken[first][0]
            assert sum(requests for _, requests in taken[first : last + 1]) <= burst + rate * lasted + 1e-3


def test_one_caller_does_not_use_the_quota_of_another() -> None:
    clock, quota = Clock(), Quota(1, 2)
    quotas = Quotas(clock)
    for _ in range(2):
        quotas.take("shop", quota, 1)
    with pytest.raises(ResourceExhaustedError, match="the quota of 1 requests a second is used up"):
        quotas.take("shop", quota, 1)
    quotas.take("app", quota, 2)


def test_callers_that_were_silent_longest_are_forgotten_first() -> None:
    clock, quota = Clock(), Quota(0.001, 1)
    quotas = Quotas(clock)
    quotas.take("first", quota, 1)
    for number in range(9_999):
        quotas.take(f"caller-{number}", quota, 1)
    with pytest.raises(ResourceExhaustedError):
        quotas.take("first", quota, 1)  # still known, and now the latest one
    quotas.take("one more", quota, 1)
    quotas.take("caller-0", quota, 1)  # forgotten, so its bucket is full again


def test_a_default_burst_lets_the_most_expensive_call_in() -> None:
    assert quota_of(0.5, None) == Quota(0.5, LARGEST_CALL)
    assert quota_of(50, None) == Quota(50, 100)
    assert quota_of(50, 1) == Quota(50, 1)
    assert quota_of(None, None) is None
