"""A bounded number of coroutines at once, their results as they are ready."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Coroutine, Iterator
from typing import Any, TypeVar

Result = TypeVar("Result")


async def bounded_as_completed(
    work: Iterator[Coroutine[Any, Any, Result]], at_once: int
) -> AsyncGenerator[Result, None]:
    """The results of `work`. What has not begun is not even taken from it, and closing this cancels what has."""
    running: set[asyncio.Task[Result]] = set()
    try:
        while True:
            while len(running) < at_once and (coroutine := next(work, None)) is not None:
                running.add(asyncio.create_task(coroutine))
            if not running:
                return
            done, running = await asyncio.wait(running, return_when=asyncio.FIRST_COMPLETED)
            for task in done:
                yield task.result()
    finally:
        for task in running:
            task.cancel()
        await asyncio.gather(*running, return_exceptions=True)
