"""`bench load` without services: counted requests, their latencies, and the page."""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import cast

import grpc
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from atspeed.benchmarks import load, load_report
from atspeed.benchmarks.arrivals import Arrival, Mix, UserKind
from atspeed.benchmarks.in_process_baseline import Throughput
from atspeed.benchmarks.load import LoadResult, LoadRow, RequestOutcome, drive, percentile, summary, sustained
from atspeed.benchmarks.pass_metrics import SharedPasses
from atspeed.benchmarks.provenance import provenance
from atspeed.benchmarks.results import BenchmarkError, Result, to_json
from atspeed.benchmarks.saturation import CONCURRENCIES, closed_loop, saturated
from atspeed.engine.search.mode import Mode
from atspeed_client import AsyncClient, Recommendation, RecommenderError, RecommendRequest
from atspeed_client.reading import to_recommendation
from atspeed_client.v1 import recommendation_pb2 as pb


def outcome(
    seconds: float, *, at: float = 2.0, kind: UserKind = UserKind.NEW, code: str = "OK", cached: int = 0
) -> RequestOutcome:
    """One request that was answered after so many seconds, with a prompt of ten tokens."""
    statistics = pb.Statistics(prompt_tokens=10, cached_tokens={"memory": cached}, target_passes=2)
    reply = to_recommendation(pb.RecommendResponse(statistics=statistics), "") if code == "OK" else None
    return RequestOutcome(Arrival(at, kind, ("a",), 0), 0.001, seconds if reply else math.inf, code, reply)


@settings(max_examples=100)
@given(st.lists(st.one_of(st.floats(0, 1e6), st.just(math.inf)), min_size=1), st.floats(1, 100))
def test_percentile_is_exact(values: list[float], percent: float) -> None:
    value = percentile(values, percent)
    bound = math.inf if value is None else value + 1e-3
    assert sum(v <= bound for v in values) >= percent / 100 * len(values) - 1e-6
    if value is not None:
        assert sum(v < value - 1e-3 for v in values) < percent / 100 * len(values) + 1e-6


def test_percentile_of_nothing_is_none() -> None:
    assert percentile([], 50) is None


def test_failures_count_as_infinitely_late() -> None:
    outcomes = [outcome(0.01)] * 96 + [outcome(0.2)] * 2 + [outcome(0, code="UNAVAILABLE")] * 2
    row = summary(outcomes, seconds=10.0, settle=1.0, limit_ms=100.0)
    assert (row.requests, row.errors) == (100, {"UNAVAILABLE": 2})
    assert (row.p50_ms, row.p95_ms, row.p99_ms) == (10.0, 10.0, None)
    assert (row.goodput_rps, row.achieved_rps) == (9.6, 9.8)
    assert not row.is_within_limit


def test_late_replies_extend_the_window_of_throughput() -> None:
    """A queue that only empties after the last arrival is no throughput of the step."""
    row = summary([outcome(0.1, at=10.9), outcome(8.0, at=11.0)], seconds=10.0, settle=1.0, limit_ms=100.0)
    assert row.achieved_rps == round(2 / 18.0, 3)


def test_kinds_and_tiers_are_counted_apart() -> None:
    outcomes = [
        outcome(0.03),
        outcome(0.02, kind=UserKind.RETURNING, cached=5),
        outcome(0.02, kind=UserKind.RETURNING, cached=8),
    ]
    row = summary(outcomes, seconds=1.0, settle=1.0, limit_ms=1.0)
    assert row.p50_ms_by_kind == {UserKind.NEW: 30.0, UserKind.RETURNING: 20.0, UserKind.REFRESHING: None}
    assert (row.memory_hit_share, row.redis_hit_share, row.target_passes_mean) == (round(13 / 30, 4), 0.0, 2.0)


class StallingClient:
    """Stops the whole process at its first call, as a generator that waits for replies would."""

    STALL = 0.2

    def __init__(self) -> None:
        self.calls = 0

    async def send(self, request: RecommendRequest) -> Recommendation:
        self.calls += 1
        if self.calls == 1:
            time.sleep(self.STALL)  # noqa: ASYNC251 - that is the point
        if request.message.k == 13:
            raise RecommenderError(grpc.StatusCode.RESOURCE_EXHAUSTED, "full")
        return to_recommendation(pb.RecommendResponse(), "")


async def test_latency_counts_from_the_planned_moment() -> None:
    """Requests that could not leave in time waited all the same: no coordinated omission."""
    arrivals = [Arrival(at, UserKind.NEW, ("a",), 0) for at in (0.0, 0.01, 0.1)]
    requests = [RecommendRequest("a", k=k) for k in (1, 13, 1)]
    outcomes = await drive(cast(AsyncClient, StallingClient()), arrivals, requests)
    assert [one.code for one in outcomes] == ["OK", "RESOURCE_EXHAUSTED", "OK"]
    assert [one.arrival for one in outcomes] == arrivals
    assert outcomes[0].answered_after >= StallingClient.STALL
    assert outcomes[1].answered_after == math.inf
    assert outcomes[2].answered_after >= StallingClient.STALL - 0.1
    assert outcomes[2].left_after >= StallingClient.STALL - 0.1


