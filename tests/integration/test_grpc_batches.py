"""Real servers and channels: every batch of every call comes to its end, where gRPC frees it, however the call ends."""

from __future__ import annotations

import asyncio
import importlib
from pathlib import Path
from typing import Any

import grpc
import pytest

from atspeed.rpc import grpc_workarounds
from atspeed.rpc.server import running
from tests.echo import SERVICE, Echo, call, settings, until

CALLS = 5
cygrpc: Any = importlib.import_module("grpc._cython.cygrpc")


class Batches:
    """Counts gRPC's own executions of batches. An execution that is cancelled does not end."""

    def __init__(self) -> None:
        self.begun = self.ended = 0
        current = cygrpc.execute_batch
        self._execute = current.execute if isinstance(current, grpc_workarounds.FreeingExecutor) else current

    async def execute(self, call: Any, operations: tuple[Any, ...], loop: Any) -> None:
        self.begun += 1
        await self._execute(call, operations, loop)
        self.ended += 1


@pytest.fixture
def batches(monkeypatch: pytest.MonkeyPatch) -> Batches:
    counted = Batches()
    monkeypatch.setattr(cygrpc, "execute_batch", counted.execute)
    grpc_workarounds.free_ended_batches()
    return counted


@pytest.mark.parametrize("kind", ["UnaryUnary", "UnaryStream", "StreamUnary", "StreamStream"])
async def test_calls_that_answer_fail_and_are_given_up(tmp_path: Path, batches: Batches, kind: str) -> None:
    echo = Echo()
    async with (
        running(settings(tmp_path), [echo.registration()]) as server,
        grpc.aio.insecure_channel(server.address) as channel,
    ):
        assert await call(channel, kind, "hello") == "hello"
        with pytest.raises(grpc.aio.AioRpcError, match="must be at least 1"):
            await call(channel, kind, "invalid")
        waiting = [asyncio.create_task(call(channel, kind, "wait")) for _ in range(CALLS)]
        await until(lambda: echo.calls == 2 + CALLS)
        for one in waiting:
            one.cancel()
        await asyncio.wait(waiting)
        assert all(one.cancelled() for one in waiting)
        assert await call(channel, kind, "hello again") == "hello again"
    assert batches.begun > CALLS  # it is what gRPC calls
    await until(lambda: batches.begun == batches.ended)


async def test_calls_of_a_client_that_is_gone(tmp_path: Path, batches: Batches) -> None:
    """Its channel is closed under it, while answers are on their way."""
    echo = Echo()
    async with running(settings(tmp_path), [echo.registration()]) as server:
        channel = grpc.aio.insecure_channel(server.address)
        streams: list[Any] = [channel.stream_stream(f"/{SERVICE}/StreamStream")() for _ in range(CALLS)]
        reading = [asyncio.create_task(stream.read()) for stream in streams]
        await asyncio.sleep(0)
        await channel.close()
        await asyncio.wait(reading)
    assert batches.begun >= CALLS
    await until(lambda: batches.begun == batches.ended)


async def test_what_was_asked_in_another_loop_is_answered_there(tmp_path: Path, batches: Batches) -> None:
    async with running(settings(tmp_path), [Echo().registration()]) as server:

        async def elsewhere() -> str:
            async with grpc.aio.insecure_channel(server.address) as channel:
                return await call(channel, "UnaryUnary", "hello")

        assert await asyncio.to_thread(asyncio.run, elsewhere()) == "hello"
    await until(lambda: batches.begun == batches.ended)
