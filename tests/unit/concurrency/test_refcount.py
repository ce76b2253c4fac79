"""Reference counts: the last release, time without a reference, waiting for it."""

from __future__ import annotations

import asyncio

from atspeed.concurrency.refcount import RefCount


def test_last_release_is_reported() -> None:
    refcount = RefCount()
    refcount.acquire()
    refcount.acquire()
    assert [refcount.release(), refcount.release()] == [False, True]


def test_unused_time_counts_only_without_references() -> None:
    refcount = RefCount()
    assert refcount.unused_for(0)
    with refcount.held():
        assert refcount.count == 1
        assert not refcount.unused_for(0)
    assert refcount.unused_for(0)
    assert not refcount.unused_for(3600)


async def test_waiter_continues_after_the_last_release() -> None:
    refcount = RefCount()
    await refcount.wait_unused()
    refcount.acquire()
    refcount.acquire()
    waiting = asyncio.create_task(refcount.wait_unused())
    refcount.release()
    await asyncio.sleep(0)
    assert not waiting.done()
    refcount.release()
    await waiting
