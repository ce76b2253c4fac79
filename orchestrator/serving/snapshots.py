"""Snapshots: one bundle's catalogue and model clients, for whole requests.

A new bundle is opened beside the one in use and replaces it in one step, when a target serves it. A request ends on the snapshot
that it began on. The last request closes the snapshot.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator, Mapping
from contextlib import AsyncExitStack, contextmanager
from dataclasses import dataclass, field
from weakref import WeakKeyDictionary

from redis.asyncio import Redis

from atspeed.concurrency.refcount import RefCount
from atspeed.concurrency.tasks import TaskSet, background_task
from atspeed.engine.bundle.bundle import Bundle
from atspeed.engine.bundle.catalogue import Catalogue
from atspeed.engine.bundle.manifest import Manifest, ModelEntry
from atspeed.engine.bundle.prompts import read_items
from atspeed.engine.search.trie import Trie
from orchestrator.history import HistoryStore
from orchestrator.model_clients.draft_client import DraftClient
from orchestrator.model_clients.model_channels import ModelChannels
from orchestrator.model_clients.target_client import TargetClient
from orchestrator.planning.planner import PlanLimits, Planner, refresh_curves
from orchestrator.recommend import Recommender
from orchestrator.settings import OrchestratorSettings
from orchestrator.speculation_breaker import SpeculationBreaker


@dataclass(eq=False)
class Snapshot:
    """Bundle as the orchestrator serves it.

    Attributes:
        version: version of the bundle; every reply names it.
        resources: channels and tasks that close with the snapshot.
        since: Unix time of the first request.
        refcount: the running requests.
    """

    manifest: Manifest
    version: str
    recommender: Recommender
    planner: Planner
    target: TargetClient
    draft: DraftClient | None
    channels: ModelChannels
    resources: AsyncExitStack
    since: float = 0.0
    refcount: RefCount = field(default_factory=RefCount)

    @property
    def catalogue(self) -> Catalogue:
        """Return the bundle's items."""
        return self.recommender.catalogue

    @contextmanager
    def in_use(self) -> Iterator[Snapshot]:
        """Keep the snapshot open for the length of a request."""
        with self.refcount.held():
            yield self

    async def close(self) -> None:
        """Wait for the last request, then close."""
        await self.refcount.wait_unused()
        await self.target.settle()
        await self.resources.aclose()


class Planners:
    """Planners of all open snapshots. A snapshot with the same models shares the estimates of an earlier one."""

    def __init__(self, limits: PlanLimits) -> None:
        self._limits = limits
        self._models: WeakKeyDictionary[Planner, Mapping[str, ModelEntry]] = WeakKeyDictionary()

    def of(self, manifest: Manifest, trie: Trie) -> Planner:
        """Return a planner for a bundle."""
        alike = [planner for planner, models in self._models.items() if models == manifest.models]
        planner = alike[-1].for_catalogue(trie) if alike else Planner(trie, self._limits, manifest.draft)
        self._models[planner] = manifest.models
        return planner


class Snapshots:
    """The snapshot for new requests of a track, and older ones that running requests hold.

    Args:
        redis: client of the history store; None without Redis.

    Attributes:
        newest: the snapshot for new requests; None before the first bundle and after `deactivate`.
    """

    def __init__(
        self,
        settings: OrchestratorSettings,
        redis: Redis | None,
        speculation_breaker: SpeculationBreaker,
        planners: Planners,
    ) -> None:
        self._settings = settings
        self._redis = redis
        self._speculation_breaker = speculation_breaker
        self._planners = planners
        self.newest: Snapshot | None = None
        self._closing = TaskSet()

    @property
    def current(self) -> Snapshot:
        """Return the snapshot for new requests. Raises RuntimeError without one."""
        if self.newest is None:
            raise RuntimeError("no bundle is served")
        return self.newest

    @property
    def ready(self) -> bool:
        """Return whether there is a snapshot and a target that serves it."""
        newest = self.newest  # read once: the metrics exporter's thread calls this too
        return newest is not None and newest.channels.target_reachable

    @property
    def draft_circuit_open(self) -> bool:
        """Return whether the newest snapshot's draft is not called after failures."""
        newest = self.newest
        return newest is not None and newest.draft is not None and newest.draft.circuit.is_open

    @property
    def open(self) -> int:
        """Return the number of open snapshots."""
        return (self.newest is not None) + len(self._closing)

    async def activate(self, bundle: Bundle, *, at_once: bool = False) -> None:
        """Serve a bundle as soon as a target serves it. at_once: do not wait for a target.

        Raises BundleError or CatalogueError for an invalid bundle. A cancelled call changes nothing.
        """
        async with AsyncExitStack() as resources:
            snapshot = await self._open(bundle, resources)
            if not at_once:
                await snapshot.channels.wait_until_served()
                await asyncio.sleep(self._settings.bundle_settle_seconds)
            snapshot.resources = resources.pop_all()
        snapshot.since = time.time()
        self._replace(snapshot)

    def deactivate(self) -> None:
        """Stop serving. Running requests end on their snapshot."""
        self._replace(None)

    async def close(self) -> None:
        """Close all snapshots, even those that requests hold."""
        await self._closing.cancel()
        if self.newest is not None:
            await self.newest.resources.aclose()

    def _replace(self, snapshot: Snapshot | None) -> None:
        before, self.newest = self.newest, snapshot
        if before is not None:
            self._closing.start(before.close(), "snapshot-close")

    async def _open(self, bundle: Bundle, resources: AsyncExitStack) -> Snapshot:
        settings, manifest = self._settings, bundle.manifest
        catalogue, prompts = await asyncio.to_thread(read_items, bundle)
        channels = ModelChannels(settings, resources)
        target = await self._target(manifest, catalogue.trie, channels)
        draft = await self._draft(manifest, catalogue.trie, channels)
        planner = self._planners.of(manifest, catalogue.trie)
        if draft is not None:
            refresh = refresh_curves(planner, target, draft)
            await resources.enter_async_context(background_task(refresh, "cost-curve-refresh"))
        recommender = Recommender(
            manifest,
            catalogue,
            prompts,
            target,
            draft,
            planner,
            self._histories(manifest),
            self._speculation_breaker,
            target_prefetch=settings.target_prefetch,
        )
        return Snapshot(manifest, manifest.version, recommender, planner, target, draft, channels, resources)

    async def _target(self, manifest: Manifest, trie: Trie, channels: ModelChannels) -> TargetClient:
        settings, version = self._settings, manifest.model_version("target")
        routes = await channels.targets(version)
        attempts, pass_seconds = settings.target_attempts, settings.target_pass_seconds
        return TargetClient(routes, trie, version, attempts=attempts, pass_seconds=pass_seconds)

    async def _draft(self, manifest: Manifest, trie: Trie, channels: ModelChannels) -> DraftClient | None:
        settings = self._settings
        if not settings.draft or not manifest.draft:
            return None
        version = manifest.model_version("draft")
        routes = await channels.drafts(settings.draft, version)
        timeout, backoff = settings.draft_timeout_seconds, settings.draft_backoff_seconds
        return DraftClient(routes, trie, version, timeout=timeout, backoff_seconds=backoff)

    def _histories(self, manifest: Manifest) -> HistoryStore | None:
        if self._redis is None:
            return None
        max_items, timeout = self._settings.max_history_items, self._settings.redis_timeout_seconds
        step = min(manifest.target.prompt.drop_block, max_items)
        return HistoryStore(self._redis, max_items, trim_step=step, timeout_seconds=timeout)
