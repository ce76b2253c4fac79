"""The orchestrator's gRPC servicer: protobuf to orders, the recommender, and back."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable
from contextlib import AsyncExitStack, asynccontextmanager
from importlib.metadata import version
from typing import Any, TypeVar, cast

import grpc
from atspeed.v1 import draft_pb2, recommendation_pb2, recommendation_pb2_grpc, target_pb2
from atspeed.v1 import recommendation_pb2 as pb
from google.protobuf.timestamp_pb2 import Timestamp

from engine.bundle import Bundle
from engine.kv_store import connect
from orchestrator.clients import Deadline, DraftClient, TargetClient
from orchestrator.history import HistoryStore, HistoryUnavailable
from orchestrator.planner import Planner
from orchestrator.recommend import Recommender
from orchestrator.replies import PROTO_MODES, to_reply
from orchestrator.requests import check_id, check_ids, to_order
from orchestrator.settings import OrchestratorSettings
from service_kit import wire
from service_kit.channels import open_channel
from service_kit.errors import InvalidArgumentError, UnavailableError, call_status
from service_kit.server import Registration

SERVICE = recommendation_pb2.DESCRIPTOR.services_by_name["RecommendationService"]
_TARGET = target_pb2.DESCRIPTOR.services_by_name["TargetService"].full_name
_DRAFT = draft_pb2.DESCRIPTOR.services_by_name["DraftService"].full_name
_Answer = TypeVar("_Answer")
Context = grpc.aio.ServicerContext[Any, Any]


class RecommendationServicer(recommendation_pb2_grpc.RecommendationServiceServicer):
    """The public service."""

    def __init__(
        self, recommender: Recommender, settings: OrchestratorSettings, target: TargetClient, draft: DraftClient | None
    ) -> None:
        self._recommender, self._settings = recommender, settings
        self._target, self._draft = target, draft
        self._started_at = Timestamp()
        self._started_at.GetCurrentTime()

    async def Recommend(self, request: pb.RecommendRequest, context: Context) -> pb.RecommendResponse:
        """The top K items for one user."""
        return await self._recommend(request, self._deadline(context))

    async def RecommendBatch(
        self, request: pb.RecommendBatchRequest, context: Context
    ) -> AsyncIterator[pb.RecommendBatchResponse]:
        """Every request's list or error, as they are ready."""
        if len(request.requests) > self._settings.max_batch:
            raise InvalidArgumentError(
                "requests", f"has {len(request.requests)} requests, at most {self._settings.max_batch} are allowed"
            )
        deadline, slots = self._deadline(context), asyncio.Semaphore(self._settings.batch_concurrency)
        async with asyncio.TaskGroup() as group:
            tasks = [
                group.create_task(self._batched(index, one, deadline, slots))
                for index, one in enumerate(request.requests)
            ]
            for ready in asyncio.as_completed(tasks):
                yield await ready

    async def RecordEvents(self, request: pb.RecordEventsRequest, context: Context) -> pb.RecordEventsResponse:
        """Append to a history."""
        check_id("user_id", request.user_id)
        check_ids("item_ids", request.item_ids, self._settings.max_history_items)
        if not request.item_ids:
            raise InvalidArgumentError("item_ids", "must not be empty")
        length = await self._stored(self._histories.append(request.user_id, list(request.item_ids)))
        index = self._recommender.catalogue.find(request.item_ids).tolist()
        unknown = [item for item, found in zip(request.item_ids, index, strict=True) if found < 0]
        return pb.RecordEventsResponse(history_length=length, unknown_item_ids=unknown)

    async def GetHistory(self, request: pb.GetHistoryRequest, context: Context) -> pb.GetHistoryResponse:
        """A stored history; empty when there is none."""
        check_id("user_id", request.user_id)
        stored = await self._stored(self._histories.get(request.user_id))
        return pb.GetHistoryResponse(item_ids=stored or ())

    async def ForgetUser(self, request: pb.ForgetUserRequest, context: Context) -> pb.ForgetUserResponse:
        """Erase a user."""
        check_id("user_id", request.user_id)
        return pb.ForgetUserResponse(existed=await self._stored(self._histories.forget(request.user_id)))

    async def GetServiceInfo(self, request: pb.GetServiceInfoRequest, context: Context) -> pb.GetServiceInfoResponse:
        """Versions, limits, and the state of the services behind this one."""
        manifest, catalogue, settings = self._recommender.manifest, self._recommender.catalogue, self._settings
        return pb.GetServiceInfoResponse(
            service_version=version("atspeed-serving"),
            bundle_name=manifest.name,
            versions=pb.Versions(
                target_model=manifest.target.fingerprint,
                draft_model=manifest.draft.fingerprint if manifest.draft and self._draft else "",
                catalogue=catalogue.version,
            ),
            scoring_rule=wire.to_scoring_rule(manifest.scoring_rule),
            catalogue_items=catalogue.items,
            levels=catalogue.trie.levels,
            max_k=settings.max_k,
            max_beam_width=settings.max_beam_width,
            history_window=manifest.target.prompt.max_items,
            allows_empty_history=manifest.allow_empty_history,
            modes=list(PROTO_MODES.values()),
            started_at=self._started_at,
            backends=await self._backends(),
        )

    async def _recommend(self, request: pb.RecommendRequest, deadline: Deadline) -> pb.RecommendResponse:
        order = to_order(request, self._settings)
        recommendation = await self._recommender.recommend(order, deadline)
        return to_reply(recommendation, self._recommender.manifest, request.reply_options)

    async def _batched(
        self, index: int, request: pb.RecommendRequest, deadline: Deadline, slots: asyncio.Semaphore
    ) -> pb.RecommendBatchResponse:
        async with slots:
            try:
                return pb.RecommendBatchResponse(index=index, response=await self._recommend(request, deadline))
            except Exception as error:  # noqa: BLE001 - call_status logs what is ours; one failure must not end the batch
                status = call_status(error)
        failure = pb.RequestError(code=status.code.value[0], message=status.details)
        return pb.RecommendBatchResponse(index=index, error=failure)

    def _deadline(self, context: Context) -> Deadline:
        left = cast("float | None", context.time_remaining())  # the stubs do not know of calls without a deadline
        default = self._settings.request_timeout_seconds
        return Deadline(default if left is None else left)

    @property
    def _histories(self) -> HistoryStore:
        if self._recommender.histories is None:
            raise UnavailableError("this service keeps no histories: it runs without Redis")
        return self._recommender.histories

    async def _stored(self, call: Awaitable[_Answer]) -> _Answer:
        try:
            return await call
        except HistoryUnavailable:
            raise UnavailableError("histories are out of reach") from None

    async def _backends(self) -> list[pb.Backend]:
        probes = [self._probe("target", self._target.model_info())]
        if self._draft:
            probes.append(self._probe("draft", self._draft.model_info()))
        return [*await asyncio.gather(*probes), *await self._redis()]

    async def _probe(self, name: str, call: Awaitable[Any]) -> pb.Backend:
        try:
            return pb.Backend(name=name, available=True, model=await call)
        except grpc.aio.AioRpcError:
            return pb.Backend(name=name, available=False)

    async def _redis(self) -> list[pb.Backend]:
        if self._recommender.histories is None:
            return []
        return [pb.Backend(name="redis", available=await self._recommender.histories.reachable())]


