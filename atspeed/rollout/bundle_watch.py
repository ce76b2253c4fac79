"""Watches the bundle paths of a service, and activates a bundle when it changes.

A path is a directory or a symlink. A bundle has changed when the version in its manifest has. A bundle that cannot be served is
rejected once, and the earlier one stays; SIGHUP makes the service try it again. The stable bundle is always there. A canary is
deactivated when its path no longer exists.
"""

from __future__ import annotations

import asyncio
import contextlib
import signal
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from typing import Protocol

import structlog

from atspeed.concurrency.tasks import background_task
from atspeed.configuration.settings import ServiceSettings
from atspeed.engine.bundle.manifest import MANIFEST, Bundle
from atspeed.engine.errors import BundleError, EngineError
from atspeed.rollout.release_track import Track
from atspeed.security.file_watch import FileSignature, file_signature


class BundleHost(Protocol):
    """Serves a bundle on each track."""

    async def activate(self, bundle: Bundle, track: Track) -> None:
        """Serve a bundle on a track. Raises EngineError for a bad bundle. It is cancelled when the path changes again."""

    def deactivate(self, track: Track) -> None:
        """Stop serving a track."""


# Checks in a row without a manifest after which a bundle counts as missing. The first may meet one directory's swap for another.
_MAX_MISSES = 2

_log: structlog.stdlib.BoundLogger = structlog.get_logger(__name__)


def open_bundle(path: Path) -> Bundle:
    """Open the bundle that a path names now. The link is resolved once, so a link that moves cannot mix two bundles."""
    return Bundle(path.resolve())


class BundleWatch:
    """Watches the path of one track.

    Attributes:
        track: the release track.
        served: version of the served bundle; None without one.
        pending: version of the bundle that is being activated; None without one.
        activated: number of bundles that were activated.
        rejected: number of bundles that were rejected.
    """

    def __init__(self, path: Path, track: Track, host: BundleHost, served: str | None = None) -> None:
        self._path = path
        self.track = track
        self._host = host
        self.served = served
        self.pending: str | None = None
        self.activated = 0
        self.rejected = 0
        self._seen: tuple[str, FileSignature] | None = None
        self._misses = 0
        self._activation: asyncio.Task[None] | None = None
        self._log = _log.bind(track=track.value)

    def reset(self) -> None:
        """Forget the last check, so that the next one tries a rejected bundle again."""
        self._seen = None

    async def check(self) -> None:
        """Compare the path with the served bundle, and start to activate a different one."""
        signature = self._signature()
        if signature is None:
            await self._miss()
            return
        self._misses = 0
        if signature == self._seen:
            return
        self._seen = signature
        try:
            bundle = open_bundle(self._path)
        except BundleError as error:
            await self.cancel()
            self._reject(error)
            return
        version = bundle.manifest.version
        if version == (self.pending or self.served):
            return
        await self.cancel()
        if version == self.served:
            self._log.info("bundle_change_reverted", serving=version)
            return
        self.pending = version
        self._activation = asyncio.get_running_loop().create_task(self._activate(bundle), name="activate-bundle")

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

    async def _activate(self, bundle: Bundle) -> None:
        version = bundle.manifest.version
        self._log.info("bundle_activating", root=str(bundle.root), version=version, name=bundle.manifest.name)
        try:
            await self._host.activate(bundle, self.track)
        except EngineError as error:
            self._reject(error)
        except Exception as error:  # noqa: BLE001 - after any failure the served bundle stays
            self.rejected += 1
            self._log.error("bundle_rejected", serving=self.served, root=str(bundle.root), exc_info=error)
        else:
            self.activated += 1
            self.served = version
            self._log.info("bundle_activated", root=str(bundle.root), version=version)
        self.pending = None

    def _reject(self, error: EngineError) -> None:
        self.rejected += 1
        self._log.error("bundle_rejected", serving=self.served, reason=" ".join(str(error).split()))

    async def _miss(self) -> None:
        """Handle a check without a manifest."""
        self._misses += 1
        self._seen = None
        if self._misses != _MAX_MISSES:
            return
        if self.track is Track.STABLE:
            self._reject(BundleError(f"{self._path}/{MANIFEST}: is not there"))
            return
        await self.cancel()
        if self.served is not None:
            self._host.deactivate(self.track)
            self._log.info("bundle_deactivated", version=self.served)
            self.served = None

    def _signature(self) -> tuple[str, FileSignature] | None:
        """Return a value that changes with the manifest; None without one."""
        try:
            root = self._path.resolve()
        except (OSError, RuntimeError):  # RuntimeError: a circle of links
            return None
        signature = file_signature(root / MANIFEST)
        return None if signature is None else (str(root), signature)


def bundle_watches(settings: ServiceSettings, host: BundleHost, served: str) -> Sequence[BundleWatch]:
    """Return a watch for each path in the settings. served: version of the stable bundle, which the host serves already."""
    stable = BundleWatch(settings.bundle, Track.STABLE, host, served)
    if settings.canary_bundle is None:
        return [stable]
    return [stable, BundleWatch(settings.canary_bundle, Track.CANARY, host)]


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
