# ruff: noqa: N802 - gRPC names the methods of a servicer
"""A recommendation service in the test's process, which answers from memory, and a client of it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import grpc
from google.protobuf.timestamp_pb2 import Timestamp
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_health.v1._async import HealthServicer

from atspeed.errors import InvalidArgumentError, NotFoundError, ResourceExhaustedError, ServiceError, UnavailableError
from atspeed.rollout.release_track import TRACK_HEADER
from atspeed.rpc.grpc_status import call_status
from atspeed.v1 import recommendation_pb2 as pb
from atspeed.v1 import recommendation_pb2_grpc
from atspeed.v1.explanation_pb2 import ITEM_OUTCOME_UNKNOWN_ITEM, ItemExplanation
from atspeed_client import AsyncClient
from atspeed_client.channels import SERVICE

Context = grpc.aio.ServicerContext[Any, Any]


class FakeService(recommendation_pb2_grpc.RecommendationServiceServicer):
    """Answers from memory.

    failures: how many calls fail first. code: their status, with a retry hint of `hint` seconds for RESOURCE_EXHAUSTED.
    delay: seconds before a list. refused: how often each request of a batch is refused first.
    """

    def __init__(
        self,
        *,
        failures: int = 0,
        code: grpc.StatusCode = grpc.StatusCode.UNAVAILABLE,
        delay: float = 0.0,
        refused: int = 0,
        hint: float = 0.02,
    ) -> None:
        self.failures, self.code, self.delay, self.refused = failures, code, delay, refused
        self.hint = hint
        self.request_ids: list[str] = []
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
            status = call_status(NotFoundError("user_id", "no history is stored for this user"))
            await context.abort(status.code, status.details, (("x-request-id", "r-1"), *status.trailers))
        items = [pb.RecommendedItem(rank=1, item_id="i", score=-0.5, code_path=[1, 2], origin=pb.ORIGIN_DRAFTED)]
        return pb.RecommendResponse(items=items, mode=request.mode, recommendation_id="rec-1")

    async def Explain(self, request: pb.ExplainRequest, context: Context) -> pb.ExplainResponse:
        listed = await self.Recommend(request.request, context)
        items = [ItemExplanation(item_id=item, outcome=ITEM_OUTCOME_UNKNOWN_ITEM) for item in request.item_ids]
        return pb.ExplainResponse(response=listed, items=items, wider_beam_width=request.wider_beam_width)

    async def RecommendBatch(
        self, request: pb.RecommendBatchRequest, context: Context
    ) -> AsyncIterator[pb.RecommendBatchResponse]:
        self._note(request, context)
        for index, one in reversed(list(enumerate(request.requests))):
            if one.k > 1000:
                error: ServiceError = InvalidArgumentError("k", "too large")
            elif self.refused:
                self.refused -= 1
                error = ResourceExhaustedError("busy", retry_after_seconds=self.hint)
            else:
                reply = pb.RecommendResponse(mode=one.mode, beam_width=one.k)
                yield pb.RecommendBatchResponse(index=index, response=reply)
                continue
            yield pb.RecommendBatchResponse(index=index, error=call_status(error).message)

    async def RecordEvents(self, request: pb.RecordEventsRequest, context: Context) -> pb.RecordEventsResponse:
        await self._maybe_fail(request, context)
        return pb.RecordEventsResponse(history_length=len(request.events))

    async def RecordEventsBatch(
        self, request: pb.RecordEventsBatchRequest, context: Context
    ) -> pb.RecordEventsBatchResponse:
        await self._maybe_fail(request, context)
        refused = call_status(UnavailableError("histories are out of reach")).message
        return pb.RecordEventsBatchResponse(
            results=[
                pb.RecordEventsResult(error=refused)
                if one.user_id == "lost"
                else pb.RecordEventsResult(response=pb.RecordEventsResponse(history_length=len(one.events)))
                for one in request.requests
            ]
        )

    async def GetHistory(self, request: pb.GetHistoryRequest, context: Context) -> pb.GetHistoryResponse:
        self.calls.append(request)
        events = [pb.Event(item_id="a"), pb.Event(item_id="b", time=Timestamp(seconds=5), weight=0.0, event_id="e")]
        return pb.GetHistoryResponse(events=events)

    async def ForgetUser(self, request: pb.ForgetUserRequest, context: Context) -> pb.ForgetUserResponse:
        self.calls.append(request)
        return pb.ForgetUserResponse(existed=request.user_id == "alice")

    async def GetServiceInfo(self, request: pb.GetServiceInfoRequest, context: Context) -> pb.GetServiceInfoResponse:
        self.calls.append(request)
        return pb.GetServiceInfoResponse(bundle_name="fake")

    async def _maybe_fail(self, request: Any, context: Context) -> None:
        self._note(request, context)
        if self.failures:
            self.failures -= 1
            error = ResourceExhaustedError("busy", retry_after_seconds=self.hint)
            trailers = call_status(error).trailers if self.code is grpc.StatusCode.RESOURCE_EXHAUSTED else ()
            await context.abort(self.code, "not now", trailers)

    def _note(self, request: Any, context: Context) -> None:
        self.calls.append(request)
        self.request_ids += [str(value) for key, value in context.invocation_metadata() or () if key == "x-request-id"]


@asynccontextmanager
async def connected(service: FakeService, **options: Any) -> AsyncIterator[AsyncClient]:
    """A client with these options, of that service on a port of its own."""
    async with serving(service) as address, AsyncClient(address, **options) as client:
        yield client


@asynccontextmanager
async def serving(service: FakeService) -> AsyncIterator[str]:
    """The address of that service, on a port of its own."""
    server = grpc.aio.server()
    recommendation_pb2_grpc.add_RecommendationServiceServicer_to_server(service, server)
    health = HealthServicer()
    await health.set(SERVICE, health_pb2.HealthCheckResponse.SERVING)
    health_pb2_grpc.add_HealthServicer_to_server(health, server)
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    try:
        yield f"127.0.0.1:{port}"
    finally:
        await server.stop(None)
