"""Split of users between stable and canary by a fixed place of each user."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from atspeed.engine.search.beam_widths import BeamWidths
from orchestrator.recommendation import RecommendParams
from orchestrator.serving.track_router import bucket
from orchestrator.user_key import user_cache_key

SHARES = st.floats(0, 1)
TENANTS, USERS = st.text(max_size=8), st.text(min_size=1, max_size=8)
ITEMS = st.lists(st.text(min_size=1, max_size=4), max_size=8)


def params(**subject: object) -> RecommendParams:
    return RecommendParams(k=1, beam_widths=BeamWidths.of(1), **subject)  # type: ignore[arg-type]


@given(st.binary(), SHARES, SHARES)
def test_larger_share_keeps_all_subjects_of_a_smaller_one(subject: bytes, one: float, other: float) -> None:
    small, large = sorted((one, other))
    assert (bucket(subject) < small) <= (bucket(subject) < large)


@given(st.binary())
def test_bucket_of_any_subject_is_at_least_0_and_below_1(subject: bytes) -> None:
    assert 0 <= bucket(subject) < 1


def test_bucket_of_a_user_is_equal_in_every_process() -> None:
    """Another place would move users in the middle of a rollout, whenever an orchestrator is renewed."""
    assert bucket(user_cache_key("", "alice")) == 0.3754419207513989
    assert bucket(user_cache_key("acme", "alice")) == 0.20807210028291723
    assert bucket(params(history=["50", "172", "181"]).subject) == 0.9956373362698945


@pytest.mark.parametrize("share", [0.01, 0.1, 0.5, 0.9])
def test_share_of_buckets_below_a_share_is_that_share(share: float) -> None:
    """Within six standard deviations of a binomial."""
    users = 4000
    served = sum(bucket(user_cache_key("acme", f"user-{number}")) < share for number in range(users))
    assert abs(served - users * share) <= 6 * math.sqrt(users * share * (1 - share))


@given(TENANTS, USERS, ITEMS)
def test_subject_of_a_stored_user_does_not_depend_on_the_history(tenant: str, user: str, items: list[str]) -> None:
    """Shadow checks do the same: they make a stored user's list again with the history that it was made from."""
    stored = params(tenant=tenant, user_id=user).subject
    assert stored == params(tenant=tenant, user_id=user, history=items).subject
    assert stored != params(tenant=tenant, history=[user, *items]).subject


@given(TENANTS, st.lists(st.text(min_size=1, max_size=4), min_size=4, max_size=4), ITEMS, ITEMS)
def test_subject_of_a_history_stays_as_the_history_grows(
    tenant: str, first: list[str], one: list[str], other: list[str]
) -> None:
    assert params(tenant=tenant, history=first + one).subject == params(tenant=tenant, history=first + other).subject


@given(TENANTS, TENANTS, ITEMS)
def test_subjects_of_two_tenants_differ(one: str, other: str, items: list[str]) -> None:
    same = params(tenant=one, history=items).subject == params(tenant=other, history=items).subject
    assert same is (one == other)
