# ruff: noqa: N802 - gRPC names the methods of a servicer
"""A recommendation service in the test's process, which answers from memory, and a client of it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import grpc
from google.rpc import status_pb2
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_health.v1._async import HealthServicer

from atspeed.client.recommender import SERVICE, RecommenderClient
from atspeed.rollout.release_track import TRACK_HEADER
from atspeed.v1 import recommendation_pb2 as pb
from atspeed.v1 import recommendation_pb2_grpc

Context = grpc.aio.ServicerContext[Any, Any]


class FakeService(recommendation_pb2_grpc.RecommendationServiceServicer):
    """Answers from memory. failures: how many calls end UNAVAILABLE first. delay: seconds before a list."""

    def __init__(self, *, failures: int = 0, delay: float = 0.0) -> None:
        self.failures, self.delay = failures, delay
        self.calls: list[Any] = []
        self.time_left: float | None = None
        self.tracks: list[Any] = []
        self.reached = asyncio.Event()

    async def Recommend(self, request: pb.RecommendRequest, context: Context) -> pb.RecommendResponse:
        await self._maybe_fail(request, context)
        self.time_left = context.time_remaining()
        self.tracks = [value for key, value in context.invocation_metadata() or () if key == TRACK_HEADER]
        self.reached.set()
        await asyncio.sleep(self.delay)
        if request.user_id == "nobody":
            trailers = (("x-request-id", "r-1"),)
            await context.abort(grpc.StatusCode.NOT_FOUND, "user_id: no history is stored for this user", trailers)
        return pb.RecommendResponse(items=[pb.RecommendedItem(rank=1, item_id="i")], mode=request.mode)

    async def RecommendBatch(
        self, request: pb.RecommendBatchRequest, context: Context
    ) -> AsyncIterator[pb.RecommendBatchResponse]:
        self.calls.append(request)
        yield pb.RecommendBatchResponse(index=1, error=status_pb2.Status(code=3, message="k: too large"))
        yield pb.RecommendBatchResponse(index=0, response=pb.RecommendResponse(mode=request.requests[0].mode))

    async def RecordEvents(self, request: pb.RecordEventsRequest, context: Context) -> pb.RecordEventsResponse:
        await self._maybe_fail(request, context)
        return pb.RecordEventsResponse(history_length=len(request.events))

    async def GetHistory(self, request: pb.GetHistoryRequest, context: Context) -> pb.GetHistoryResponse:
        self.calls.append(request)
        return pb.GetHistoryResponse(events=[pb.Event(item_id=item_id) for item_id in ("a", "b")])

    async def ForgetUser(self, request: pb.ForgetUserRequest, context: Context) -> pb.ForgetUserResponse:
        self.calls.append(request)
        return pb.ForgetUserResponse(existed=request.user_id == "alice")

    async def GetServiceInfo(self, request: pb.GetServiceInfoRequest, context: Context) -> pb.GetServiceInfoResponse:
        self.calls.append(request)
        return pb.GetServiceInfoResponse(bundle_name="fake")

    async def _maybe_fail(self, request: Any, context: Context) -> None:
        self.calls.append(request)
        if self.failures:
            self.failures -= 1
            await context.abort(grpc.StatusCode.UNAVAILABLE, "not now")


@asynccontextmanager
async def connected(service: FakeService, **options: Any) -> AsyncIterator[RecommenderClient]:
    """A client with these options, of that service on a port of its own."""
    server = grpc.aio.server()
    recommendation_pb2_grpc.add_RecommendationServiceServicer_to_server(service, server)
    health = HealthServicer()
    await health.set(SERVICE, health_pb2.HealthCheckResponse.SERVING)
    health_pb2_grpc.add_HealthServicer_to_server(health, server)
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    try:
        async with RecommenderClient(f"127.0.0.1:{port}", **options) as client:
            yield client
    finally:
        await server.stop(None)
