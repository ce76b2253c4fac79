"""Soak run with crashing clients: checks the services for growth and slowdown.

A steady load of recommendations and events is measured, while other client processes are killed in the middle of their calls.
Memory, descriptors and threads of every process are sampled. The KV tier in memory is kept small, so that it is full after the
warm-up. The exit code is 0 if every value stayed within its bound, else 1.

    python -m atspeed.benchmarks.soak --bundle bundles/movielens-100k --minutes 30 --json var/soak.json
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import os
import random
import signal
import statistics
import sys
import time
from collections.abc import AsyncIterator, Coroutine, Sequence
from contextlib import ExitStack, asynccontextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from atspeed.benchmarks.histories import History, choose_histories
from atspeed.benchmarks.provenance import provenance
from atspeed.benchmarks.results import Result
from atspeed.engine.bundle.bundle import Bundle
from atspeed.local.redis_server import local_redis
from atspeed.local.stack import LocalStack, ServiceProcess
from atspeed_client import AsyncClient, RecommenderError

SAMPLE_SECONDS = 2.0  # 180 samples in each of the compared fifths of half an hour
_FLAGS = {"target": {"kv-memory-mb": 16, "threads": 1}, "draft": {"kv-memory-mb": 16}, "orchestrator": {}}


@dataclass(frozen=True)
class Bounds:
    """Bounds of the checks.

    Attributes:
        memory_mb, descriptors, threads: largest growth of a process.
        p99: largest relative drift.
    """

    memory_mb: float = 20.0
    descriptors: int = 8
    threads: int = 2
    p99: float = 0.1


@dataclass(frozen=True)
class ProcessSample:
    """State of one process. at: seconds since the start. memory: resident bytes."""

    at: float
    memory: int
    descriptors: int
    threads: int


@dataclass
class SoakRecord:
    """Record of a record.

    Attributes:
        samples: by process.
        latencies: (seconds since the start, seconds) of every list.
        failures: errors of requests.
        crashes: moments at which clients were killed, in seconds since the start.
        left_behind: recommendations that still ran or waited after the end.
    """

    samples: dict[str, list[ProcessSample]] = field(default_factory=dict)
    latencies: list[tuple[float, float]] = field(default_factory=list)
    failures: list[str] = field(default_factory=list)
    crashes: list[float] = field(default_factory=list)
    left_behind: int = 0


@dataclass(frozen=True)
class Check:
    """One value and its bound. what: process and unit. level: in the result file, whether the value is within the bound."""

    what: str
    value: float
    most: float

    @property
    def level(self) -> bool:
        """True if the value is within its bound."""
        return self.value <= self.most


def sample(process: ServiceProcess, at: float) -> ProcessSample:
    """Sample a process from /proc."""
    if process.process is None:
        raise RuntimeError(f"{process.module} is not running")
    folder = Path("/proc") / str(process.process.pid)
    pages = int((folder / "statm").read_text().split()[1])
    return ProcessSample(
        at,
        pages * os.sysconf("SC_PAGE_SIZE"),
        len(list((folder / "fd").iterdir())),
        len(list((folder / "task").iterdir())),
    )


def checks(record: SoakRecord, warm_up: float, end: float, bounds: Bounds) -> list[Check]:
    """Compare the first fifth after the warm-up with the last fifth. Latencies are compared by halves: few lie beyond p99."""
    found = []
    for name, samples in record.samples.items():
        for unit, attribute, scale, most in (
            ("MB of memory", "memory", 2**20, bounds.memory_mb),
            ("descriptors", "descriptors", 1, bounds.descriptors),
            ("threads", "threads", 1, bounds.threads),
        ):
            first, last = _levels(samples, warm_up, attribute)
            found.append(Check(f"{name}: more {unit}", round((last - first) / scale, 2), most))
    middle = (warm_up + end) / 2
    before = [seconds for at, seconds in record.latencies if warm_up <= at < middle]
    later = [seconds for at, seconds in record.latencies if at >= middle]
    drift = float(np.quantile(later, 0.99) / np.quantile(before, 0.99) - 1) if before and later else 0.0
    found.append(Check("p99, relative drift", round(drift, 3), bounds.p99))
    found.append(Check("failed requests", len(record.failures), 0))
    found.append(Check("recommendations left behind", record.left_behind, 0))
    return found


def growths(record: SoakRecord, warm_up: float, end: float) -> list[str]:
    """Return the growth of each process's memory per list and per crashed client.

    Growth is from the first fifth after the warm-up to the last; lists and clients are those between the middles of these.
    Two runs with other rates tell which of the two causes the growth.
    """
    edge = (end - warm_up) / 10
    lists = sum(warm_up + edge <= at < end - edge for at, _ in record.latencies)
    crashed = sum(warm_up + edge <= at < end - edge for at in record.crashes)
    found = []
    for name, samples in record.samples.items():
        first, last = _levels(samples, warm_up, "memory")
        grown = (last - first) / 1024
        found.append(
            f"{name}: {grown / max(1, lists):.2f} KB of memory for each of {lists} lists, "
            f"or {grown / max(1, crashed):.1f} for each of {crashed} crashed clients"
        )
    return found


def _levels(samples: Sequence[ProcessSample], warm_up: float, attribute: str) -> tuple[float, float]:
    """Return the medians of the first and of the last fifth after the warm-up."""
    after = [getattr(one, attribute) for one in samples if one.at >= warm_up]
    fifth = max(1, len(after) // 5)
    return statistics.median(after[:fifth]), statistics.median(after[-fifth:])


async def soak(
    stack: LocalStack, histories: Sequence[History], seconds: float, rate: float, seed: int, crash_seconds: float
) -> SoakRecord:
    """Run load and crashing clients for so many seconds, and sample the processes."""
    record, begun = SoakRecord(), time.monotonic()
    names = {f"{service.module}-{number}": service for number, service in enumerate(stack.services)}
    async with AsyncClient(stack.address) as client:
        async with background(
            load(record, client, histories, rate, random.Random(seed), begun),  # noqa: S311 - no secret
            crashes(record, stack.address, histories[0], random.Random(seed), begun, crash_seconds),  # noqa: S311 - no secret
        ):
            while (at := time.monotonic() - begun) < seconds:
                for name, service in names.items():
                    record.samples.setdefault(name, []).append(sample(service, at))
                await asyncio.sleep(SAMPLE_SECONDS)
        await asyncio.sleep(1.0)  # by now the calls of crashed clients are cancelled
        info = await client.info()
        record.left_behind = info.running_recommendations + info.waiting_recommendations
    return record


@asynccontextmanager
async def background(*work: Coroutine[Any, Any, None]) -> AsyncIterator[None]:
    """Run coroutines during the block. Their exceptions end it."""
    async with asyncio.TaskGroup() as group:
        tasks = [group.create_task(one) for one in work]
        yield
        for task in tasks:
            task.cancel()


async def load(
    record: SoakRecord,
    client: AsyncClient,
    histories: Sequence[History],
    rate: float,
    rng: random.Random,
    begun: float,
) -> None:
    """Send `rate` requests a second, whether or not earlier ones are answered. Every tenth is an event."""

    async def one(number: int) -> None:
        asked = time.monotonic()
        try:
            if number % 10 == 0:
                await client.record(f"user-{number % 500}", histories[number % len(histories)][:1])
            else:
                await client.recommend(history=histories[number % len(histories)], k=10)
                record.latencies.append((asked - begun, time.monotonic() - asked))
        except RecommenderError as error:
            record.failures.append(str(error))

    async with asyncio.TaskGroup() as group:
        for number in range(sys.maxsize):
            group.create_task(one(number))
            await asyncio.sleep(rng.expovariate(rate))


async def crashes(
    record: SoakRecord, address: str, history: History, rng: random.Random, begun: float, pause: float
) -> None:
    """Start clients one after the other, and kill each during its calls."""
    while True:
        client = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "atspeed.benchmarks.crashing_client", address, *history),
            stdout=asyncio.subprocess.PIPE,
        )
        try:
            assert client.stdout is not None  # noqa: S101 - stdout is a pipe
            await client.stdout.readline()
            await asyncio.sleep(rng.random() * 0.3)
            record.crashes.append(time.monotonic() - begun)
        finally:
            with contextlib.suppress(ProcessLookupError):
                client.send_signal(signal.SIGKILL)
            await client.wait()
        await asyncio.sleep(pause)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run, print and write the result. Returns 0 if every value is within its bound."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bundle", type=Path, required=True)
    parser.add_argument("--minutes", type=float, default=30.0)
    parser.add_argument("--rate", type=float, default=20.0, help="requests a second")
    parser.add_argument("--crash-seconds", type=float, default=3.0, help="from one crashed client to the next")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path)
    chosen = parser.parse_args(arguments)
    bundle, seconds, bounds = Bundle(chosen.bundle), chosen.minutes * 60, Bounds()
    histories = choose_histories(bundle.catalogue(), None, 200, chosen.seed)
    with ExitStack() as stack:
        redis_url = stack.enter_context(local_redis())
        drafts = 1 if bundle.manifest.draft else 0
        local = stack.enter_context(
            LocalStack(chosen.bundle, redis_url=redis_url, drafts=drafts, targets=2, flags=_FLAGS)
        )
        record = asyncio.run(soak(local, histories, seconds, chosen.rate, chosen.seed, chosen.crash_seconds))
    found = checks(record, warm_up=seconds / 5, end=seconds, bounds=bounds)
    for check in found:
        sys.stdout.write(f"{'ok ' if check.level else 'BAD'} {check.what}: {check.value} (at most {check.most})\n")
    sys.stdout.writelines(f"{line}\n" for line in growths(record, warm_up=seconds / 5, end=seconds))
    sys.stdout.write(f"{len(record.latencies)} lists, {len(record.crashes)} crashed clients\n")
    if chosen.json:
        header = provenance(bundle, seed=chosen.seed) | {"bounds": asdict(bounds), "crashes": len(record.crashes)}
        rows = [asdict(check) | {"level": check.level} for check in found]
        series = [{"process": name, **asdict(one)} for name, samples in record.samples.items() for one in samples]
        Result(header | {"failures": record.failures[:20]}, [*rows, *series]).write(chosen.json)
    return 0 if all(check.level for check in found) else 1


if __name__ == "__main__":
    sys.exit(main())
