"""What a request is served by from its first moment to its last: one bundle's catalogue and the clients of its models.

Another bundle is opened beside the one that is served and takes its place in one step, when a target serves it. Requests that run
end on the snapshot that they began on; it closes with the last of them.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator, Mapping
from contextlib import AsyncExitStack, contextmanager
from dataclasses import dataclass, field
from weakref import WeakKeyDictionary

from redis.asyncio import Redis

from atspeed.concurrency.tasks import background_task
from atspeed.engine.bundle.catalogue import Catalogue
from atspeed.engine.bundle.manifest import Bundle, Manifest, ModelEntry
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
    """One bundle, ready to recommend with.

    version: the bundle's, which every reply names. resources: what closes with it. since: when new requests first got it, Unix
    time.
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
    _holders: int = 0
    _idle: asyncio.Event = field(default_factory=asyncio.Event)

    @property
    def catalogue(self) -> Catalogue:
        """Its items."""
        return self.recommender.catalogue

    @contextmanager
    def in_use(self) -> Iterator[Snapshot]:
        """For the time of a request: it stays open."""
        self._holders += 1
        self._idle.clear()
        try:
            yield self
        finally:
            self._holders -= 1
            if not self._holders:
                self._idle.set()

    async def close(self) -> None:
        """Wait for the last request, and close."""
        while self._holders:
            await self._idle.wait()
        await self.target.settle()
        await self.resources.aclose()


class Planners:
    """The planners of open snapshots, on all tracks: what was learnt of models is known to whatever has them next."""

    def __init__(self, limits: PlanLimits) -> None:
        self._limits = limits
        self._models: WeakKeyDictionary[Planner, Mapping[str, ModelEntry]] = WeakKeyDictionary()

    def of(self, manifest: Manifest, trie: Trie) -> Planner:
        """A planner for a bundle."""
        alike = [planner for planner, models in self._models.items() if models == manifest.models]
        planner = alike[-1].for_catalogue(trie) if alike else Planner(trie, self._limits)
        self._models[planner] = manifest.models
        return planner


class Snapshots:
    """The snapshot that new requests of a track get, and those before it that requests still hold.

    redis: None where there is none. newest: None before the first bundle, and after `deactivate`.
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
        # The event loop itself only keeps weak references to tasks.
        self._closing: set[asyncio.Task[None]] = set()

    @property
    def current(self) -> Snapshot:
        """What new requests are served by, where there is one."""
        if self.newest is None:
            raise RuntimeError("no bundle is served")
        return self.newest

    @property
    def ready(self) -> bool:
        """Whether there is one, and a target that serves it, as far as is known."""
        newest = self.newest  # once: the exporter's thread asks too
        return newest is not None and newest.channels.reach_targets

    @property
    def draft_rests(self) -> bool:
        """Whether its draft is left alone after failures."""
        newest = self.newest
        return newest is not None and newest.draft is not None and newest.draft.resting

    @property
    def open(self) -> int:
        """How many there are."""
        return (self.newest is not None) + len(self._closing)

    async def activate(self, bundle: Bundle, *, at_once: bool = False) -> None:
        """Serve a bundle, from the return on: when a target serves it, or at once.

        Raises BundleError or CatalogueError where it cannot be served. Cancelled, it changes nothing.
        """
        async with AsyncExitStack() as resources:
            snapshot = await self._opened(bundle, resources)
            if not at_once:
                await snapshot.channels.served()
                await asyncio.sleep(self._settings.bundle_settle_seconds)
            snapshot.resources = resources.pop_all()
        snapshot.since = time.time()
        self._replace(snapshot)

    def deactivate(self) -> None:
        """Serve no bundle any more. Requests that run end on theirs."""
        self._replace(None)

    async def close(self) -> None:
        """Close all, whoever still holds one."""
        for task in self._closing:
            task.cancel()
        await asyncio.gather(*self._closing, return_exceptions=True)
        if self.newest is not None:
            await self.newest.resources.aclose()

    def _replace(self, snapshot: Snapshot | None) -> None:
        before, self.newest = self.newest, snapshot
        if before is not None:
            task = asyncio.get_running_loop().create_task(before.close(), name="snapshot-close")
            self._closing.add(task)
            task.add_done_callback(self._closing.discard)

    async def _opened(self, bundle: Bundle, resources: AsyncExitStack) -> Snapshot:
        settings, manifest = self._settings, bundle.manifest
        catalogue = await asyncio.to_thread(_warm_catalogue, bundle)
        trie, channels = catalogue.trie, ModelChannels(settings, resources)
        version = manifest.model_version("target")
        attempts, pass_seconds = settings.target_attempts, settings.target_pass_seconds
        targets = await channels.targets(version)
        target = TargetClient(targets, trie, version, attempts=attempts, pass_seconds=pass_seconds)
        draft = None
        if settings.draft and manifest.draft:
            version = manifest.model_version("draft")
            timeout, backoff = settings.draft_timeout_seconds, settings.draft_backoff_seconds
            drafts = await channels.drafts(settings.draft, version)
            draft = DraftClient(drafts, trie, version, timeout=timeout, backoff_seconds=backoff)
        planner = self._planners.of(manifest, catalogue.trie)
        if draft is not None:
            await resources.enter_async_context(background_task(refresh_curves(planner, target, draft), "learn-curves"))
        histories = self._histories(manifest)
        recommender = Recommender(
            manifest,
            catalogue,
            target,
            draft,
            planner,
            histories,
            self._speculation_breaker,
            target_prefetch=settings.target_prefetch,
        )
        return Snapshot(manifest, manifest.version, recommender, planner, target, draft, channels, resources)

    def _histories(self, manifest: Manifest) -> HistoryStore | None:
        if self._redis is None:
            return None
        most, timeout = self._settings.max_history_items, self._settings.redis_timeout_seconds
        step = min(manifest.target.prompt.drop_block, most)
        return HistoryStore(self._redis, most, trim_step=step, timeout_seconds=timeout)


def _warm_catalogue(bundle: Bundle) -> Catalogue:
    catalogue = bundle.catalogue()
    catalogue.warm_up()
    return catalogue
