"""Open-loop load through the real services: latency and goodput at rising rates, with speculation on and off side by side.

Requests leave when they were planned to, whatever became of those before them, and a latency counts from that moment: a service
that stalls is not spared the requests of its stall (no coordinated omission). One that fails counts as infinitely late.
Every step of a rate has users of its own, whom no cache knows at its beginning; the first part of a step is not counted.
"""

from __future__ import annotations

import asyncio
import math
import time
from collections import Counter
from collections.abc import AsyncIterator, Iterable, Mapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from rich import box
from rich.progress import Progress
from rich.table import Table

from atspeed.benchmarks.arrivals import Arrival, Kind, Mix, plan_arrivals
from atspeed.benchmarks.errors import BenchmarkError
from atspeed.benchmarks.histories import History
from atspeed.benchmarks.in_process_baseline import Throughput, bare_runner
from atspeed.benchmarks.pass_metrics import shared_passes
from atspeed.benchmarks.results import Result
from atspeed.benchmarks.services import mean, progress_bar
from atspeed.client.recommender import RecommenderClient, RecommenderError, recommend_request
from atspeed.engine.bundle.manifest import read_manifest
from atspeed.engine.search.mode import Mode
from atspeed.local.redis_server import local_redis
from atspeed.local.stack import LocalStack, ServiceProcess
from atspeed.v1 import recommendation_pb2 as pb

NAME = "load"
MODES = (Mode.TARGET_ONLY, Mode.STRICT)
FRACTIONS = (0.25, 0.5, 0.7, 0.8, 0.9, 1.0, 1.2)
"""Offered rates, as shares of what the bare model runner does in a closed loop."""
LIMIT_FACTOR = 5.0
_CONCURRENCIES = (1, 2, 4, 8)
_SATURATED = 0.5  # of what is offered: below that no higher rate is tried
_TIMEOUT_SECONDS = 10.0


@dataclass(frozen=True)
class Question:
    """What is measured. seconds: of a step, after `settle` seconds that do not count. rates: per second; None: by FRACTIONS.

    unloaded: requests one after the other, of which the median is the unloaded latency. bare: searches of the bare runner's
    closed loops. threads: of each target replica.
    """

    k: int
    mix: Mix
    seconds: float
    settle: float
    seed: int
    replicas: Sequence[int] = (1, 2)
    rates: Sequence[float] | None = None
    unloaded: int = 60
    bare: int = 120
    threads: int = 1


@dataclass(frozen=True)
class Outcome:
    """One counted request. Seconds from the planned moment: until it left, and until it was answered, inf where it failed."""

    arrival: Arrival
    left_after: float
    answered_after: float
    code: str
    reply: pb.RecommendResponse | None


@dataclass(frozen=True)
class LoadRow:
    """One rate and mode. Latencies in ms over all counted requests; None is infinity: so many failed.

    goodput_rps: replies per second within `limit_ms`, which is LIMIT_FACTOR times the unloaded p50 of target-only.
    *_hit_share: of prompt tokens, those whose KV was in a tier. left_late_p99_ms: how late the generator itself was.
    generator_cpu_share: of one core.
    batch_requests_mean: requests in a pass of a target, as each sees it, `settle` included; None where targets do not say.
    """

    replicas: int
    mode: str
    offered_rps: float
    requests: int
    achieved_rps: float
    goodput_rps: float
    p50_ms: float | None
    p95_ms: float | None
    p99_ms: float | None
    limit_ms: float
    unloaded_p50_ms: float
    p50_ms_by_kind: Mapping[str, float | None]
    errors: Mapping[str, int]
    degraded_share: float
    memory_hit_share: float
    redis_hit_share: float
    target_passes_mean: float
    left_late_p99_ms: float
    generator_cpu_share: float
    batch_requests_mean: float | None

    @property
    def holds(self) -> bool:
        """Whether 99 % were answered within the limit."""
        return self.p99_ms is not None and self.p99_ms <= self.limit_ms


@dataclass(frozen=True)
class LoadResult:
    """All steps, and the bare runner's best closed loop by number of replicas."""

    rows: Sequence[LoadRow]
    bare: Mapping[int, Throughput]


async def run(root: Path, histories: Sequence[History], question: Question) -> LoadResult:
    """Measure. Raises BenchmarkError or LocalStackError when something does not even serve a request at a time."""
    rows: list[LoadRow] = []
    bare = {}
    with progress_bar() as progress:
        for replicas in question.replicas:
            bare[replicas] = await _bare(root, histories, question, replicas)
            rates = question.rates or [round(share * bare[replicas].searches_per_second, 2) for share in FRACTIONS]
            async with _services(root, question, replicas) as (client, targets):
                rows += await _Series(client, targets, histories, question, progress).rows(rates)
    return LoadResult(rows, bare)


