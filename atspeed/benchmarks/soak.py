"""A long run of the real services with clients that crash: does anything grow, does anything slow down?

A steady load of recommendations and events is measured while other clients, processes of their own, open calls and are killed
in the middle of them. Every process's memory, descriptors and threads are noted on the way. Memory that is meant to fill,
the KV tier, is kept small, so that it is full after the warm-up. Exit code 0 when all is level, 1 when something is not.

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
from atspeed.client.recommender import RecommenderClient, RecommenderError
from atspeed.engine.bundle.manifest import Bundle
from atspeed.local.redis_server import local_redis
from atspeed.local.stack import LocalStack, ServiceProcess

SAMPLE_SECONDS = 2.0
_FLAGS = {"target": {"kv-memory-mb": 16, "threads": 1}, "draft": {"kv-memory-mb": 16}, "orchestrator": {}}


@dataclass(frozen=True)
class Bounds:
    """What counts as level. memory_mb, descriptors, threads: most growth of a process. p99: most relative drift."""

    memory_mb: float = 20.0
    descriptors: int = 8
    threads: int = 2
    p99: float = 0.1


@dataclass(frozen=True)
class Sample:
    """One process at one time. at: seconds since the start. memory: resident bytes."""

    at: float
    memory: int
    descriptors: int
    threads: int


@dataclass
class Run:
    """What was seen. samples: by process. latencies: (seconds since the start, seconds) of every answered list.

    crashes: when clients were killed, in seconds since the start.
    """

    samples: dict[str, list[Sample]] = field(default_factory=dict)
    latencies: list[tuple[float, float]] = field(default_factory=list)
    failures: list[str] = field(default_factory=list)
    crashes: list[float] = field(default_factory=list)
    left_behind: int = 0


@dataclass(frozen=True)
class Finding:
    """One thing that had to stay level. what: of which process. value, most: in the unit that `what` names."""

    what: str
    value: float
    most: float

    @property
    def level(self) -> bool:
        """Whether it did."""
        return self.value <= self.most


def sample(process: ServiceProcess, at: float) -> Sample:
    """A process now, from /proc."""
    if process.process is None:
        raise RuntimeError(f"{process.module} is not running")
    folder = Path("/proc") / str(process.process.pid)
    pages = int((folder / "statm").read_text().split()[1])
    return Sample(
        at,
        pages * os.sysconf("SC_PAGE_SIZE"),
        len(list((folder / "fd").iterdir())),
        len(list((folder / "task").iterdir())),
    )


def findings(run: Run, warm_up: float, end: float, bounds: Bounds) -> list[Finding]:
    """The first fifth after the warm-up against the last fifth; of latencies the halves, for there are few beyond p99."""
    found = []
    for name, samples in run.samples.items():
        for unit, attribute, scale, most in (
            ("MB of memory", "memory", 2**20, bounds.memory_mb),
            ("descriptors", "descriptors", 1, bounds.descriptors),
            ("threads", "threads", 1, bounds.threads),
        ):
            first, last = _levels(samples, warm_up, attribute)
            found.append(Finding(f"{name}: more {unit}", round((last - first) / scale, 2), most))
    middle = (warm_up + end) / 2
    before = [seconds for at, seconds in run.latencies if warm_up <= at < middle]
    later = [seconds for at, seconds in run.latencies if at >= middle]
    drift = float(np.quantile(later, 0.99) / np.quantile(before, 0.99) - 1) if before and later else 0.0
    found.append(Finding("p99, relative drift", round(drift, 3), bounds.p99))
    found.append(Finding("failed requests", len(run.failures), 0))
    found.append(Finding("recommendations left behind", run.left_behind, 0))
    return found


def growths(run: Run, warm_up: float, end: float) -> list[str]:
    """What each process's memory grew by from the first fifth after the warm-up to the last, for each list and each crashed
    client between the middles of these.

    One number says nothing of which of the two it was; two runs of other rates do.
    """
    edge = (end - warm_up) / 10
    lists = sum(warm_up + edge <= at < end - edge for at, _ in run.latencies)
    crashed = sum(warm_up + edge <= at < end - edge for at in run.crashes)
    found = []
    for name, samples in run.samples.items():
        first, last = _levels(samples, warm_up, "memory")
        grown = (last - first) / 1024
        found.append(
            f"{name}: {grown / max(1, lists):.2f} KB of memory for each of {lists} lists, "
            f"or {grown / max(1, crashed):.1f} for each of {crashed} crashed clients"
        )
    return found


def _levels(samples: Sequence[Sample], warm_up: float, attribute: str) -> tuple[float, float]:
    """The medians of the first and of the last fifth after the warm-up."""
    after = [getattr(one, attribute) for one in samples if one.at >= warm_up]
    fifth = max(1, len(after) // 5)
    return statistics.median(after[:fifth]), statistics.median(after[-fifth:])


async def soak(
    stack: LocalStack, histories: Sequence[History], seconds: float, rate: float, seed: int, crash_seconds: float
) -> Run:
    """Load, crashes and samples for so long."""
    run, begun = Run(), time.monotonic()
    names = {f"{service.module}-{number}": service for number, service in enumerate(stack.services)}
    async with RecommenderClient(stack.address) as client:
        async with background(
            load(run, client, histories, rate, random.Random(seed), begun),  # noqa: S311 - no secret
            crashes(run, stack.address, histories[0], random.Random(seed), begun, crash_seconds),  # noqa: S311 - no secret
        ):
            while (at := time.monotonic() - begun) < seconds:
                for name, service in names.items():
                    run.samples.setdefault(name, []).append(sample(service, at))
                await asyncio.sleep(SAMPLE_SECONDS)
        await asyncio.sleep(1.0)  # what crashed clients had asked for is to be given up by now
        info = await client.info()
        run.left_behind = info.running_recommendations + info.waiting_recommendations
    return run


@asynccontextmanager
async def background(*work: Coroutine[Any, Any, None]) -> AsyncIterator[None]:
    """Let coroutines run beside the block; an exception of theirs ends it."""
    async with asyncio.TaskGroup() as group:
        tasks = [group.create_task(one) for one in work]
        yield
        for task in tasks:
            task.cancel()


async def load(
    run: Run, client: RecommenderClient, histories: Sequence[History], rate: float, rng: random.Random, begun: float
) -> None:
    """`rate` requests a second, whether or not those before have been answered; every tenth time an event."""

    async def one(number: int) -> None:
        asked = time.monotonic()
        try:
            if number % 10 == 0:
                await client.record(f"user-{number % 500}", histories[number % len(histories)][:1])
            else:
                await client.recommend(history=histories[number % len(histories)], k=10)
                run.latencies.append((asked - begun, time.monotonic() - asked))
        except RecommenderError as error:
            run.failures.append(str(error))

    async with asyncio.TaskGroup() as group:
        for number in range(sys.maxsize):
            group.create_task(one(number))
            await asyncio.sleep(rng.expovariate(rate))


async def crashes(run: Run, address: str, history: History, rng: random.Random, begun: float, pause: float) -> None:
    """Clients that are killed while their calls are under way, one after the other."""
    while True:
        client = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "atspeed.benchmarks.crashing_client", address, *history),
            stdout=asyncio.subprocess.PIPE,
        )
        try:
            assert client.stdout is not None  # noqa: S101 - it was asked for
            await client.stdout.readline()
            await asyncio.sleep(rng.random() * 0.3)
            run.crashes.append(time.monotonic() - begun)
        finally:
            with contextlib.suppress(ProcessLookupError):
                client.send_signal(signal.SIGKILL)
            await client.wait()
        await asyncio.sleep(pause)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run, print, write; 0 when all is level."""
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
        run = asyncio.run(soak(local, histories, seconds, chosen.rate, chosen.seed, chosen.crash_seconds))
    found = findings(run, warm_up=seconds / 5, end=seconds, bounds=bounds)
    for finding in found:
        sys.stdout.write(
            f"{'ok ' if finding.level else 'BAD'} {finding.what}: {finding.value} (at most {finding.most})\n"
        )
    sys.stdout.writelines(f"{line}\n" for line in growths(run, warm_up=seconds / 5, end=seconds))
    sys.stdout.write(f"{len(run.latencies)} lists, {len(run.crashes)} crashed clients\n")
    if chosen.json:
        header = provenance(bundle, seed=chosen.seed) | {"bounds": asdict(bounds), "crashes": len(run.crashes)}
        rows = [asdict(finding) | {"level": finding.level} for finding in found]
        series = [{"process": name, **asdict(one)} for name, samples in run.samples.items() for one in samples]
        Result(header | {"failures": run.failures[:20]}, [*rows, *series]).write(chosen.json)
    return 0 if all(finding.level for finding in found) else 1


if __name__ == "__main__":
    sys.exit(main())
