"""gRPC servicer of the orchestrator, and the application around it."""

from __future__ import annotations

import secrets
from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack, aclosing, asynccontextmanager
from typing import Any, NamedTuple, cast

import grpc
import structlog
from redis.asyncio import Redis

from atspeed.concurrency.bounded_as_completed import bounded_as_completed
from atspeed.concurrency.deadline import Deadline
from atspeed.engine.kv.redis_client import connect
from atspeed.errors import InvalidArgumentError
from atspeed.observability import tracing
from atspeed.rollout.bundle_opening import bundle_sources, open_first
from atspeed.rollout.bundle_watch import BundleWatch, bundle_watches, watch_bundles
from atspeed.rollout.release_track import Track
from atspeed.rpc.admission import Admission, Priority
from atspeed.rpc.grpc_status import call_status
from atspeed.rpc.server import Registration
from atspeed.v1 import recommendation_pb2 as pb
from atspeed.v1 import recommendation_pb2_grpc
from orchestrator.explanation.explain import explain
from orchestrator.explanation.recording import Recording
from orchestrator.explanation_replies import to_explanation
from orchestrator.history_calls import HistoryCalls, publish_history_limit
from orchestrator.metrics import OrchestratorMetrics
from orchestrator.recommendation import Recommendation, RecommendParams
from orchestrator.replies import to_reply
from orchestrator.requests import parse_explain_request, parse_request
from orchestrator.service_info import ServiceInfo
from orchestrator.serving.event_prefixes import EventPrefixes
from orchestrator.serving.shadow import ShadowChecks, ShadowLimits
from orchestrator.serving.snapshots import Planners, Snapshot, Snapshots
from orchestrator.serving.track_router import TrackRouter, TrackState
from orchestrator.settings import OrchestratorSettings
from orchestrator.speculation_breaker import SpeculationBreaker

SERVICE = pb.DESCRIPTOR.services_by_name["RecommendationService"]
# Longest wait for targets of the canary at the start, so that its users do not get the stable bundle in between. Targets that run
# already are connected within a second; a start must not wait long for a canary.
_CANARY_WAIT_SECONDS = 10.0

_log: structlog.stdlib.BoundLogger = structlog.get_logger(__name__)
Context = grpc.aio.ServicerContext[Any, Any]


class _Served(NamedTuple):
    """List of one request, its recommendation id, and the snapshot that made it."""

    recommendation: Recommendation
    number: str
    snapshot: Snapshot


