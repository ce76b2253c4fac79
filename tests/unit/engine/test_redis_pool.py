"""The pool of Redis connections: its checks are no part of the call that starts them."""

from __future__ import annotations

import asyncio
from contextvars import ContextVar

import pytest
from redis.exceptions import ConnectionError as RedisConnectionError

from atspeed.engine.kv.redis_pool import CheckedPool

_call: ContextVar[str] = ContextVar("call", default="none")


async def test_checks_keep_nothing_of_the_call_that_starts_them(
    monkeypatch: pytest.MonkeyPatch, unused_tcp_port: int
) -> None:
    found: asyncio.Queue[str] = asyncio.Queue()

    async def note(_pool: CheckedPool) -> None:
        found.put_nowait(_call.get())

    monkeypatch.setattr(CheckedPool, "_check_forever", note)
    pool = CheckedPool(check_seconds=1.0, host="127.0.0.1", port=unused_tcp_port, max_connections=1, timeout=1)
    _call.set("with a token")
    with pytest.raises(RedisConnectionError):
        await pool.get_connection()
    assert await found.get() == "none"
    await pool.aclose()
