"""Throughput of services at saturation: closed loops of more and more requests."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Sequence

from atspeed.benchmarks.in_process_baseline import Throughput
from atspeed.benchmarks.results import BenchmarkError
from atspeed_client import AsyncClient, RecommenderError, RecommendRequest

CONCURRENCIES = (2, 4, 8, 16)
"""Requests at once. The services also hold some outside of the target, so they need more than the in-process baseline."""


async def saturated(client: AsyncClient, requests: Callable[[int], Sequence[RecommendRequest]]) -> Throughput:
    """Return the best of the closed loops. requests: those of a loop, by the number of requests at once.

    Raises BenchmarkError when a request fails: the loop would then measure refusals.
    """
    loops = [await closed_loop(client.send, requests(concurrency), concurrency) for concurrency in CONCURRENCIES]
    return max(loops, key=lambda loop: loop.searches_per_second)


async def closed_loop(
    send: Callable[[RecommendRequest], Awaitable[object]], requests: Sequence[RecommendRequest], concurrency: int
) -> Throughput:
    """Send all requests, with `concurrency` of them at once. Raises BenchmarkError when one fails."""
    waiting = iter(requests)

    async def take_turns() -> None:
        for request in waiting:
            await send(request)

    begun = time.perf_counter()
    try:
        async with asyncio.TaskGroup() as group:
            for _ in range(concurrency):
                group.create_task(take_turns())
    except* RecommenderError as errors:
        raise BenchmarkError(f"closed loop of {concurrency} requests: {errors.exceptions[0]}") from errors
    return Throughput(concurrency, len(requests), len(requests) / (time.perf_counter() - begun))
