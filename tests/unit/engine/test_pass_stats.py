"""Sums of pass statistics: every field has its part."""

from __future__ import annotations

from atspeed.engine.model.pass_stats import COUNTS, PassStats


def test_sum_has_every_count() -> None:
    one = PassStats(**{name: place for place, name in enumerate(COUNTS, 1)}, cached_tokens_by_tier={"memory": 1})
    ten = PassStats(**{name: 10 * place for place, name in enumerate(COUNTS, 1)}, cached_tokens_by_tier={"redis": 2})
    both = one + ten
    largest = {"batch_requests"}  # of all passes, and not of all together
    assert {name: getattr(both, name) for name in COUNTS} == {
        name: (10 if name in largest else 11) * place for place, name in enumerate(COUNTS, 1)
    }
    assert both.cached_tokens_by_tier == {"memory": 1, "redis": 2}
    assert (one.cached_tokens_by_tier, ten.cached_tokens_by_tier) == ({"memory": 1}, {"redis": 2})
