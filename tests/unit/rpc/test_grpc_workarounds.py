"""Workarounds for grpcio: batches free their memory however they end; untested versions are left alone."""

from __future__ import annotations

import asyncio
import importlib
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
from structlog.testing import capture_logs

from atspeed.rpc import grpc_workarounds

cygrpc: Any = importlib.import_module("grpc._cython.cygrpc")


class Core:
    """Replaces gRPC: a batch begins, awaits its future, and frees."""

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
    monkeypatch.setattr(cygrpc, "execute_batch", core.execute)
    grpc_workarounds.free_ended_batches()
    return core


def test_installed_grpcio_and_constraints_are_tested_versions() -> None:
    """A new grpcio needs a run of tests/integration/test_grpc_batches.py before it joins the list."""
    constraints = (Path(__file__).parents[3] / "constraints.txt").read_text(encoding="utf-8").splitlines()
    (pinned,) = [line.removeprefix("grpcio==") for line in constraints if line.startswith("grpcio==")]
    assert {version("grpcio"), pinned} <= set(grpc_workarounds.TESTED_GRPCIO)


def test_untested_grpcio_is_left_alone_and_logged(monkeypatch: pytest.MonkeyPatch) -> None:
    core = Core()
    monkeypatch.setattr(cygrpc, "execute_batch", core.execute)
    monkeypatch.setattr(grpc_workarounds, "TESTED_GRPCIO", ("0.0.1",))
    with capture_logs() as logs:
        grpc_workarounds.free_ended_batches()
    assert cygrpc.execute_batch == core.execute
    assert [entry["event"] for entry in logs] == ["grpc_workaround_skipped"]


def test_second_call_changes_nothing(core: Core) -> None:
    installed = cygrpc.execute_batch
    grpc_workarounds.free_ended_batches()
    assert cygrpc.execute_batch is installed


async def begun(core: Core) -> asyncio.Task[None]:
    """Start a batch with a waiter."""
    loop = asyncio.get_running_loop()

    async def wait() -> None:
        await cygrpc.execute_batch(object(), (), loop)

    waiting = loop.create_task(wait())
    await asyncio.sleep(0)
    assert len(core.begun) == 1
    assert not waiting.done()
    return waiting


async def test_batch_that_succeeds_frees(core: Core) -> None:
    waiting = await begun(core)
    core.begun[0].set_result(None)
    await waiting
    assert core.freed == 1


async def test_batch_that_fails_frees_and_raises(core: Core) -> None:
    waiting = await begun(core)
    core.begun[0].set_exception(ValueError("the connection is gone"))
    with pytest.raises(ValueError, match="the connection is gone"):
        await waiting
    assert core.freed == 1


@pytest.mark.parametrize("fails", [False, True])
async def test_cancelled_batch_frees_at_its_end(core: Core, *, fails: bool) -> None:
    waiting = await begun(core)
    waiting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await waiting
    assert core.freed == 0
    assert not core.begun[0].cancelled()  # gRPC does not end a cancelled future
    if fails:
        core.begun[0].set_exception(ValueError("not reported"))
    else:
        core.begun[0].set_result(None)
    assert core.freed == 1