class RecommendationServicer(recommendation_pb2_grpc.RecommendationServiceServicer):
    """Servicer of the public contract."""

    def __init__(
        self,
        settings: OrchestratorSettings,
        router: TrackRouter,
        watches: Sequence[BundleWatch],
        admission: Admission,
        prefixes: EventPrefixes,
    ) -> None:
        self._settings = settings
        self._router = router
        self._admission = admission
        self._prefixes = prefixes
        self._history_calls = HistoryCalls(settings, router, prefixes)
        self.metrics = OrchestratorMetrics(admission, router, watches, prefixes)
        self._info = ServiceInfo(settings, router, watches, admission)

    async def Recommend(self, request: pb.RecommendRequest, context: Context) -> pb.RecommendResponse:
        """Return the top K items for one user."""
        deadline = self._time_left(context) or Deadline(self._settings.request_timeout_seconds)
        return await self._recommend(request, deadline, Priority.of(context), Track.asked_by(context))

    async def RecommendBatch(
        self, request: pb.RecommendBatchRequest, context: Context
    ) -> AsyncIterator[pb.RecommendBatchResponse]:
        """Yield the list or error of every request as soon as it is ready."""
        if len(request.requests) > self._settings.max_batch:
            raise InvalidArgumentError(
                "requests", f"has {len(request.requests)} requests, at most {self._settings.max_batch} are allowed"
            )
        deadline = self._time_left(context)
        usual, asked = Priority.of(context, Priority.BATCH), Track.asked_by(context)
        calls = (self._recommend_one(index, one, deadline, usual, asked) for index, one in enumerate(request.requests))
        async with aclosing(bounded_as_completed(calls, self._settings.batch_concurrency)) as responses:
            async for response in responses:
                yield response

    async def Explain(self, request: pb.ExplainRequest, context: Context) -> pb.ExplainResponse:
        """Return the top K items for one user, with their search, its time and the places of other items."""
        recording = Recording()
        deadline = self._time_left(context) or Deadline(self._settings.request_timeout_seconds)
        asked = parse_explain_request(request, self._settings, Priority.of(context))
        async with self._serve(asked.request, deadline, Track.asked_by(context), recording) as served:
            found = await explain(
                served.snapshot.recommender,
                asked,
                served.recommendation,
                recording.ended(),
                lambda: self._admission.slot(asked.request.priority, deadline.left()),
                deadline,
            )
            response = to_reply(served.recommendation, served.number, served.snapshot, request.request.reply_options)
            return to_explanation(found, response)

    async def RecordEvents(self, request: pb.RecordEventsRequest, context: Context) -> pb.RecordEventsResponse:
        """Add events to a stored history."""
        return await self._history_calls.record(request)

    async def RecordEventsBatch(
        self, request: pb.RecordEventsBatchRequest, context: Context
    ) -> pb.RecordEventsBatchResponse:
        """Add events to many stored histories."""
        return await self._history_calls.record_batch(request)

    async def GetHistory(self, request: pb.GetHistoryRequest, context: Context) -> pb.GetHistoryResponse:
        """Return a stored history; an empty one when nothing is stored."""
        return await self._history_calls.get(request)

    async def ForgetUser(self, request: pb.ForgetUserRequest, context: Context) -> pb.ForgetUserResponse:
        """Erase a user's history and cached keys and values."""
        return await self._history_calls.forget(request)

    async def GetServiceInfo(self, request: pb.GetServiceInfoRequest, context: Context) -> pb.GetServiceInfoResponse:
        """Return versions, limits, and the state of the services behind this one."""
        return await self._info.reply()

    async def _recommend(
        self, request: pb.RecommendRequest, deadline: Deadline, usual: Priority, asked: Track | None
    ) -> pb.RecommendResponse:
        params = parse_request(request, self._settings, usual)
        async with self._serve(params, deadline, asked) as served:
            return to_reply(served.recommendation, served.number, served.snapshot, request.reply_options)

    @asynccontextmanager
    async def _serve(
        self, params: RecommendParams, deadline: Deadline, asked: Track | None, recording: Recording | None = None
    ) -> AsyncIterator[_Served]:
        """Yield the list of a request that waits for its turn. Its snapshot stays in use for the length of the block."""
        number = secrets.token_hex(16)
        state = self._router.of(params.subject, asked)
        self._prefixes.request(params.user_key)
        with (
            state.snapshots.current.in_use() as snapshot,
            self.metrics.count_request(state.track, params.mode, deadline),
            tracing.span("recommend", k=params.k, mode=params.mode, track=state.track) as span,
        ):
            async with self._admission.slot(params.priority, deadline.left()) as admitted:
                params = params.narrowed() if admitted.waited else params
                if recording is not None:
                    recording.admitted()
                opened = None if recording is None else recording.opened
                recommendation = await snapshot.recommender.recommend(params, deadline, opened=opened)
                state.shadow.offer(recommendation, snapshot)
            if tracing.on():
                span.set(recommendation_id=number, **recommendation.trace_attributes)
            yield _Served(recommendation, number, snapshot)
        self.metrics.record(state.track, recommendation)

    async def _recommend_one(
        self,
        index: int,
        request: pb.RecommendRequest,
        batch_deadline: Deadline | None,
        usual: Priority,
        asked: Track | None,
    ) -> pb.RecommendBatchResponse:
        """Serve one request of a batch. Without a deadline of the call, each request has the default time from its own start."""
        try:
            deadline = batch_deadline or Deadline(self._settings.request_timeout_seconds)
            response = await self._recommend(request, deadline, usual, asked)
            return pb.RecommendBatchResponse(index=index, response=response)
        except Exception as error:  # noqa: BLE001 - one failure must not end the batch; call_status logs defects
            return pb.RecommendBatchResponse(index=index, error=call_status(error).message)

    def _time_left(self, context: Context) -> Deadline | None:
        left = cast("float | None", context.time_remaining())  # the stubs lack the None of calls without a deadline
        return None if left is None else Deadline(left)


@asynccontextmanager
async def _redis_client(settings: OrchestratorSettings) -> AsyncIterator[Redis | None]:
    """Open the client of the history store; None without Redis."""
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
    """Start the recommender over the settings' services and follow the settings' bundles until the end."""
    sources = bundle_sources(settings)
    bundle = await open_first(sources[Track.STABLE])
    admission = Admission(settings.max_running, settings.max_queued)
    async with AsyncExitStack() as stack:
        redis = await stack.enter_async_context(_redis_client(settings))
        planners = Planners(settings.plan_limits)
        states = {track: _track_state(track, settings, redis, admission, planners) for track in Track}
        router = TrackRouter(states, settings.canary_share)
        stack.push_async_callback(router.close)
        await router[Track.STABLE].snapshots.activate(bundle, at_once=True)
        seconds, enabled = settings.request_timeout_seconds, settings.prefix_on_event and redis is not None
        prefixes = EventPrefixes(router, admission, seconds=seconds, enabled=enabled)
        stack.push_async_callback(prefixes.close)
        watches = bundle_watches(sources, router, bundle.manifest.version)
        await stack.enter_async_context(watch_bundles(watches, settings.bundle_poll_seconds, _CANARY_WAIT_SECONDS))
        servicer = RecommendationServicer(settings, router, watches, admission, prefixes)
        await publish_history_limit(router)
        add = recommendation_pb2_grpc.add_RecommendationServiceServicer_to_server
        yield [Registration.of(SERVICE, add, servicer, metrics=servicer.metrics.registry)]


def _track_state(
    track: Track, settings: OrchestratorSettings, redis: Redis | None, admission: Admission, planners: Planners
) -> TrackState:
    speculation_breaker = SpeculationBreaker(settings.shadow_mismatches, settings.shadow_window_seconds)
    limits = ShadowLimits(settings.shadow_share, settings.shadow_concurrency, settings.request_timeout_seconds)
    shadow = ShadowChecks(limits, admission, speculation_breaker)
    return TrackState(track, Snapshots(settings, redis, speculation_breaker, planners), speculation_breaker, shadow)
