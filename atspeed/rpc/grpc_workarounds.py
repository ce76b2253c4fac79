"""Workarounds for defects of grpcio, each with the condition that removes it.

This module imports gRPC only inside functions, since gRPC reads its environment while it is imported.
"""

from __future__ import annotations

import asyncio
import importlib
import os
from collections.abc import Callable, Coroutine, Generator
from importlib.metadata import version
from typing import Any

import structlog

TESTED_GRPCIO = ("1.85.1",)
"""The versions whose private function `free_ended_batches` replaces. A new one joins when tests/integration/test_grpc_batches.py
passes with it.
"""

_Execute = Callable[[Any, tuple[Any, ...], Any], Coroutine[Any, Any, None]]
_log: structlog.stdlib.BoundLogger = structlog.get_logger(__name__)


def silence_core() -> None:
    """Keep gRPC's core from writing to stderr. Call it before the first import of grpc.

    The core quotes what peers send, such as the text of a GOAWAY: any bytes and line breaks between our JSON lines.
    """
    os.environ.setdefault("GRPC_VERBOSITY", "NONE")


def enable_ring_hash_header() -> None:
    """Let gRPC's core read `requestHashHeader` (grpcio 1.85). Without it, calls on a ring-hash channel fail."""
    os.environ.setdefault("GRPC_EXPERIMENTAL_RING_HASH_SET_REQUEST_HASH_KEY", "true")


def free_ended_batches() -> None:
    """Let gRPC free the memory of calls that fail or are cancelled, which `grpc.aio` (1.85) never does.

    A call is a sequence of batches of operations. `grpc.aio` frees a batch's memory, with the messages sent and received, in
    the coroutine that waits for the batch. It does so only if the batch succeeds and the coroutine is not cancelled
    (grpc/grpc#43360). A received message holds its read buffer of 64 KB. This function replaces the coroutine for the whole
    process, and the end of a batch then frees the memory in every case.

    An untested version of grpcio is left alone, as a wrong guess about its internals could hang every call.
    """
    cygrpc: Any = importlib.import_module("grpc._cython.cygrpc")  # unknown to the stubs
    execute = getattr(cygrpc, "execute_batch", None)
    if execute is None or isinstance(execute, FreeingExecutor):
        return
    if (installed := version("grpcio")) not in TESTED_GRPCIO:
        _log.warning("grpc_workaround_skipped", workaround="free_ended_batches", grpcio=installed, tested=TESTED_GRPCIO)
        return
    cygrpc.execute_batch = FreeingExecutor(execute)


class FreeingExecutor:
    """Replaces gRPC's `execute_batch`, which gRPC looks up by name for every batch."""

    def __init__(self, execute: _Execute) -> None:
        self.execute = execute

    def __call__(self, call: Any, operations: tuple[Any, ...], loop: asyncio.AbstractEventLoop) -> asyncio.Future[None]:
        """Start a batch. The future ends with the batch, and with its exception."""
        ended: asyncio.Future[None] = loop.create_future()
        _Batch(self.execute, call, operations, ended)
        return ended


class _Batch:
    """One batch, in the roles of event loop and of future for gRPC's coroutine.

    This future is never cancelled and never fails, so the coroutine always reaches the line that frees the memory.
    """

    __slots__ = ("_coroutine", "_ended")

    def __init__(self, execute: _Execute, call: Any, operations: tuple[Any, ...], ended: asyncio.Future[None]) -> None:
        self._ended = ended
        self._coroutine = execute(call, operations, self)
        self._coroutine.send(None)  # runs it to its only await

    def create_future(self) -> _Batch:
        """Return the future that gRPC's coroutine awaits."""
        return self

    def call_soon_threadsafe(self, callback: Callable[..., object], *arguments: object) -> None:
        """Run a callback of gRPC's poller, whose thread has an event loop of its own, in the batch's event loop."""
        loop = self._ended.get_loop()
        if loop is asyncio.get_running_loop():
            callback(*arguments)
        else:
            loop.call_soon_threadsafe(callback, *arguments)

    def __await__(self) -> Generator[None, None, None]:
        yield

    def cancelled(self) -> bool:
        """Return False: the batch continues after its caller was cancelled."""
        return False

    def set_result(self, _: None) -> None:
        """End the batch with success."""
        self._finish()
        if not self._ended.done():
            self._ended.set_result(None)

    def set_exception(self, error: Exception) -> None:
        """End the batch with a failure."""
        self._finish()
        if not self._ended.done():
            self._ended.set_exception(error)

    def _finish(self) -> None:
        """Run gRPC's coroutine to its end, where it frees the memory."""
        try:
            self._coroutine.send(None)
        except StopIteration:
            return
        raise RuntimeError("grpc.aio waits for more than one event of a batch")
