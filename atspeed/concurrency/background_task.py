"""Tasks beside a block: they end with it, and that one failed is said at once and not when somebody awaits it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Coroutine
from contextlib import asynccontextmanager
from typing import Any

import structlog

_log: structlog.stdlib.BoundLogger = structlog.get_logger(__name__)


@asynccontextmanager
async def background_task(work: Coroutine[Any, Any, None], name: str) -> AsyncIterator[None]:
    """Runs `work` for as long as the block lasts. name: the task's."""
    task = asyncio.get_running_loop().create_task(work, name=name)
    task.add_done_callback(_heard)
    try:
        yield
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


def _heard(task: asyncio.Task[None]) -> None:
    if not task.cancelled() and (error := task.exception()) is not None:
        _log.error("a task that should run on has failed", task=task.get_name(), exc_info=error)
