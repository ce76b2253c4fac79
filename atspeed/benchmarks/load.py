"""Open-loop load on the real services: latency, goodput, throughput at saturation.

Target-only and strict are measured side by side. Requests leave at their planned moments, whatever became of those before them,
and a latency counts from that moment: a service that stalls is charged for the requests of its stall (no coordinated omission).
A failed request counts as infinitely late. Every step of a rate has its own users, whom no cache knows at its beginning.
The first part of a step is not counted. Throughput at saturation is that of a closed loop, for the services as for the
in-process baseline.
"""

from __future__ import annotations

import asyncio
import math
import time
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from rich.progress import Progress

from atspeed.benchmarks.arrivals import Arrival, Mix, UserKind, plan_arrivals
from atspeed.benchmarks.histories import History
from atspeed.benchmarks.in_process_baseline import Throughput, in_process_baseline
from atspeed.benchmarks.pass_metrics import shared_passes
from atspeed.benchmarks.results import Columns
from atspeed.benchmarks.saturation import saturated
from atspeed.benchmarks.services import mean, progress_bar, started
from atspeed.engine.search.mode import Mode
from atspeed.local.stack import ServiceProcess
from atspeed_client import AsyncClient, Recommendation, RecommenderError, RecommendRequest

NAME = "load"
MODES = (Mode.TARGET_ONLY, Mode.STRICT)
FRACTIONS = (0.25, 0.5, 0.7, 0.8, 0.9, 1.0, 1.2)
"""Offered rates, as shares of the throughput of the in-process baseline in a closed loop."""
LIMIT_FACTOR = 5.0  # latency limit of goodput, in unloaded medians
_CONCURRENCIES = (1, 2, 4, 8)  # closed loops of the baseline, of which the best counts
_SATURATED = 0.5  # goodput over offered rate; no higher rate is measured where both modes are below
_TIMEOUT_SECONDS = 10.0  # far above any latency limit


@dataclass(frozen=True)
class LoadConfig:
    """Configuration of the measurement.

    Attributes:
        k: beams and items.
        seconds: counted seconds of a step.
        settle: seconds of a step before these, which are not counted.
        replicas: numbers of target replicas, measured one after the other.
        rates: requests per second; None: by FRACTIONS.
        unloaded: requests one after the other, whose median is the unloaded latency.
        bare: searches of each closed loop, of the baseline and of the services.
        threads: threads of each target replica.
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
class RequestOutcome:
    """Outcome of one counted request.

    Attributes:
        left_after: seconds from the planned moment until the request left.
        answered_after: seconds from the planned moment until the reply came; inf where the request failed.
        code: gRPC status.
    """

    arrival: Arrival
    left_after: float
    answered_after: float
    code: str
    reply: Recommendation | None


@dataclass(frozen=True)
class LoadRow:
    """One rate in one mode.

    Attributes:
        goodput_rps: replies per second within `limit_ms`.
        p50_ms, p95_ms, p99_ms: latencies of all counted requests; None is infinity, for so many failed.
        limit_ms: LIMIT_FACTOR times the unloaded median of target-only.
        memory_hit_share, redis_hit_share: share of the prompt tokens whose KV was in the tier.
        left_late_p99_ms: how late the generator itself was.
        generator_cpu_share: load of the generator, of one core.
        batch_requests_mean: requests in a pass of a target, as each sees it, `settle` included; None where targets do not
            report it.
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
    def is_within_limit(self) -> bool:
        """True if 99 % of the requests were answered within the limit."""
        return self.p99_ms is not None and self.p99_ms <= self.limit_ms


def _ms(value: float | None) -> str:
    return "∞" if value is None else f"{value:.1f}"


def _errors(row: LoadRow) -> str:
    return ", ".join(f"{count} {code}" for code, count in sorted(row.errors.items())) or "0"


