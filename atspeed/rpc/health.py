"""grpc.health.v1 for a server that drains.

The library's servicer holds a lock while it writes to a watcher, so one that reads nothing would silence all the others
and the shutdown, and keeps `Watch` streams open until the grace period ends. Here nobody waits for a watcher.
"""

from __future__ import annotations

import asyncio
from typing import Any

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

# Time for NOT_SERVING to reach the watchers, who then send new calls elsewhere, before the listening socket closes. A call that
# has arrived and that the event loop has not come to by then is lost, so on a busy machine this must be longer than its delay.
NOTICE_SECONDS = 1.0
_UNWATCHED_NOTICE_SECONDS = 0.1
_LEAVING = "the server is shutting down"

Context = grpc.aio.ServicerContext[Any, Any]
_SERVING = health_pb2.HealthCheckResponse.SERVING
_NOT_SERVING = health_pb2.HealthCheckResponse.NOT_SERVING
_UNKNOWN = health_pb2.HealthCheckResponse.SERVICE_UNKNOWN


class Health(health_pb2_grpc.HealthServicer):
    """The state of the server and of each service on it."""

    def __init__(self) -> None:
        self._states: dict[str, Any] = {"": _NOT_SERVING}
        self._changed = asyncio.Event()  # replaced by a new one at each change
        self._leaving = self._left = False
        self._watchers = 0

    async def Check(  # noqa: N802 - gRPC's name
        self, request: health_pb2.HealthCheckRequest, context: Context
    ) -> health_pb2.HealthCheckResponse:
        """A service's state now."""
        if (state := self._states.get(request.service)) is None:
            await context.abort(grpc.StatusCode.NOT_FOUND, "no such service here")
        return health_pb2.HealthCheckResponse(status=state)

    async def Watch(self, request: health_pb2.HealthCheckRequest, context: Context) -> None:  # noqa: N802 - gRPC's name
        """Stream a service's state until the server leaves. One who reads slowly misses states, never the last one."""
        told = None
        self._watchers += 1
        try:
            while not self._left:
                changed, state = self._changed, self._states.get(request.service, _UNKNOWN)
                if state == told:
                    await changed.wait()
                else:
                    await context.write(health_pb2.HealthCheckResponse(status=state))
                    told = state
        finally:
            self._watchers -= 1
        await context.abort(grpc.StatusCode.UNAVAILABLE, _LEAVING)

    async def declare(self, name: str, serving: bool) -> None:
        """SERVING or NOT_SERVING, under one name; the server's own is "". Once the server leaves it stays NOT_SERVING."""
        if not self._leaving:
            self._states[name] = _SERVING if serving else _NOT_SERVING
            self._tell()

    async def leave(self) -> None:
        """Tell every watcher NOT_SERVING, then end their streams. Takes no longer for one that does not read."""
        self._leaving = True
        self._states = dict.fromkeys(self._states, _NOT_SERVING)
        self._tell()
        await asyncio.sleep(NOTICE_SECONDS if self._watchers else _UNWATCHED_NOTICE_SECONDS)
        self._left = True
        self._tell()

    def _tell(self) -> None:
        self._changed.set()
        self._changed = asyncio.Event()