@asynccontextmanager
async def _services(
    root: Path, question: Question, replicas: int
) -> AsyncIterator[tuple[RecommenderClient, Sequence[ServiceProcess]]]:
    """The real services with their usual settings: a client, and the targets."""
    async with AsyncExitStack() as stack:
        redis_url = stack.enter_context(local_redis())
        drafts = 1 if read_manifest(root).draft else 0
        flags = {"target": {"threads": question.threads, "metrics-port": 0}}
        local = LocalStack(root, redis_url=redis_url, drafts=drafts, targets=replicas, flags=flags)
        stack.enter_context(local)
        client = RecommenderClient(local.address, timeout_seconds=_TIMEOUT_SECONDS)
        yield await stack.enter_async_context(client), local.targets


async def _bare(root: Path, histories: Sequence[History], question: Question, replicas: int) -> Throughput:
    """The best of closed loops with more and more searches at once, each over users of its own."""
    async with bare_runner(root, threads=question.threads, replicas=replicas) as runner:
        best = None
        for concurrency in _CONCURRENCIES:
            asked = _requests_in_order(histories, question, question.bare)
            prompts = [runner.prompt(one.history, f"{concurrency}/{one.cohort}") for one in asked]
            found = await runner.closed_loop(prompts, question.k, concurrency)
            if best is None or found.searches_per_second > best.searches_per_second:
                best = found
    if best is None:
        raise BenchmarkError("bare: no search was made")
    return best


def _requests_in_order(histories: Sequence[History], question: Question, count: int) -> list[Arrival]:
    """So many arrivals; who looks at their times would be mistaken."""
    planned = plan_arrivals(histories, question.mix, rate=count, seconds=10.0, seed=question.seed)
    return planned[:count]


@dataclass(frozen=True)
class _Series:
    """The steps of one number of replicas."""

    client: RecommenderClient
    targets: Sequence[ServiceProcess]
    histories: Sequence[History]
    question: Question
    progress: Progress

    @property
    def replicas(self) -> int:
        """Of the target."""
        return len(self.targets)

    async def rows(self, rates: Sequence[float]) -> list[LoadRow]:
        """Every rate, both modes at each, until both are saturated."""
        unloaded = {mode: await self._unloaded(mode) for mode in MODES}
        limit = LIMIT_FACTOR * unloaded[Mode.TARGET_ONLY]
        found: list[LoadRow] = []
        task = self.progress.add_task(f"{self.replicas} target replica(s)", total=len(rates) * len(MODES))
        for index, rate in enumerate(sorted(rates)):
            step = [await self._step(mode, rate, index, limit, unloaded[mode]) for mode in MODES]
            found += step
            self.progress.advance(task, len(MODES))
            if all(row.goodput_rps < _SATURATED * row.offered_rps for row in step):
                break
        self.progress.remove_task(task)
        return found

    async def _unloaded(self, mode: Mode) -> float:
        """Median milliseconds of requests one after the other, of the same mix."""
        latencies = []
        for arrival in _requests_in_order(self.histories, self.question, self.question.unloaded):
            begun = time.perf_counter()
            await self.client.send(_request(arrival, self.question.k, mode, "unloaded"))
            latencies.append(1e3 * (time.perf_counter() - begun))
        return float(np.median(latencies))

    async def _step(self, mode: Mode, rate: float, index: int, limit: float, unloaded: float) -> LoadRow:
        """One rate in one mode. Both modes get the same arrivals, from users that only the tenant tells apart."""
        asked = self.question
        seconds = asked.settle + asked.seconds
        arrivals = plan_arrivals(self.histories, asked.mix, rate=rate, seconds=seconds, seed=asked.seed + index)
        requests = [_request(arrival, asked.k, mode, str(index)) for arrival in arrivals]
        passes = await asyncio.to_thread(shared_passes, self.targets)
        begun, cpu = time.perf_counter(), time.process_time()
        outcomes = await drive(self.client, arrivals, requests)
        busy = (time.process_time() - cpu) / (time.perf_counter() - begun)
        passes = await asyncio.to_thread(shared_passes, self.targets) - passes
        counted = [outcome for outcome in outcomes if outcome.arrival.at >= asked.settle]
        row = summary(counted, seconds=asked.seconds, settle=asked.settle, limit_ms=limit)
        return replace(
            row,
            replicas=self.replicas,
            mode=str(mode),
            offered_rps=rate,
            unloaded_p50_ms=round(unloaded, 3),
            generator_cpu_share=round(busy, 3),
            batch_requests_mean=passes.mean,
        )


def _request(arrival: Arrival, k: int, mode: Mode, step: str) -> pb.RecommendRequest:
    tenant = f"{mode}/{step}/{arrival.cohort}"
    return recommend_request(history=arrival.history, k=k, beam_width=k, mode=mode, tenant=tenant)


async def drive(
    client: RecommenderClient, arrivals: Sequence[Arrival], requests: Sequence[pb.RecommendRequest]
) -> list[Outcome]:
    """Send every request at its moment, wait for all, in the order of the arrivals."""
    start = time.perf_counter()

    async def one(arrival: Arrival, request: pb.RecommendRequest) -> Outcome:
        left = time.perf_counter() - start - arrival.at
        try:
            reply = await client.send(request)
        except RecommenderError as error:
            return Outcome(arrival, left, math.inf, error.code.name, None)
        return Outcome(arrival, left, time.perf_counter() - start - arrival.at, "OK", reply)

    sent = []
    for arrival, request in zip(arrivals, requests, strict=True):
        await asyncio.sleep(max(0.0, start + arrival.at - time.perf_counter()))
        sent.append(asyncio.create_task(one(arrival, request)))
    return await asyncio.gather(*sent)


