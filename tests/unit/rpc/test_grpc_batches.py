"""gRPC's own coroutine of a batch comes to its end, where it frees, whatever becomes of the batch and of whoever waits for it."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from atspeed.rpc import grpc_batches
from atspeed.rpc.grpc_batches import cygrpc


class Core:
    """Stands for gRPC: a batch begins, waits for its future, and frees."""

    def __init__(self) -> None:
        self.begun: list[Any] = []
        self.freed = 0

    async def execute(self, _call: object, _operations: tuple[object, ...], loop: Any) -> None:
        future = loop.create_future()
        self.begun.append(future)
        await future
        self.freed += 1


@pytest.fixture
def core(monkeypatch: pytest.MonkeyPatch) -> Core:
    core = Core()
    monkeypatch.setattr(grpc_batches, "_execute", core.execute)
    monkeypatch.setattr(cygrpc, "execute_batch", None)
    grpc_batches.install()
    return core


async def begun(core: Core) -> asyncio.Task[None]:
    """A batch that somebody waits for."""
    loop = asyncio.get_running_loop()

    async def wait() -> None:
        await cygrpc.execute_batch(object(), (), loop)

    waiting = loop.create_task(wait())
    await asyncio.sleep(0)
    assert len(core.begun) == 1
    assert not waiting.done()
    return waiting


async def test_one_that_ends_well(core: Core) -> None:
    waiting = await begun(core)
    core.begun[0].set_result(None)
    await waiting
    assert core.freed == 1


async def test_one_that_fails(core: Core) -> None:
    waiting = await begun(core)
    core.begun[0].set_exception(ValueError("the connection is gone"))
    with pytest.raises(ValueError, match="the connection is gone"):
        await waiting
    assert core.freed == 1


@pytest.mark.parametrize("fails", [False, True])
async def test_one_that_is_given_up_ends_later(core: Core, *, fails: bool) -> None:
    waiting = await begun(core)
    waiting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await waiting
    assert core.freed == 0
    assert not core.begun[0].cancelled()  # gRPC tells a cancelled future nothing
    if fails:
        core.begun[0].set_exception(ValueError("nobody hears of it"))
    else:
        core.begun[0].set_result(None)
    assert core.freed == 1
