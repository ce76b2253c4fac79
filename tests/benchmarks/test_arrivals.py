"""Arrivals: a Poisson process of consistent users, reproducible by the seed."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from atspeed.benchmarks.arrivals import Mix, UserKind, plan_arrivals
from atspeed.benchmarks.results import BenchmarkError

HISTORIES = [tuple(f"{user}-{item}" for item in range(1 + user % 7)) for user in range(12)]

shares = st.floats(0, 1).filter(lambda share: share == 0 or share > 1e-3)
mixes = st.builds(Mix, shares, shares, shares).filter(lambda mix: mix.new + mix.returning + mix.refreshing > 0)


@settings(max_examples=100)
@given(mixes, st.integers(0, 2**32), st.floats(0.5, 60))
def test_returning_users_keep_their_history(mix: Mix, seed: int, rate: float) -> None:
    """Everybody is new once; a refreshing user has what the last request had, a returning one exactly one item more."""
    latest: dict[tuple[str, int], tuple[str, ...]] = {}
    for arrival in plan_arrivals(HISTORIES, mix, rate=rate, seconds=5.0, seed=seed):
        user = (arrival.history[0], arrival.cohort)
        before = latest.get(user)
        if arrival.kind is UserKind.NEW:
            assert before is None
        elif arrival.kind is UserKind.REFRESHING:
            assert arrival.history == before
        else:
            assert arrival.history[:-1] == before
        latest[user] = arrival.history
        whole = next(history for history in HISTORIES if history[0] == arrival.history[0])
        assert arrival.history == whole[: len(arrival.history)]


@settings(max_examples=100)
@given(mixes, st.integers(0, 2**32))
def test_arrivals_are_a_function_of_the_seed(mix: Mix, seed: int) -> None:
    first, again = (plan_arrivals(HISTORIES, mix, rate=20, seconds=3.0, seed=seed) for _ in range(2))
    assert first == again
    times = [arrival.at for arrival in first]
    assert times == sorted(times)
    assert all(0 < at < 3.0 for at in times)


def test_arrivals_are_a_poisson_process() -> None:
    """Mean and variance of the counts per second are the rate; 4 standard errors of 2,000 seconds."""
    arrivals = plan_arrivals(HISTORIES[:1], Mix(0, 0, 1), rate=5.0, seconds=2000.0, seed=1)
    counts = [0] * 2000
    for arrival in arrivals:
        counts[int(arrival.at)] += 1
    mean = sum(counts) / len(counts)
    assert mean == pytest.approx(5.0, abs=4 * (5 / 2000) ** 0.5)
    assert sum((count - mean) ** 2 for count in counts) / len(counts) == pytest.approx(5.0, abs=4 * (55 / 2000) ** 0.5)


def test_mix_is_kept_where_users_allow_it() -> None:
    longer = [tuple(f"{user}-{item}" for item in range(500)) for user in range(400)]
    arrivals = plan_arrivals(longer, Mix.parse("new=1,returning=2,refreshing=1"), rate=100, seconds=40.0, seed=2)
    # Nobody holds back more than a few items, so returning users soon have nothing new: then others are new in their place.
    found = {kind: sum(arrival.kind is kind for arrival in arrivals) / len(arrivals) for kind in UserKind}
    assert found[UserKind.REFRESHING] == pytest.approx(0.25, abs=0.03)
    assert found[UserKind.RETURNING] == pytest.approx(0.5, abs=0.03)


def test_next_cohort_follows_when_all_users_came() -> None:
    arrivals = plan_arrivals(HISTORIES, Mix(1, 0, 0), rate=10, seconds=5.0, seed=3)
    users = [(arrival.history[0], arrival.cohort) for arrival in arrivals]
    assert len(set(users)) == len(users) > len(HISTORIES)
    assert [arrival.cohort for arrival in arrivals] == [place // len(HISTORIES) for place in range(len(arrivals))]


def test_no_arrivals_without_time() -> None:
    assert plan_arrivals(HISTORIES, Mix(), rate=1e-6, seconds=1e-3, seed=1) == []


@pytest.mark.parametrize("text", ["", "new", "new=x", "new=-1", "new=inf", "old=1", "new=0,returning=0", "new=nan"])
def test_invalid_mix_is_refused(text: str) -> None:
    with pytest.raises(BenchmarkError, match="mix"):
        Mix.parse(text)


def test_mix_is_parsed_by_name() -> None:
    assert Mix.parse("refreshing=3,new=1") == Mix(1.0, 0.0, 3.0)
    assert Mix.parse("refreshing=3,new=1").probabilities == [0.25, 0.0, 0.75]