def summary(outcomes: Sequence[Outcome], *, seconds: float, settle: float, limit_ms: float) -> LoadRow:
    """The counted requests of one step of `seconds`, which began after `settle`; without what only the step knows."""
    latencies = [1e3 * outcome.answered_after for outcome in outcomes]
    replies = [outcome.reply for outcome in outcomes if outcome.reply is not None]
    ends = [outcome.arrival.at + outcome.answered_after for outcome in outcomes if outcome.reply is not None]
    window = max([settle + seconds, *ends]) - settle
    statistics = [reply.statistics for reply in replies]
    prompts = sum(one.prompt_tokens for one in statistics) or 1
    return LoadRow(
        replicas=0,
        mode="",
        offered_rps=0.0,
        requests=len(outcomes),
        achieved_rps=round(len(replies) / window, 3),
        goodput_rps=round(sum(latency <= limit_ms for latency in latencies) / seconds, 3),
        p50_ms=percentile(latencies, 50),
        p95_ms=percentile(latencies, 95),
        p99_ms=percentile(latencies, 99),
        limit_ms=round(limit_ms, 3),
        unloaded_p50_ms=0.0,
        p50_ms_by_kind={kind: percentile(_of_kind(outcomes, kind), 50) for kind in Kind},
        errors=dict(Counter(outcome.code for outcome in outcomes if outcome.reply is None)),
        degraded_share=mean([float(reply.degraded) for reply in replies]),
        memory_hit_share=round(sum(one.cached_tokens.get("memory", 0) for one in statistics) / prompts, 4),
        redis_hit_share=round(sum(one.cached_tokens.get("redis", 0) for one in statistics) / prompts, 4),
        target_passes_mean=mean([float(one.target_passes) for one in statistics]),
        left_late_p99_ms=percentile([1e3 * outcome.left_after for outcome in outcomes], 99) or 0.0,
        generator_cpu_share=0.0,
        batch_requests_mean=None,
    )


def percentile(milliseconds: Sequence[float], percent: float) -> float | None:
    """The smallest value that so many percent do not exceed; None where that is infinite, or of nothing."""
    if not milliseconds:
        return None
    ordered = sorted(milliseconds)
    value = ordered[max(0, math.ceil(percent / 100 * len(ordered)) - 1)]
    return round(value, 3) if math.isfinite(value) else None


def _of_kind(outcomes: Iterable[Outcome], kind: Kind) -> list[float]:
    return [1e3 * outcome.answered_after for outcome in outcomes if outcome.arrival.kind is kind]


def sustained(rows: Iterable[LoadRow], replicas: int, mode: str) -> float:
    """The best goodput of the rates at which 99 % were answered within the limit; 0 where there is none."""
    return max(
        (row.goodput_rps for row in rows if (row.replicas, row.mode) == (replicas, mode) and row.holds), default=0.0
    )


def header(found: LoadResult, question: Question, *, data: str) -> dict[str, Any]:
    """What a result file says beside its rows."""
    return {
        "benchmark": NAME,
        "data": data,
        "k": question.k,
        "mix": asdict(question.mix),
        "seconds": question.seconds,
        "settle_seconds": question.settle,
        "threads": question.threads,
        "bare": {str(replicas): asdict(bare) for replicas, bare in found.bare.items()},
    }


def to_json(rows: Sequence[LoadRow]) -> list[dict[str, Any]]:
    """The rows, for a result file."""
    return [asdict(row) for row in rows]


def from_json(result: Result) -> list[LoadRow]:
    """The rows of a result file. Raises BenchmarkError when it is another benchmark's."""
    if result.header.get("benchmark") != NAME:
        raise BenchmarkError("the result is not one of `bench load`")
    return [LoadRow(**row) for row in result.rows]


def table(found: LoadResult) -> Table:
    """The steps, for people."""
    shown = Table(title="Open-loop load", box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False)
    for name in ("replicas", "mode", "offered\n1/s", "goodput\n1/s", "p50\nms", "p95\nms", "p99\nms", "errors"):
        shown.add_column(name, justify="left" if name == "mode" else "right")
    for row in found.rows:
        rates = (f"{row.offered_rps:.1f}", f"{row.goodput_rps:.1f}")
        shown.add_row(str(row.replicas), row.mode, *rates, *map(ms, (row.p50_ms, row.p95_ms, row.p99_ms)), errors(row))
    return shown


def ms(value: float | None) -> str:
    """Milliseconds, for people."""
    return "∞" if value is None else f"{value:.1f}"


def errors(row: LoadRow) -> str:
    """Failures by code, for people."""
    return ", ".join(f"{count} {code}" for code, count in sorted(row.errors.items())) or "0"