COLUMNS: Columns[LoadRow] = (
    ("offered 1/s", lambda row: f"{row.offered_rps:.1f}"),
    ("mode", lambda row: row.mode),
    ("achieved 1/s", lambda row: f"{row.achieved_rps:.1f}"),
    ("goodput 1/s", lambda row: f"{row.goodput_rps:.1f}"),
    ("p50 ms", lambda row: _ms(row.p50_ms)),
    ("p95 ms", lambda row: _ms(row.p95_ms)),
    ("p99 ms", lambda row: _ms(row.p99_ms)),
    ("p50 new / returning / refreshing", lambda row: " / ".join(map(_ms, row.p50_ms_by_kind.values()))),
    ("errors", _errors),
    ("degraded", lambda row: f"{row.degraded_share:.0%}"),
    ("KV from memory", lambda row: f"{row.memory_hit_share:.0%}"),
    ("KV from Redis", lambda row: f"{row.redis_hit_share:.0%}"),
    ("target passes", lambda row: f"{row.target_passes_mean:.2f}"),
    ("requests per pass", lambda row: "–" if row.batch_requests_mean is None else f"{row.batch_requests_mean:.2f}"),
    ("generator late, p99 ms", lambda row: f"{row.left_late_p99_ms:.1f}"),
    ("generator's core", lambda row: f"{row.generator_cpu_share:.0%}"),
)
# The mode and the rates, then latencies and errors: the terminal is narrower than a page.
TERMINAL_COLUMNS: Columns[LoadRow] = (
    ("replicas", lambda row: str(row.replicas)),
    *(column for column in COLUMNS[:9] if not column[0].startswith(("achieved", "p50 new"))),
)


@dataclass(frozen=True)
class LoadResult:
    """All steps, and the best closed loops: of the baseline by number of replicas, and of the services by mode too."""

    rows: Sequence[LoadRow]
    baseline: Mapping[int, Throughput]
    saturated: Mapping[int, Mapping[Mode, Throughput]]


async def run(root: Path, histories: Sequence[History], config: LoadConfig) -> LoadResult:
    """Measure all rates. Raises BenchmarkError or LocalStackError where the services cannot serve one request at a time."""
    rows: list[LoadRow] = []
    baseline, at_saturation = {}, {}
    with progress_bar() as progress:
        for replicas in config.replicas:
            baseline[replicas] = await _baseline(root, histories, config, replicas)
            rates = config.rates or [round(share * baseline[replicas].searches_per_second, 2) for share in FRACTIONS]
            flags = {"target": {"threads": config.threads, "metrics-port": 0}}  # all else by default
            async with started(root, flags, targets=replicas, timeout_seconds=_TIMEOUT_SECONDS) as services:
                runner = _StepRunner(services.client, services.local.targets, histories, config, progress)
                rows += await runner.rows(rates)
                at_saturation[replicas] = {mode: await runner.saturated(mode) for mode in MODES}
    return LoadResult(rows, baseline, at_saturation)


async def _baseline(root: Path, histories: Sequence[History], config: LoadConfig, replicas: int) -> Throughput:
    """Return the best of closed loops with more and more searches at once, each over its own users."""
    async with in_process_baseline(root, threads=config.threads, replicas=replicas) as baseline:
        loops = []
        for concurrency in _CONCURRENCIES:
            asked = _requests_in_order(histories, config, config.bare)
            prompts = [baseline.prompt(one.history, f"{concurrency}/{one.cohort}") for one in asked]
            loops.append(await baseline.closed_loop(prompts, config.k, concurrency))
    return max(loops, key=lambda loop: loop.searches_per_second)


def _requests_in_order(histories: Sequence[History], config: LoadConfig, count: int) -> list[Arrival]:
    """Return so many arrivals. Their times are not used."""
    planned = plan_arrivals(histories, config.mix, rate=count, seconds=10.0, seed=config.seed)
    return planned[:count]


