"""The orchestrator's gRPC servicer: protobuf to orders, the recommender, and back."""

from __future__ import annotations

import asyncio
import math
from collections.abc import AsyncIterator, Awaitable, Sequence
from contextlib import AsyncExitStack, aclosing, asynccontextmanager, suppress
from importlib.metadata import version
from typing import Any, TypeVar, cast

import grpc
import structlog
from google.protobuf.timestamp_pb2 import Timestamp
from redis.asyncio import Redis

from atspeed.concurrency.bounded_as_completed import bounded_as_completed
from atspeed.concurrency.deadline import Deadline
from atspeed.engine.kv.redis_client import connect
from atspeed.engine.search.list_comparison import Verdict
from atspeed.engine.search.mode import Mode
from atspeed.errors import InvalidArgumentError, UnavailableError, UnimplementedError
from atspeed.observability import tracing
from atspeed.rollout.bundle_watch import BundleWatch, bundle_watches, following, open_bundle
from atspeed.rollout.release_track import Track
from atspeed.rpc import wire
from atspeed.rpc.admission import Admission, Priority
from atspeed.rpc.grpc_status import call_status
from atspeed.rpc.server import Registration
from atspeed.v1 import recommendation_pb2 as pb
from atspeed.v1 import recommendation_pb2_grpc
from orchestrator.history import HistoryStore, HistoryUnavailable
from orchestrator.metrics import OrchestratorMetrics
from orchestrator.replies import to_reply, to_timestamp, to_versions
from orchestrator.requests import check_ids, check_user, parse_request
from orchestrator.serving.shadow import ShadowChecks, ShadowLimits
from orchestrator.serving.snapshots import Planners, Snapshot, Snapshots
from orchestrator.serving.track_router import TrackRouter, TrackState
from orchestrator.settings import OrchestratorSettings
from orchestrator.speculation_breaker import SpeculationBreaker
from orchestrator.user_key import user_cache_key

SERVICE = pb.DESCRIPTOR.services_by_name["RecommendationService"]
# So long the start waits for targets that serve the canary, lest its users meet the stable bundle in between.
_CANARY_PATIENCE_SECONDS = 10.0
_Answer = TypeVar("_Answer")

_log: structlog.stdlib.BoundLogger = structlog.get_logger(__name__)
Context = grpc.aio.ServicerContext[Any, Any]


