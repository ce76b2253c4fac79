"""Lets gRPC free what it holds for calls that fail or are given up, which `grpc.aio` (1.85) never does.

A call is a sequence of batches of operations. `grpc.aio` frees a batch's memory, messages sent and received among it, in the
coroutine that waits for it, where it ended well: not where it failed, nor where that coroutine was cancelled meanwhile
(grpc/grpc#43360). A received message holds the buffer that it was read into, 64 KB. Here the end of the batch frees them, whoever
still waits. Goes when grpcio does so by itself: tests/integration/test_grpc_batches.py passes without it then.
"""

from __future__ import annotations

import asyncio
import importlib
from collections.abc import Callable, Coroutine, Generator
from typing import Any

cygrpc: Any = importlib.import_module("grpc._cython.cygrpc")  # which the stubs do not know

_Execute = Callable[[Any, tuple[Any, ...], Any], Coroutine[Any, Any, None]]
_execute: _Execute | None = getattr(cygrpc, "execute_batch", None)


def install() -> None:
    """For all calls of this process, as server and as client; nothing where a release of gRPC has no such step any more."""
    if _execute is not None:
        cygrpc.execute_batch = _execute_batch


def _execute_batch(call: Any, operations: tuple[Any, ...], loop: asyncio.AbstractEventLoop) -> asyncio.Future[None]:
    """In place of gRPC's own, which looks up this name for every batch and awaits what it gets. Raises what that raises."""
    ended: asyncio.Future[None] = loop.create_future()
    _Batch(call, operations, ended)
    return ended


class _Batch:
    """One batch. To gRPC's coroutine it is the event loop and the future that this makes, one that is never cancelled and never
    fails: so that coroutine always comes to its end, where it frees.
    """

    __slots__ = ("_coroutine", "_ended")

    def __init__(self, call: Any, operations: tuple[Any, ...], ended: asyncio.Future[None]) -> None:
        self._ended = ended
        assert _execute is not None  # noqa: S101 - else this is not installed
        self._coroutine = _execute(call, operations, self)
        self._coroutine.send(None)  # to where it waits

    def create_future(self) -> _Batch:
        """What the coroutine waits for."""
        return self

    def call_soon_threadsafe(self, callback: Callable[..., object], *arguments: object) -> None:
        """How gRPC's poller, in the thread of its own loop, hands an event over to another loop."""
        loop = self._ended.get_loop()
        if loop is asyncio.get_running_loop():
            callback(*arguments)
        else:
            loop.call_soon_threadsafe(callback, *arguments)

    def __await__(self) -> Generator[None, None, None]:
        yield

    def cancelled(self) -> bool:
        """Whoever gave up, the batch goes on."""
        return False

    def set_result(self, _: None) -> None:
        """It ended well."""
        self._finish()
        if not self._ended.done():
            self._ended.set_result(None)

    def set_exception(self, error: Exception) -> None:
        """It failed."""
        self._finish()
        if not self._ended.done():
            self._ended.set_exception(error)

    def _finish(self) -> None:
        try:
            self._coroutine.send(None)
        except StopIteration:
            return
        raise RuntimeError("grpc.aio waits for more than one event of a batch")
