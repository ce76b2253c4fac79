"""grpc.health.v1 for a server that drains.

The library's servicer keeps its `Watch` streams open while the server shuts down, so every shutdown would last for
the whole grace period. This one ends them once the watchers have heard NOT_SERVING.
"""

from __future__ import annotations

import asyncio

import grpc
from grpc_health.v1 import health, health_pb2

# Time for NOT_SERVING to reach the watchers, who then send new calls elsewhere, before the listening socket closes. A call that
# has arrived and that the event loop has not come to by then is lost, so on a busy machine this must be longer than its delay.
NOTICE_SECONDS = 1.0
_UNWATCHED_NOTICE_SECONDS = 0.1

Context = grpc.aio.ServicerContext[health_pb2.HealthCheckRequest, health_pb2.HealthCheckResponse]


class Health(health.aio.HealthServicer):
    """The state of the server and of each service on it."""

    def __init__(self) -> None:
        super().__init__()
        self._leaving = asyncio.Event()
        self._watchers = 0

    async def Watch(self, request: health_pb2.HealthCheckRequest, context: Context) -> None:  # noqa: N802 - gRPC's name
        """Stream a service's state until the server leaves."""
        watch = asyncio.ensure_future(super().Watch(request, context))
        leaving = asyncio.ensure_future(self._leaving.wait())
        self._watchers += 1
        try:
            await asyncio.wait({watch, leaving}, return_when=asyncio.FIRST_COMPLETED)
        finally:
            self._watchers -= 1
            watch.cancel()
            leaving.cancel()
        await context.abort(grpc.StatusCode.UNAVAILABLE, "the server is shutting down")

    async def declare(self, name: str, serving: bool) -> None:
        """SERVING or NOT_SERVING, under one name. Once the server leaves it stays NOT_SERVING."""
        state = health_pb2.HealthCheckResponse
        await self.set(name, state.SERVING if serving else state.NOT_SERVING)

    async def leave(self) -> None:
        """Tell every watcher NOT_SERVING, then end their streams."""
        await self.enter_graceful_shutdown()
        await asyncio.sleep(NOTICE_SECONDS if self._watchers else _UNWATCHED_NOTICE_SECONDS)
        self._leaving.set()