class RecommendationServicer(recommendation_pb2_grpc.RecommendationServiceServicer):
    """The public service."""

    def __init__(
        self, settings: OrchestratorSettings, lanes: TrackRouter, watches: Sequence[BundleWatch], admission: Admission
    ) -> None:
        self._settings = settings
        self._lanes = lanes
        self._admission = admission
        self._watches = {watch.track: watch for watch in watches}
        self.metrics = OrchestratorMetrics(admission, lanes, watches)
        self._started_at = Timestamp()
        self._started_at.GetCurrentTime()

    async def Recommend(self, request: pb.RecommendRequest, context: Context) -> pb.RecommendResponse:
        """The top K items for one user."""
        deadline = self._time_left(context) or Deadline(self._settings.request_timeout_seconds)
        return await self._recommend(request, deadline, Priority.of(context), Track.asked_by(context))

    async def RecommendBatch(
        self, request: pb.RecommendBatchRequest, context: Context
    ) -> AsyncIterator[pb.RecommendBatchResponse]:
        """Every request's list or error, as they are ready."""
        if len(request.requests) > self._settings.max_batch:
            raise InvalidArgumentError(
                "requests", f"has {len(request.requests)} requests, at most {self._settings.max_batch} are allowed"
            )
        whole = self._time_left(context)
        usual, asked = Priority.of(context, Priority.BATCH), Track.asked_by(context)
        answers = (self._batched(index, one, whole, usual, asked) for index, one in enumerate(request.requests))
        async with aclosing(bounded_as_completed(answers, self._settings.batch_concurrency)) as ready:
            async for answer in ready:
                yield answer

    async def RecordEvents(self, request: pb.RecordEventsRequest, context: Context) -> pb.RecordEventsResponse:
        """Append to a history."""
        check_user(request)
        item_ids = [event.item_id for event in request.events]
        check_ids("events", item_ids, self._settings.max_history_items)
        if not item_ids:
            raise InvalidArgumentError("events", "must not be empty")
        length = await self._stored(self._histories.append(request.user_id, item_ids, tenant=request.tenant))
        lane = self._lanes.of(user_cache_key(request.tenant, request.user_id))
        index = lane.snapshots.current.catalogue.find(item_ids).tolist()
        unknown = [item for item, found in zip(item_ids, index, strict=True) if found < 0]
        return pb.RecordEventsResponse(history_length=length, unknown_item_ids=unknown)

    async def GetHistory(self, request: pb.GetHistoryRequest, context: Context) -> pb.GetHistoryResponse:
        """A stored history; empty when there is none."""
        check_user(request)
        stored = await self._stored(self._histories.get(request.user_id, tenant=request.tenant))
        return pb.GetHistoryResponse(events=[pb.Event(item_id=item) for item in stored or ()])

    async def ForgetUser(self, request: pb.ForgetUserRequest, context: Context) -> pb.ForgetUserResponse:
        """Erase a history, and what was cached for it."""
        check_user(request)
        forgotten = self._histories.forget(request.user_id, tenant=request.tenant)
        return pb.ForgetUserResponse(existed=await self._stored(forgotten))

    async def GetServiceInfo(self, request: pb.GetServiceInfoRequest, context: Context) -> pb.GetServiceInfoResponse:
        """Versions, limits, and the state of the services behind this one."""
        lane, settings = self._lanes[Track.STABLE], self._settings
        snapshot = lane.snapshots.current
        manifest, catalogue = snapshot.manifest, snapshot.catalogue
        return pb.GetServiceInfoResponse(
            service_version=version("atspeed-serving"),
            bundle_name=manifest.name,
            versions=to_versions(snapshot),
            scoring_rule=wire.to_scoring_rule(manifest.scoring_rule),
            catalogue_items=catalogue.items,
            levels=catalogue.trie.levels,
            max_k=settings.max_k,
            max_beam_width=settings.max_beam_width,
            history_window=manifest.target.prompt.max_items,
            allows_empty_history=manifest.allow_empty_history,
            modes=[wire.to_mode(mode) for mode in Mode],
            started_at=self._started_at,
            max_history_items=settings.max_history_items,
            max_candidate_items=settings.max_candidate_items,
            max_batch=settings.max_batch,
            running_recommendations=self._admission.running,
            waiting_recommendations=self._admission.queued,
            bundle_since=to_timestamp(snapshot.since),
            pending_bundle=self._watches[Track.STABLE].pending,
            open_bundles=lane.snapshots.open,
            backends=await self._backends(snapshot),
            shadow_checks=self._shadow_checks(lane),
            canary=self._canary(),
        )

    async def state_history_limit(self) -> None:
        """Tell other deployments over the same Redis how long histories must be; a Redis that is away hears it later."""
        if (histories := self._stable_histories) is not None:
            with suppress(HistoryUnavailable):
                await histories.state_limit()

    def _canary(self) -> pb.Canary | None:
        if (watch := self._watches.get(Track.CANARY)) is None:
            return None
        lane = self._lanes[Track.CANARY]
        canary = pb.Canary(
            share=self._settings.canary_share,
            share_now=self._lanes.share,
            pending_bundle=watch.pending,
            shadow_checks=self._shadow_checks(lane),
        )
        if (snapshot := lane.snapshots.newest) is not None:
            canary.versions.CopyFrom(to_versions(snapshot))
            canary.since.CopyFrom(to_timestamp(snapshot.since))
        return canary

    def _shadow_checks(self, lane: TrackState) -> pb.ShadowChecks:
        outcomes = lane.shadow.outcomes
        return pb.ShadowChecks(
            share=self._settings.shadow_share,
            identical=outcomes[Verdict.IDENTICAL],
            near_ties=outcomes[Verdict.NEAR_TIE],
            different=outcomes[Verdict.DIFFERENT],
            speculation_off=not lane.speculation_breaker.on,
        )

    async def _recommend(
        self, request: pb.RecommendRequest, deadline: Deadline, usual: Priority, asked: Track | None
    ) -> pb.RecommendResponse:
        order = parse_request(request, self._settings, usual)
        lane = self._lanes.of(order.subject, asked)
        with (
            lane.snapshots.current.in_use() as snapshot,
            self.metrics.asked(lane.track, order.mode, deadline),
            tracing.span("recommend", k=order.k, mode=order.mode, track=lane.track) as span,
        ):
            async with self._admission.place(order.priority, deadline.left()) as admitted:
                order = order.narrowed() if admitted.waited else order
                recommendation = await snapshot.recommender.recommend(order, deadline)
                lane.shadow.offer(recommendation, snapshot)
            if tracing.on():
                span.set(**recommendation.trace_attributes)
        self.metrics.made(lane.track, recommendation)
        return to_reply(recommendation, snapshot, request.reply_options)

    async def _batched(
        self,
        index: int,
        request: pb.RecommendRequest,
        whole: Deadline | None,
        usual: Priority,
        asked: Track | None,
    ) -> pb.RecommendBatchResponse:
        """One request of a batch. Where the caller set no deadline, it has the usual time from its own start on."""
        try:
            deadline = whole or Deadline(self._settings.request_timeout_seconds)
            response = await self._recommend(request, deadline, usual, asked)
            return pb.RecommendBatchResponse(index=index, response=response)
        except Exception as error:  # noqa: BLE001 - call_status logs what is ours; one failure must not end the batch
            status = call_status(error)
        failure = pb.RequestError(
            code=status.code.value[0],
            message=status.details,
            retry_after_ms=math.ceil((status.retry_after_seconds or 0) * 1000),
        )
        return pb.RecommendBatchResponse(index=index, error=failure)

    def _time_left(self, context: Context) -> Deadline | None:
        left = cast("float | None", context.time_remaining())  # the stubs do not know of calls without a deadline
        return None if left is None else Deadline(left)

    @property
    def _stable_histories(self) -> HistoryStore | None:
        return self._lanes[Track.STABLE].snapshots.current.recommender.histories

    @property
    def _histories(self) -> HistoryStore:
        if (histories := self._stable_histories) is None:
            raise UnimplementedError("this service keeps no histories: it runs without Redis")
        return histories

    async def _stored(self, call: Awaitable[_Answer]) -> _Answer:
        try:
            return await call
        except HistoryUnavailable as error:
            _log.warning("histories are out of reach", problem=str(error))
            raise UnavailableError("histories are out of reach") from None

    async def _backends(self, snapshot: Snapshot) -> list[pb.Backend]:
        with snapshot.in_use():
            probes = [self._probe("target", snapshot.target.model_info())]
            if snapshot.draft:
                probes.append(self._probe("draft", snapshot.draft.model_info()))
            return [*await asyncio.gather(*probes), *await self._redis(snapshot)]

    async def _probe(self, name: str, call: Awaitable[Any]) -> pb.Backend:
        try:
            return pb.Backend(name=name, available=True, model=await call)
        except grpc.aio.AioRpcError:
            return pb.Backend(name=name, available=False)

    async def _redis(self, snapshot: Snapshot) -> list[pb.Backend]:
        histories = snapshot.recommender.histories
        return [pb.Backend(name="redis", available=await histories.reachable())] if histories else []