@dataclass(frozen=True)
class _StepRunner:
    """Runs the steps of one number of replicas."""

    client: AsyncClient
    targets: Sequence[ServiceProcess]
    histories: Sequence[History]
    config: LoadConfig
    progress: Progress

    @property
    def replicas(self) -> int:
        """Number of target replicas."""
        return len(self.targets)

    async def rows(self, rates: Sequence[float]) -> list[LoadRow]:
        """Measure every rate in both modes, until both are saturated."""
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

    async def saturated(self, mode: Mode) -> Throughput:
        """Return the best closed loop, of the same mix; each loop has its own users."""

        def requests(concurrency: int) -> list[RecommendRequest]:
            asked = _requests_in_order(self.histories, self.config, self.config.bare)
            return [_request(one, self.config.k, mode, f"closed-{concurrency}") for one in asked]

        return await saturated(self.client, requests)

    async def _unloaded(self, mode: Mode) -> float:
        """Return the median milliseconds of requests one after the other, of the same mix."""
        latencies = []
        for arrival in _requests_in_order(self.histories, self.config, self.config.unloaded):
            begun = time.perf_counter()
            await self.client.send(_request(arrival, self.config.k, mode, "unloaded"))
            latencies.append(1e3 * (time.perf_counter() - begun))
        return float(np.median(latencies))

    async def _step(self, mode: Mode, rate: float, index: int, limit: float, unloaded: float) -> LoadRow:
        """Measure one rate in one mode. Both modes get the same arrivals; their users differ by tenant only."""
        config = self.config
        seconds = config.settle + config.seconds
        arrivals = plan_arrivals(self.histories, config.mix, rate=rate, seconds=seconds, seed=config.seed + index)
        requests = [_request(arrival, config.k, mode, str(index)) for arrival in arrivals]
        passes = await asyncio.to_thread(shared_passes, self.targets)
        begun, cpu = time.perf_counter(), time.process_time()
        outcomes = await drive(self.client, arrivals, requests)
        busy = (time.process_time() - cpu) / (time.perf_counter() - begun)
        passes = await asyncio.to_thread(shared_passes, self.targets) - passes
        counted = [outcome for outcome in outcomes if outcome.arrival.at >= config.settle]
        row = summary(counted, seconds=config.seconds, settle=config.settle, limit_ms=limit)
        return replace(
            row,
            replicas=self.replicas,
            mode=str(mode),
            offered_rps=rate,
            unloaded_p50_ms=round(unloaded, 3),
            generator_cpu_share=round(busy, 3),
            batch_requests_mean=passes.mean,
        )


def _request(arrival: Arrival, k: int, mode: Mode, step: str) -> RecommendRequest:
    tenant = f"{mode}/{step}/{arrival.cohort}"
    return RecommendRequest(history=arrival.history, k=k, beam_width=k, mode=mode, tenant=tenant)


async def drive(
    client: AsyncClient, arrivals: Sequence[Arrival], requests: Sequence[RecommendRequest]
) -> list[RequestOutcome]:
    """Send every request at its moment. Returns the outcomes of all, in the order of the arrivals."""
    start = time.perf_counter()

    async def one(arrival: Arrival, request: RecommendRequest) -> RequestOutcome:
        left = time.perf_counter() - start - arrival.at
        try:
            reply = await client.send(request)
        except RecommenderError as error:
            return RequestOutcome(arrival, left, math.inf, error.code.name, None)
        return RequestOutcome(arrival, left, time.perf_counter() - start - arrival.at, "OK", reply)

    sent = []
    for arrival, request in zip(arrivals, requests, strict=True):
        await asyncio.sleep(max(0.0, start + arrival.at - time.perf_counter()))
        sent.append(asyncio.create_task(one(arrival, request)))
    return await asyncio.gather(*sent)


def summary(outcomes: Sequence[RequestOutcome], *, seconds: float, settle: float, limit_ms: float) -> LoadRow:
    """Summarise the counted requests of a step of `seconds` after `settle`. Fields that only the step knows are left empty."""
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
        p50_ms_by_kind={kind: percentile(_of_kind(outcomes, kind), 50) for kind in UserKind},
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
    """Return the smallest value that so many percent do not exceed; None where it is infinite, or without values."""
    if not milliseconds:
        return None
    ordered = sorted(milliseconds)
    value = ordered[max(0, math.ceil(percent / 100 * len(ordered)) - 1)]
    return round(value, 3) if math.isfinite(value) else None


def _of_kind(outcomes: Iterable[RequestOutcome], kind: UserKind) -> list[float]:
    return [1e3 * outcome.answered_after for outcome in outcomes if outcome.arrival.kind is kind]


def sustained(rows: Iterable[LoadRow], replicas: int, mode: str) -> float:
    """Return the best goodput of the rates at which 99 % were answered within the limit; 0 where there is none."""
    return max(
        (row.goodput_rps for row in rows if (row.replicas, row.mode) == (replicas, mode) and row.is_within_limit),
        default=0.0,
    )


def header(found: LoadResult, config: LoadConfig, *, data: str) -> dict[str, Any]:
    """Return the header's fields."""
    return {
        "benchmark": NAME,
        "data": data,
        "k": config.k,
        "mix": asdict(config.mix),
        "seconds": config.seconds,
        "settle_seconds": config.settle,
        "threads": config.threads,
        "bare": {str(replicas): asdict(one) for replicas, one in found.baseline.items()},
        "saturated": {
            str(replicas): {str(mode): asdict(loop) for mode, loop in loops.items()}
            for replicas, loops in found.saturated.items()
        },
    }
