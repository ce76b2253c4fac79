"""Calls about stored histories: events of one user or of many, a history, erasure."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable
from contextlib import suppress
from typing import TypeVar

import structlog

from atspeed.errors import InvalidArgumentError, Reason, ServiceError, UnavailableError, UnimplementedError
from atspeed.rollout.release_track import Track
from atspeed.rpc.grpc_status import call_status
from atspeed.v1 import recommendation_pb2 as pb
from orchestrator.history import HistoryStore, HistoryUnavailable, Recorded, UserEvents
from orchestrator.replies import to_event
from orchestrator.requests import check_user, parse_events
from orchestrator.serving.event_prefixes import EventPrefixes
from orchestrator.serving.track_router import TrackRouter
from orchestrator.settings import OrchestratorSettings
from orchestrator.user_key import user_cache_key

_CHECKED_AT_ONCE = 200  # requests of a batch: other calls wait for a few milliseconds
_Result = TypeVar("_Result")
_log: structlog.stdlib.BoundLogger = structlog.get_logger(__name__)


class HistoryCalls:
    """The calls of the public contract about stored histories."""

    def __init__(self, settings: OrchestratorSettings, router: TrackRouter, prefixes: EventPrefixes) -> None:
        self._settings = settings
        self._router = router
        self._prefixes = prefixes

    async def record(self, request: pb.RecordEventsRequest) -> pb.RecordEventsResponse:
        """Add events to a stored history."""
        events = parse_events(request, self._settings)
        recorded = await _answered(self._store.record(request.user_id, events, tenant=request.tenant))
        return self._reply(UserEvents(request.user_id, events, request.tenant), recorded)

    async def record_batch(self, request: pb.RecordEventsBatchRequest) -> pb.RecordEventsBatchResponse:
        """Add events to many stored histories. A request that is invalid, or not known to be stored, has an error of its own."""
        self._check_size(request)
        store = self._store
        results: list[pb.RecordEventsResult] = []
        valid: list[tuple[int, UserEvents]] = []
        for place, one in enumerate(request.requests):
            if not (place + 1) % _CHECKED_AT_ONCE:
                await asyncio.sleep(0)
            results.append(pb.RecordEventsResult())
            try:
                valid.append((place, UserEvents(one.user_id, parse_events(one, self._settings), one.tenant)))
            except ServiceError as error:
                results[place].error.CopyFrom(call_status(error).message)
        recorded = await store.record_batch([user for _, user in valid])
        lost = next((one for one in recorded if isinstance(one, HistoryUnavailable)), None)
        if lost is not None:
            _log.warning("history_store_unavailable", error=str(lost))
        for (place, user), stored in zip(valid, recorded, strict=True):
            if isinstance(stored, HistoryUnavailable):
                results[place].error.CopyFrom(call_status(_unavailable()).message)
            else:
                results[place].response.CopyFrom(self._reply(user, stored))
        return pb.RecordEventsBatchResponse(results=results)

    async def get(self, request: pb.GetHistoryRequest) -> pb.GetHistoryResponse:
        """Return a stored history; an empty one when nothing is stored."""
        check_user(request)
        stored = await _answered(self._store.events(request.user_id, tenant=request.tenant))
        return pb.GetHistoryResponse(events=map(to_event, stored))

    async def forget(self, request: pb.ForgetUserRequest) -> pb.ForgetUserResponse:
        """Erase a user's history and cached keys and values."""
        check_user(request)
        store = self._store
        await self._prefixes.forget(request.user_id, request.tenant)
        existed = await _answered(store.forget(request.user_id, tenant=request.tenant))
        return pb.ForgetUserResponse(existed=existed)

    @property
    def _store(self) -> HistoryStore:
        if (store := _stable_store(self._router)) is None:
            raise UnimplementedError("this service keeps no histories: it runs without Redis")
        return store

    def _check_size(self, request: pb.RecordEventsBatchRequest) -> None:
        if not request.requests:
            raise InvalidArgumentError("requests", "must not be empty")
        events, most = sum(max(1, len(one.events)) for one in request.requests), self._settings.max_batch_events
        if events > most:
            raise InvalidArgumentError("requests", f"have {events} events, at most {most} are allowed")

    def _reply(self, user: UserEvents, recorded: Recorded) -> pb.RecordEventsResponse:
        if recorded.duplicates + recorded.expired < len(user.events):
            self._prefixes.offer(user.user_id, user.tenant)
        return pb.RecordEventsResponse(
            history_length=recorded.length,
            unknown_item_ids=self._unknown(user),
            duplicate_events=recorded.duplicates,
            expired_events=recorded.expired,
        )

    def _unknown(self, user: UserEvents) -> list[str]:
        """Return the items that the catalogue of the user's track does not know."""
        item_ids = [event.item_id for event in user.events]
        track = self._router.of(user_cache_key(user.tenant, user.user_id))
        index = track.snapshots.current.catalogue.find(item_ids).tolist()
        return [item for item, found in zip(item_ids, index, strict=True) if found < 0]


async def publish_history_limit(router: TrackRouter) -> None:
    """Publish max_history_items to other deployments over the same Redis. Without a Redis the first append does it."""
    if (store := _stable_store(router)) is not None:
        with suppress(HistoryUnavailable):
            await store.publish_limit()


def _stable_store(router: TrackRouter) -> HistoryStore | None:
    return router[Track.STABLE].snapshots.current.recommender.histories


async def _answered(call: Awaitable[_Result]) -> _Result:
    try:
        return await call
    except HistoryUnavailable as error:
        _log.warning("history_store_unavailable", error=str(error))
        raise _unavailable() from None


def _unavailable() -> UnavailableError:
    return UnavailableError("histories are out of reach", reason=Reason.HISTORIES_UNAVAILABLE)
