"""Client that keeps calls open until it is killed, for the soak run.

python -m atspeed.benchmarks.crashing_client ADDRESS ITEM...
"""

from __future__ import annotations

import asyncio
import contextlib
import sys
from collections.abc import Sequence

from atspeed_client import AsyncClient, RecommenderError, RecommendRequest

CALLS = 4  # of each kind: more than a target batches at once on a small machine


async def call_on(address: str, history: Sequence[str]) -> None:
    """Send recommendations and batches without end. Writes one line to stdout when the first have been sent."""
    async with AsyncClient(address) as client, asyncio.TaskGroup() as group:
        for _ in range(CALLS):
            group.create_task(recommend_on(client, history))
            group.create_task(batch_on(client, history))
        await client.info()
        sys.stdout.write("calling\n")
        sys.stdout.flush()


async def recommend_on(client: AsyncClient, history: Sequence[str]) -> None:
    """Ask for one list after the other."""
    while True:
        with contextlib.suppress(RecommenderError):
            await client.recommend(history=history, k=20)


async def batch_on(client: AsyncClient, history: Sequence[str]) -> None:
    """Ask for one batch after the other."""
    requests = [RecommendRequest(history=history, k=10) for _ in range(8)]
    while True:
        with contextlib.suppress(RecommenderError):
            async for _ in client.recommend_batch(requests):
                pass


if __name__ == "__main__":
    asyncio.run(call_on(sys.argv[1], sys.argv[2:]))
