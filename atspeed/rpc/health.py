"""Serves grpc.health.v1, also while the server drains.

The servicer of grpcio-health-checking holds a lock while it writes to a watcher. A watcher that reads nothing would block all
the others and the shutdown, and its `Watch` streams stay open until the grace period ends. This one waits for no watcher.
"""

from __future__ import annotations

import asyncio
from typing import Any

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

# Time between NOT_SERVING and the close of the listening socket. Watchers then send new calls elsewhere. A call that has arrived
# but not been accepted by then is lost, so this must exceed the delay of the event loop on a busy machine.
NOTICE_SECONDS = 1.0
# Without watchers this only covers calls that are just being accepted.
_UNWATCHED_NOTICE_SECONDS = 0.1
_SHUTTING_DOWN = "the server is shutting down"

Context = grpc.aio.ServicerContext[Any, Any]
_SERVING = health_pb2.HealthCheckResponse.SERVING
_NOT_SERVING = health_pb2.HealthCheckResponse.NOT_SERVING
_UNKNOWN = health_pb2.HealthCheckResponse.SERVICE_UNKNOWN


class Health(health_pb2_grpc.HealthServicer):
    """The state of the server and of each service on it."""

    def __init__(self) -> None:
        self._states: dict[str, Any] = {"": _NOT_SERVING}
        self._changed = asyncio.Event()  # replaced by a new one at each change
        self._draining = False
        self._closed = False
        self._watchers = 0

    async def Check(  # noqa: N802 - gRPC's name
        self, request: health_pb2.HealthCheckRequest, context: Context
    ) -> health_pb2.HealthCheckResponse:
        """Return a service's state."""
        if (state := self._states.get(request.service)) is None:
            await context.abort(grpc.StatusCode.NOT_FOUND, "no such service here")
        return health_pb2.HealthCheckResponse(status=state)

    async def Watch(self, request: health_pb2.HealthCheckRequest, context: Context) -> None:  # noqa: N802 - gRPC's name
        """Stream a service's state until the server closes. A slow reader misses states, but never the last one."""
        sent = None
        self._watchers += 1
        try:
            while not self._closed:
                changed, state = self._changed, self._states.get(request.service, _UNKNOWN)
                if state == sent:
                    await changed.wait()
                else:
                    await context.write(health_pb2.HealthCheckResponse(status=state))
                    sent = state
        finally:
            self._watchers -= 1
        await context.abort(grpc.StatusCode.UNAVAILABLE, _SHUTTING_DOWN)

    async def set_serving(self, name: str, serving: bool) -> None:
        """Set the state of a name; the server's own name is "". A draining server stays NOT_SERVING."""
        if not self._draining:
            self._states[name] = _SERVING if serving else _NOT_SERVING
            self._notify()

    async def drain(self) -> None:
        """Send NOT_SERVING to every watcher, then end their streams. A watcher that does not read causes no delay."""
        self._draining = True
        self._states = dict.fromkeys(self._states, _NOT_SERVING)
        self._notify()
        await asyncio.sleep(NOTICE_SECONDS if self._watchers else _UNWATCHED_NOTICE_SECONDS)
        self._closed = True
        self._notify()

    def _notify(self) -> None:
        self._changed.set()
        self._changed = asyncio.Event()
