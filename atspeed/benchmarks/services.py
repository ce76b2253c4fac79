"""Services of a bundle on this machine, and requests to them for many users."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from atspeed.benchmarks.results import BenchmarkError
from atspeed.engine.bundle.manifest import read_manifest
from atspeed.engine.model.provider import Provider
from atspeed.local.redis_server import local_redis
from atspeed.local.stack import LocalStack, ServiceProcess
from atspeed_client import AsyncClient, Recommendation, RecommendRequest

# A shared machine may be slow. A request, plan or pass that ran out of time would distort the measurement.
PATIENCE_SECONDS = 120.0
_ORCHESTRATOR = {
    "request-timeout-seconds": PATIENCE_SECONDS,
    "draft-timeout-seconds": 60,
    "draft-timeout-factor": 10_000,
    "target-pass-seconds": 60,
    "max-k": 1000,
    "shadow-share": 0,  # shadow checks would share the cores with the measurement
}


@dataclass(frozen=True)
class ServiceOptions:
    """Options of the services.

    Attributes:
        threads: threads of each model; draft and target of a request take turns. None: the cores are shared out.
        provider: the device that the models run on.
        planner: "fixed" where passes are counted, because an adaptive planner depends on the machine.
        models: further settings of draft and target.
    """

    threads: int | None = None
    provider: Provider = "cpu"
    planner: Literal["adaptive", "fixed"] = "adaptive"
    models: Mapping[str, object] = field(default_factory=dict)

    @property
    def flags(self) -> Mapping[str, Mapping[str, object]]:
        """Settings of the services, for LocalStack."""
        models: dict[str, object] = {"provider": self.provider, **self.models}
        if self.threads is not None:
            models["threads"] = self.threads
        return {"orchestrator": {**_ORCHESTRATOR, "planner": self.planner}, "draft": models, "target": models}


@dataclass(frozen=True)
class Services:
    """Draft, target, orchestrator and Redis as real processes, and a client of the orchestrator."""

    client: AsyncClient
    local: LocalStack
    redis_url: str

    @property
    def target(self) -> str:
        """Address of the target."""
        return self.local.targets[0].address

    def orchestrator(self, bundle: Path, draft: str) -> ServiceProcess:
        """Return another orchestrator over the same target and Redis, with the draft at this address. It is not started yet."""
        flags = {"bundle": bundle.absolute(), "redis-url": self.redis_url, "target": self.target, "draft": draft}
        log = self.local.log_folder / "another-orchestrator.log"
        return ServiceProcess("orchestrator", {**_ORCHESTRATOR, **flags, "planner": "fixed"}, log)


@asynccontextmanager
async def running_services(bundle: Path, options: ServiceOptions | None = None) -> AsyncIterator[Services]:
    """Start the services, and drain them afterwards."""
    async with started(bundle, (options or ServiceOptions()).flags) as running:
        yield running


@asynccontextmanager
async def started(
    bundle: Path,
    flags: Mapping[str, Mapping[str, object]],
    *,
    targets: int = 1,
    timeout_seconds: float = PATIENCE_SECONDS,
) -> AsyncIterator[Services]:
    """Start the services with these settings, and drain them afterwards. timeout_seconds: of the client's calls."""
    async with AsyncExitStack() as stack:
        redis_url = stack.enter_context(local_redis())
        drafts = 1 if read_manifest(bundle).draft else 0
        local = LocalStack(bundle, redis_url=redis_url, drafts=drafts, targets=targets, flags=flags)
        stack.enter_context(local)
        client = AsyncClient(local.address, timeout_seconds=timeout_seconds, retries=0)  # a refusal is a result
        yield Services(await stack.enter_async_context(client), local, redis_url)


@asynccontextmanager
async def services(bundle: Path, options: ServiceOptions | None = None) -> AsyncIterator[AsyncClient]:
    """Start the services and yield a client of them."""
    async with running_services(bundle, options) as running:
        yield running.client


async def ask(
    client: AsyncClient, requests: Sequence[RecommendRequest], *, progress: Progress, title: str
) -> list[Recommendation]:
    """Return the reply to each request, with as many at once as there are cores.

    Raises RecommenderError, or BenchmarkError for a degraded reply.
    """
    task = progress.add_task(title, total=len(requests))
    slots = asyncio.Semaphore(os.cpu_count() or 1)

    async def one(request: RecommendRequest) -> Recommendation:
        async with slots:
            reply = await healthy_reply(client, request)
        progress.advance(task)
        return reply

    replies = await asyncio.gather(*map(one, requests))
    progress.remove_task(task)
    return replies


async def healthy_reply(client: AsyncClient, request: RecommendRequest) -> Recommendation:
    """Return a reply that is not degraded. Raises BenchmarkError otherwise: a failure would distort the measurement."""
    reply = await client.send(request)
    if reply.degraded:
        raise BenchmarkError(f"a service failed while it was measured: {'; '.join(reply.degraded_descriptions)}")
    return reply


def mean(values: Sequence[float]) -> float:
    """Return the arithmetic mean to four decimals; 0 for no values."""
    return round(sum(values) / len(values), 4) if values else 0.0


def progress_bar() -> Progress:
    """Return a progress bar on a terminal, which disappears when it is done."""
    console = Console(stderr=True)
    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn()
    return Progress(*columns, console=console, transient=True, disable=not console.is_terminal)
