"""Answer of GetServiceInfo: versions, limits and the services behind it."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Sequence
from importlib.metadata import version
from typing import Any

import grpc
from google.protobuf.timestamp_pb2 import Timestamp

from atspeed.engine.search.mode import Mode
from atspeed.rollout.bundle_watch import BundleWatch
from atspeed.rollout.release_track import Track
from atspeed.rpc import wire
from atspeed.rpc.admission import Admission
from atspeed.v1 import recommendation_pb2 as pb
from orchestrator.replies import to_timestamp, to_versions
from orchestrator.serving.snapshots import Snapshot
from orchestrator.serving.track_router import TrackRouter, TrackState
from orchestrator.settings import OrchestratorSettings


class ServiceInfo:
    """Versions, limits and state of one replica."""

    def __init__(
        self, settings: OrchestratorSettings, router: TrackRouter, watches: Sequence[BundleWatch], admission: Admission
    ) -> None:
        self._settings = settings
        self._router = router
        self._admission = admission
        self._watches = {watch.track: watch for watch in watches}
        self._started_at = Timestamp()
        self._started_at.GetCurrentTime()

    async def reply(self) -> pb.GetServiceInfoResponse:
        """Return versions, limits, and the state of the services behind this one."""
        state, settings = self._router[Track.STABLE], self._settings
        snapshot = state.snapshots.current
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
            max_batch_events=settings.max_batch_events,
            running_recommendations=self._admission.running,
            waiting_recommendations=self._admission.queued,
            bundle_since=to_timestamp(snapshot.since),
            pending_bundle=self._watches[Track.STABLE].pending or "",
            open_bundles=state.snapshots.open,
            backends=await self._backends(snapshot),
            shadow_checks=self._shadow_checks(state),
            canary=self._canary(),
            catalogue_paths=len(catalogue.item_start) - 1,
            level_sizes=catalogue.tail_start.tolist(),
            shortest_path=catalogue.shortest_spelling,
            longest_path=catalogue.longest_spelling,
            scores_tail=catalogue.has_tails,
            items_per_path=manifest.items_per_path or 0,
            user_fields=[
                pb.UserField(name=field.name, values=field.values, default_value=field.default)
                for field in manifest.target.prompt.user_fields
            ],
        )

    def _canary(self) -> pb.Canary | None:
        if (watch := self._watches.get(Track.CANARY)) is None:
            return None
        state = self._router[Track.CANARY]
        canary = pb.Canary(
            share=self._settings.canary_share,
            share_now=self._router.share,
            pending_bundle=watch.pending or "",
            shadow_checks=self._shadow_checks(state),
        )
        if (snapshot := state.snapshots.newest) is not None:
            canary.versions.CopyFrom(to_versions(snapshot))
            canary.since.CopyFrom(to_timestamp(snapshot.since))
        return canary

    def _shadow_checks(self, state: TrackState) -> pb.ShadowChecks:
        outcomes = state.shadow.outcomes
        return pb.ShadowChecks(
            share=self._settings.shadow_share,
            identical=outcomes["identical"],
            different=outcomes["different"],
            speculation_off=not state.speculation_breaker.enabled,
        )

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
