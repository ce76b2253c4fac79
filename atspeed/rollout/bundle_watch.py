"""Watches the bundle paths and URLs of a service, and activates a changed bundle.

A place is a directory, a symlink or a URL. A bundle has changed when the version in its manifest has. A bundle that cannot be
served is rejected once, and the earlier one stays; SIGHUP makes the service try it again. The stable bundle is always there. A
canary is deactivated when its place no longer names one. If a store cannot be reached, nothing changes, and a service that
starts takes the last served stable bundle from its cache.
"""

from __future__ import annotations

import asyncio
import contextlib
import signal
import time
from collections.abc import AsyncIterator, Hashable, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager, contextmanager
from typing import Protocol

import structlog

from atspeed.artefacts.bundle_source import BundleSource, NamedBundle
from atspeed.artefacts.object_store import StoreError
from atspeed.concurrency.tasks import background_task
from atspeed.engine.bundle.bundle import Bundle
from atspeed.engine.bundle.manifest import MANIFEST
from atspeed.engine.errors import BundleError, EngineError
from atspeed.rollout.bundle_opening import open_named
from atspeed.rollout.release_track import Track


class BundleHost(Protocol):
    """Serves a bundle on each track."""

    async def activate(self, bundle: Bundle, track: Track) -> None:
        """Serve a bundle on a track. Raises EngineError for a bad bundle. It is cancelled when the path changes again."""

    def deactivate(self, track: Track) -> None:
        """Stop serving a track."""


# Checks in a row without a manifest after which a bundle counts as missing. The first may meet one directory's swap for another.
_MAX_MISSES = 2
# Pause after a store failed in the middle of a bundle. The files that were fetched before stay in the cache.
_RETRY_SECONDS = 5.0

_log: structlog.stdlib.BoundLogger = structlog.get_logger(__name__)


class BundleWatch:
    """Watches the place of one track.

    Attributes:
        track: the release track.
        served: version of the served bundle; None without one.
        pending: version of the bundle that is being activated; None without one.
        activated: number of bundles that were activated.
        rejected: number of bundles that were rejected.
        unreachable: number of checks at which the store could not be reached.
        reached: whether the last check reached the store.
    """

    def __init__(self, source: BundleSource, track: Track, host: BundleHost, served: str | None = None) -> None:
        self._source = source
        self.track = track
        self._host = host
        self.served = served
        self.pending: str | None = None
        self.activated = 0
        self.rejected = 0
        self.unreachable = 0
        self.reached = True
        self._not_before = 0.0
        self._seen: Hashable = None
        self._misses = 0
        self._activation: asyncio.Task[None] | None = None
        self._log = _log.bind(track=track.value)

    def reset(self) -> None:
        """Forget the last check, so that the next one tries a rejected bundle again."""
        self._seen = None
        self._not_before = 0.0

    async def check(self) -> None:
        """Compare the named bundle with the served one, and start to activate a different one."""
        if time.monotonic() < self._not_before:
            return
        try:
            named = await asyncio.to_thread(self._source.look)
        except StoreError as error:
            self._miss_store(error)
            return
        except BundleError as error:
            await self._reject_once(str(error), error)
            return
        if not self.reached:
            self.reached = True
            self._log.info("bundle_store_reached", place=self._source.place)
        if named is None:
            await self._miss()
            return
        self._misses = 0
        if named.revision == self._seen:
            return
        try:
            version = await asyncio.to_thread(named.version)
        except BundleError as error:
            await self._reject_once(named.revision, error)
            return
        self._seen = named.revision
        if version == self.served:
            await self._record_served(named)
        await self._change_to(named, version)

    async def _change_to(self, named: NamedBundle, version: str) -> None:
        """Start to activate a bundle, unless its version is served or on its way."""
        if version == (self.pending or self.served):
            return
        await self.cancel()
        if version == self.served:
            self._log.info("bundle_change_reverted", serving=version)
            return
        self.pending = version
        self._activation = asyncio.get_running_loop().create_task(
            self._activate(named, version), name="activate-bundle"
        )

    async def join(self) -> None:
        """Wait for the end of a running activation."""
        if self._activation is not None:
            await asyncio.wait((self._activation,))

    async def cancel(self) -> None:
        """Cancel a running activation."""
        if self._activation is not None:
            self._activation.cancel()
            await asyncio.gather(self._activation, return_exceptions=True)
        self._activation = None
        self.pending = None

    async def _activate(self, named: NamedBundle, version: str) -> None:
        self._log.info("bundle_activating", root=named.place, version=version)
        try:
            await self._host.activate(await open_named(named), self.track)
        except StoreError as error:
            self._seen = None
            self._not_before = time.monotonic() + _RETRY_SECONDS
            self._miss_store(error)
        except EngineError as error:
            self._reject(error)
        except Exception as error:  # noqa: BLE001 - after any failure the served bundle stays
            self.rejected += 1
            self._log.error("bundle_rejected", serving=self.served, root=named.place, exc_info=error)
        else:
            self.activated += 1
            self.served = version
            self._log.info("bundle_activated", root=named.place, version=version)
            await self._record_served(named)
        self.pending = None

    async def _record_served(self, named: NamedBundle) -> None:
        """Record this bundle, which is served, for a start without the store."""
        try:
            await asyncio.to_thread(named.record_served)
        except BundleError as error:
            self._log.warning("bundle_not_recorded", reason=" ".join(str(error).split()))

    async def _reject_once(self, revision: Hashable, error: EngineError) -> None:
        """Reject what cannot be activated, unless the last check did."""
        self._misses = 0
        if revision == self._seen:
            return
        self._seen = revision
        await self.cancel()
        self._reject(error)

    def _reject(self, error: EngineError) -> None:
        self.rejected += 1
        self._log.error("bundle_rejected", serving=self.served, reason=" ".join(str(error).split()))

    def _miss_store(self, error: StoreError) -> None:
        """Handle a check that could not look. What is served stays, since nobody knows whether it changed."""
        self.unreachable += 1
        if self.reached:
            self.reached = False
            self._log.warning("bundle_store_unreachable", serving=self.served, reason=" ".join(str(error).split()))

    async def _miss(self) -> None:
        """Handle a check without a manifest."""
        self._misses += 1
        self._seen = None
        if self._misses != _MAX_MISSES:
            return
        if self.track is Track.STABLE:
            self._reject(BundleError(f"{self._source.place}/{MANIFEST}: is not there"))
            return
        await self.cancel()
        if self.served is not None:
            self._host.deactivate(self.track)
            self._log.info("bundle_deactivated", version=self.served)
            self.served = None