@asynccontextmanager
async def application(settings: OrchestratorSettings) -> AsyncIterator[list[Registration]]:
    """The recommender over the settings' services, ready to serve."""
    bundle = Bundle(settings.bundle)
    catalogue, limit = bundle.catalogue(), settings.max_message_bytes
    trie, snapshot = catalogue.trie, catalogue.version
    async with AsyncExitStack() as stack:
        channel = await stack.enter_async_context(
            open_channel(settings.target, _TARGET, snapshot=snapshot, max_message_bytes=limit)
        )
        attempts, pass_seconds = settings.target_attempts, settings.target_pass_seconds
        target = TargetClient(channel, trie, snapshot, attempts=attempts, pass_seconds=pass_seconds)
        draft = None
        if settings.draft and bundle.manifest.draft:
            channel = await stack.enter_async_context(
                open_channel(settings.draft, _DRAFT, snapshot=snapshot, retried=["Plan"], max_message_bytes=limit)
            )
            timeout, backoff = settings.draft_timeout_seconds, settings.draft_backoff_seconds
            draft = DraftClient(channel, trie, snapshot, timeout=timeout, backoff_seconds=backoff)
        histories = None
        if url := settings.redis_url.get_secret_value():
            client = connect(url, timeout_seconds=settings.redis_timeout_seconds)
            stack.push_async_callback(client.aclose)
            timeout = settings.redis_timeout_seconds
            histories = HistoryStore(client, settings.max_history_items, timeout_seconds=timeout)
        planner = Planner(settings.draft_width_factor, settings.draft_max_nodes)
        recommender = Recommender(bundle.manifest, catalogue, target, draft, planner, histories)
        servicer = RecommendationServicer(recommender, settings, target, draft)
        add = recommendation_pb2_grpc.add_RecommendationServiceServicer_to_server
        yield [Registration.of(SERVICE, add, servicer)]
