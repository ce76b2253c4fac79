"""Tasks that run beside a block."""

from __future__ import annotations

import asyncio

import pytest
from structlog.testing import capture_logs

from atspeed.concurrency.tasks import background_task


async def test_the_task_ends_with_the_block() -> None:
    begun, ended = asyncio.Event(), asyncio.Event()

    async def work() -> None:
        begun.set()
        try:
            await asyncio.Event().wait()
        finally:
            ended.set()

    with capture_logs() as logged:
        async with background_task(work(), "work"):
            await begun.wait()
            assert not ended.is_set()
    assert ended.is_set()
    assert logged == []


async def test_failed_task_is_logged_and_the_block_continues() -> None:
    async def work() -> None:
        raise ValueError("broken")

    with capture_logs() as logged:
        async with background_task(work(), "work"):
            while not logged:  # noqa: ASYNC110 - a log has no event
                await asyncio.sleep(0)
            (entry,) = logged
            assert (entry["log_level"], entry["task"], str(entry["exc_info"])) == ("error", "work", "broken")


async def test_the_task_ends_where_the_block_fails() -> None:
    with pytest.raises(ValueError, match="of the block"):
        async with background_task(asyncio.sleep(3600), "work"):
            raise ValueError("of the block")
    assert [task.get_name() for task in asyncio.all_tasks() if task.get_name() == "work"] == []
