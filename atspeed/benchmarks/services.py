"""A bundle's services on this machine, asked about many users."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from atspeed.benchmarks.errors import BenchmarkError
from atspeed.client.recommender import RecommenderClient
from atspeed.engine.bundle.manifest import read_manifest
from atspeed.engine.model.decoder import Provider
from atspeed.local.redis_server import local_redis
from atspeed.local.stack import LocalStack, ServiceProcess
from atspeed.v1 import recommendation_pb2 as pb

# A shared machine may be slow; a request, a plan or a pass that ran out of time would be counted as what the method needs.
PATIENCE_SECONDS = 120.0
_ORCHESTRATOR = {
    "request-timeout-seconds": PATIENCE_SECONDS,
    "draft-timeout-seconds": 60,
    "draft-timeout-factor": 10_000,
    "target-pass-seconds": 60,
    "max-k": 1000,
    "shadow-share": 0,  # nothing but what is measured
}


@dataclass(frozen=True)
class Running:
    """How the services run. threads: of each model; a request's draft and target take turns. None: cores are shared out.

    planner: where passes are counted, "fixed", as what pays depends on the machine.
    """

    threads: int | None = None
    provider: Provider = "cpu"
    planner: Literal["adaptive", "fixed"] = "adaptive"

    @property
    def flags(self) -> Mapping[str, Mapping[str, object]]:
        """The services' settings, for LocalStack."""
        models: dict[str, object] = {"provider": self.provider}
        if self.threads is not None:
            models["threads"] = self.threads
        return {"orchestrator": {**_ORCHESTRATOR, "planner": self.planner}, "draft": models, "target": models}


@dataclass(frozen=True)
class Services:
    """Draft, a target, the orchestrator and Redis as real processes. client: of the orchestrator."""

    client: RecommenderClient
    local: LocalStack
    redis_url: str

    @property
    def target(self) -> str:
        """Where the target listens."""
        return self.local.targets[0].address

    def orchestrator(self, bundle: Path, draft: str) -> ServiceProcess:
        """Another one over the same target and Redis, whose plans are all that this draft answers; to be started."""
        flags = {"bundle": bundle.absolute(), "redis-url": self.redis_url, "target": self.target, "draft": draft}
        log = self.local.log_folder / "another-orchestrator.log"
        return ServiceProcess("orchestrator", {**_ORCHESTRATOR, **flags, "planner": "fixed"}, log)


@asynccontextmanager
async def running_services(bundle: Path, running: Running | None = None) -> AsyncIterator[Services]:
    """Start them, and drain them afterwards."""
    async with AsyncExitStack() as stack:
        redis_url = stack.enter_context(local_redis())
        drafts = 1 if read_manifest(bundle).draft else 0
        flags = (running or Running()).flags
        local = stack.enter_context(LocalStack(bundle, redis_url=redis_url, drafts=drafts, flags=flags))
        client = RecommenderClient(local.address, timeout_seconds=PATIENCE_SECONDS)
        yield Services(await stack.enter_async_context(client), local, redis_url)


@asynccontextmanager
async def services(bundle: Path, running: Running | None = None) -> AsyncIterator[RecommenderClient]:
    """A client of a bundle's services."""
    async with running_services(bundle, running) as started:
        yield started.client


async def ask(
    client: RecommenderClient, requests: Sequence[pb.RecommendRequest], *, progress: Progress, title: str
) -> list[pb.RecommendResponse]:
    """The reply to each request, as many at once as there are cores. Raises RecommenderError, or BenchmarkError if degraded."""
    task = progress.add_task(title, total=len(requests))
    slots = asyncio.Semaphore(os.cpu_count() or 1)

    async def one(request: pb.RecommendRequest) -> pb.RecommendResponse:
        async with slots:
            reply = await undisturbed(client, request)
        progress.advance(task)
        return reply

    replies = await asyncio.gather(*map(one, requests))
    progress.remove_task(task)
    return replies


async def undisturbed(client: RecommenderClient, request: pb.RecommendRequest) -> pb.RecommendResponse:
    """A reply that no failure took part in: what a failing draft costs is not what the method costs."""
    reply = await client.send(request)
    if reply.degraded:
        raise BenchmarkError(f"a service failed while it was measured: {'; '.join(reply.degraded_descriptions)}")
    return reply


def mean(values: Sequence[float]) -> float:
    """Arithmetic mean, to four decimals; 0 of nothing."""
    return round(sum(values) / len(values), 4) if values else 0.0


def progress_bar() -> Progress:
    """A bar that is gone when it is done."""
    return Progress(
        TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), transient=True
    )
