"""`bench http` without services: medians of times and of the users' ratios."""

from __future__ import annotations

from atspeed.benchmarks.http_calls import GRPC, JSON, summarise


def test_a_ratio_is_the_median_of_users_and_not_of_medians() -> None:
    users = [{GRPC: 10.0, JSON: 20.0}, {GRPC: 100.0, JSON: 110.0}, {GRPC: 40.0, JSON: 60.0}]
    row = summarise(JSON, 10, users)
    assert (row.way, row.k, row.users, row.p50_ms, row.ratio) == ("HTTP/JSON", 10, 3, 60.0, 1.5)
    assert summarise(GRPC, 10, users).ratio == 1.0