class CountingClient:
    """Answers after the loop has turned. It notes how many requests were under way at once, and refuses K = 13."""

    def __init__(self) -> None:
        self.running = self.most = self.answered = 0

    async def send(self, request: RecommendRequest) -> Recommendation:
        self.running += 1
        self.most = max(self.most, self.running)
        await asyncio.sleep(0)
        self.running -= 1
        if request.message.k == 13:
            raise RecommenderError(grpc.StatusCode.RESOURCE_EXHAUSTED, "full")
        self.answered += 1
        return to_recommendation(pb.RecommendResponse(), "")


async def test_closed_loop_keeps_so_many_requests_under_way() -> None:
    client = CountingClient()
    found = await closed_loop(client.send, [RecommendRequest("a", k=1)] * 50, 4)
    assert (client.answered, client.most, client.running) == (50, 4, 0)
    assert (found.concurrency, found.searches) == (4, 50)
    assert found.searches_per_second > 0


async def test_a_loop_that_is_refused_is_no_measurement() -> None:
    requests = [RecommendRequest("a", k=k) for k in (1, 13, 1)]
    with pytest.raises(BenchmarkError, match=r"closed loop of 2 requests: .*full"):
        await closed_loop(CountingClient().send, requests, 2)


async def test_saturation_is_the_best_of_loops_with_their_own_users() -> None:
    asked: list[int] = []

    def requests(concurrency: int) -> list[RecommendRequest]:
        asked.append(concurrency)
        return [RecommendRequest(f"user-{concurrency}", k=1)] * 20

    found = await saturated(cast(AsyncClient, CountingClient()), requests)
    assert asked == list(CONCURRENCIES)
    assert (found.concurrency in CONCURRENCIES, found.searches) == (True, 20)


def rows() -> list[LoadRow]:
    plain = summary([outcome(0.02)] * 10, seconds=1.0, settle=0.0, limit_ms=100.0)
    late = summary([outcome(0.02), outcome(0, code="UNAVAILABLE")], seconds=1.0, settle=0.0, limit_ms=100.0)
    return [
        replace(plain, replicas=1, mode="target-only", offered_rps=10.0),
        replace(plain, replicas=1, mode="strict", offered_rps=10.0, goodput_rps=9.0),
        replace(late, replicas=1, mode="target-only", offered_rps=20.0, goodput_rps=15.0),
        replace(plain, replicas=2, mode="strict", offered_rps=40.0, goodput_rps=30.0),
    ]


def test_only_rates_within_the_limit_are_sustained() -> None:
    found = rows()
    assert sustained(found, 1, "target-only") == 10.0
    assert sustained(found, 1, "strict") == 9.0
    assert sustained(found, 2, "target-only") == 0.0


def result(found: Sequence[LoadRow]) -> Result:
    baseline = {1: Throughput(4, 100, 12.5), 2: Throughput(8, 100, 25.0)}
    saturated = {1: {Mode.TARGET_ONLY: Throughput(8, 100, 12.0), Mode.STRICT: Throughput(4, 100, 11.0)}}
    config = load.LoadConfig(k=10, mix=Mix(), seconds=5.0, settle=1.0, seed=1)
    header = provenance(None, seed=1, command=["atspeed", "bench", "load"])
    return Result(header | load.header(LoadResult(found, baseline, saturated), config, data="some.txt"), to_json(found))


def test_page_is_written_from_result_file(tmp_path: Path) -> None:
    result(rows()).write(tmp_path / "load.json")
    read = Result.read(tmp_path / "load.json")
    assert read.rows_of(load.NAME, LoadRow) == rows()
    page = load_report.write(read, tmp_path).read_text()
    assert "| 9.0 of 12.5 per second, 72% |" in page
    assert (
        "strict: throughput at saturation, and its share of the in-process baseline | 11.0 of 12.5 per second, 88%, 4"
        in page
    )
    assert "the least | 0.90, at 10.0 per second |" in page
    assert "1 UNAVAILABLE" in page
    for replicas in (1, 2):
        assert f"load-{replicas}.svg" in page
        assert (tmp_path / f"load-{replicas}.svg").read_text().startswith("<?xml")


def test_result_of_another_benchmark_is_refused(tmp_path: Path) -> None:
    with pytest.raises(BenchmarkError, match="benchmark load"):
        load_report.write(Result({"benchmark": "scaling"}, []), tmp_path)


def test_shared_passes_are_summed_over_targets() -> None:
    page = """# TYPE atspeed_pass_requests histogram
atspeed_pass_requests_bucket{le="+Inf"} 4.0
atspeed_pass_requests_count 4.0
atspeed_pass_requests_sum 10.0
# TYPE atspeed_pass_nodes histogram
atspeed_pass_nodes_count 9.0
atspeed_pass_nodes_sum 900.0
"""
    assert SharedPasses.of([page, page]) == SharedPasses(20.0, 8.0)
    assert (SharedPasses(20.0, 8.0) - SharedPasses(4.0, 4.0)).mean == 4.0
    assert SharedPasses.of(["# TYPE other counter\nother_total 1.0\n"]).mean is None