@asynccontextmanager
async def _redis_client(settings: OrchestratorSettings) -> AsyncIterator[Redis | None]:
    """The client of the histories' Redis; None where there is none."""
    url = settings.redis_url.get_secret_value()
    if not url:
        yield None
        return
    client = connect(url, timeout_seconds=settings.redis_timeout_seconds, tls=settings.redis_tls)
    try:
        yield client
    finally:
        await client.aclose()


@asynccontextmanager
async def application(settings: OrchestratorSettings) -> AsyncIterator[list[Registration]]:
    """The recommender over the settings' services, ready to serve, with the bundles that the settings name from then on."""
    bundle = open_bundle(settings.bundle)
    admission = Admission(settings.max_running, settings.max_queued)
    async with AsyncExitStack() as stack:
        redis = await stack.enter_async_context(_redis_client(settings))
        planners = Planners(settings.plan_limits)
        each = {track: _lane(track, settings, redis, admission, planners) for track in Track}
        lanes = TrackRouter(each, settings.canary_share)
        stack.push_async_callback(lanes.close)
        await lanes[Track.STABLE].snapshots.activate(bundle, at_once=True)
        watches = bundle_watches(settings, lanes, bundle.manifest.version)
        await stack.enter_async_context(following(watches, settings.bundle_poll_seconds, _CANARY_PATIENCE_SECONDS))
        servicer = RecommendationServicer(settings, lanes, watches, admission)
        await servicer.state_history_limit()
        add = recommendation_pb2_grpc.add_RecommendationServiceServicer_to_server
        yield [Registration.of(SERVICE, add, servicer, metrics=servicer.metrics.registry)]


def _lane(
    track: Track, settings: OrchestratorSettings, redis: Redis | None, admission: Admission, planners: Planners
) -> TrackState:
    speculation_breaker = SpeculationBreaker(settings.shadow_mismatches, settings.shadow_window_seconds)
    limits = ShadowLimits(settings.shadow_share, settings.shadow_concurrency, settings.request_timeout_seconds)
    shadow = ShadowChecks(limits, admission, speculation_breaker)
    return TrackState(track, Snapshots(settings, redis, speculation_breaker, planners), speculation_breaker, shadow)