def bundle_watches(sources: Mapping[Track, BundleSource], host: BundleHost, served: str) -> Sequence[BundleWatch]:
    """Return a watch for each source. served: version of the stable bundle, which the host serves already."""
    return [
        BundleWatch(source, track, host, served if track is Track.STABLE else None) for track, source in sources.items()
    ]


@asynccontextmanager
async def watch_bundles(
    watches: Sequence[BundleWatch], poll_seconds: float, max_wait_seconds: float | None = None
) -> AsyncIterator[None]:
    """Watch the paths for the length of the block. It begins after the bundles that they name now were activated or rejected.

    max_wait_seconds: longest wait for these activations. They then continue during the block.
    """
    wake = asyncio.Event()
    try:
        await _first_check(watches, max_wait_seconds)
        async with background_task(_poll(watches, poll_seconds, wake), "bundle-watch"):
            with _recheck_at_sighup(watches, wake):
                yield
    finally:
        for watch in watches:
            await watch.cancel()


async def _first_check(watches: Sequence[BundleWatch], max_wait_seconds: float | None) -> None:
    for watch in watches:
        await watch.check()
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(max_wait_seconds):
            for watch in watches:
                await watch.join()


async def _poll(watches: Sequence[BundleWatch], poll_seconds: float, wake: asyncio.Event) -> None:
    while True:
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(poll_seconds):
                await wake.wait()
        wake.clear()
        for watch in watches:
            await watch.check()


@contextmanager
def _recheck_at_sighup(watches: Sequence[BundleWatch], wake: asyncio.Event) -> Iterator[None]:
    """Check all paths afresh at SIGHUP."""
    loop = asyncio.get_running_loop()

    def recheck() -> None:
        for watch in watches:
            watch.reset()
        wake.set()

    with contextlib.suppress(ValueError, RuntimeError):  # only the main thread can handle signals
        loop.add_signal_handler(signal.SIGHUP, recheck)
    try:
        yield
    finally:
        with contextlib.suppress(ValueError, RuntimeError):
            loop.remove_signal_handler(signal.SIGHUP)
