"""Runs a bounded number of coroutines and yields results as they complete."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Coroutine, Iterator
from typing import Any, TypeVar

Result = TypeVar("Result")


async def bounded_as_completed(
    work: Iterator[Coroutine[Any, Any, Result]], at_once: int
) -> AsyncGenerator[Result, None]:
    """Yield the results of `work`, which is consumed lazily. Closing this generator cancels the running coroutines."""
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
