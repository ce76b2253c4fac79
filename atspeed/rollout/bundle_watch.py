"""Follows the bundles that a service's settings name, each a directory or a symlink, and has others taken up when they change.

A bundle is another one when its manifest's version is. One that cannot be served is refused, once, and what is served goes on;
SIGHUP has it looked at again. The stable bundle is always there; a canary is let go of when its path names nothing any more.
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


class Holder(Protocol):
    """Serves a bundle on each track."""

    async def activate(self, bundle: Bundle, track: Track) -> None:
        """Serves a bundle from its return on. Raises EngineError where that cannot be. Cancelled when there is another one."""

    def deactivate(self, track: Track) -> None:
        """Serves none on this track any more."""


_MISSES = 2

_log: structlog.stdlib.BoundLogger = structlog.get_logger(__name__)


def open_bundle(path: Path) -> Bundle:
    """The bundle that a path names now, by the directory itself: a link that moves meanwhile does not mix two."""
    return Bundle(path.resolve())


class BundleWatch:
    """Looks at a track's path. served: the version of the bundle that is served, empty when none is.

    taken, refused: how many others there were. pending: the version that is being taken up, empty when none is.
    """

    def __init__(self, path: Path, track: Track, holder: Holder, served: str = "") -> None:
        self._path = path
        self.track = track
        self._holder = holder
        self.served = served
        self.pending = ""
        self.taken = self.refused = 0
        self._seen: tuple[str, int, int, int] | None = None
        self._misses = 0
        self._taking: asyncio.Task[None] | None = None
        self._log = _log.bind(track=track.value)

    def forget(self) -> None:
        """Look afresh the next time, also at a bundle that was refused."""
        self._seen = None

    async def look(self) -> None:
        """Compare what the path names with what is served, and start to take it up where it is another one."""
        stamp = self._stamp()
        if stamp is None:
            await self._miss()
            return
        self._misses = 0
        if stamp == self._seen:
            return
        self._seen = stamp
        try:
            bundle = open_bundle(self._path)
        except BundleError as error:
            await self.give_up()
            self._refuse(error)
            return
        version = bundle.manifest.version
        if version == (self.pending or self.served):
            return
        await self.give_up()
        if version == self.served:
            self._log.info("the bundle is again the one that is served", version=version)
            return
        self.pending = version
        self._taking = asyncio.get_running_loop().create_task(self._take(bundle), name="bundle-take-up")

    async def settle(self) -> None:
        """Wait until what is being taken up is, or is refused."""
        if self._taking is not None:
            await asyncio.wait((self._taking,))

    async def give_up(self) -> None:
        """Let go of what is being taken up."""
        if self._taking is not None:
            self._taking.cancel()
            await asyncio.gather(self._taking, return_exceptions=True)
        self._taking = None
        self.pending = ""

    async def _take(self, bundle: Bundle) -> None:
        version = bundle.manifest.version
        self._log.info("another bundle", root=str(bundle.root), version=version, name=bundle.manifest.name)
        try:
            await self._holder.activate(bundle, self.track)
        except EngineError as error:
            self._refuse(error)
        except Exception as error:  # noqa: BLE001 - whatever it is, what is served goes on
            self.refused += 1
            self._log.error("the bundle is refused, what was served goes on", root=str(bundle.root), exc_info=error)
        else:
            self.taken += 1
            self.served = version
            self._log.info("the bundle is served", root=str(bundle.root), version=version)
        self.pending = ""

    def _refuse(self, error: EngineError) -> None:
        self.refused += 1
        self._log.error("the bundle is refused, what was served goes on", reason=" ".join(str(error).split()))

    async def _miss(self) -> None:
        """Nothing is there: for a moment while one directory takes another's place, so only the second look in a row counts."""
        self._misses, self._seen = self._misses + 1, None
        if self._misses != _MISSES:
            return
        if self.track is Track.STABLE:
            self._refuse(BundleError(f"{self._path}/{MANIFEST}: is not there"))
            return
        await self.give_up()
        if self.served:
            self._holder.deactivate(self.track)
            self._log.info("the bundle is no longer served", version=self.served)
            self.served = ""

    def _stamp(self) -> tuple[str, int, int, int] | None:
        """What changes whenever the path names another manifest; None where there is none."""
        try:
            root = self._path.resolve()
            stat = (root / MANIFEST).stat()
        except (OSError, RuntimeError):  # RuntimeError: links that lead in a circle
            return None
        return str(root), stat.st_ino, stat.st_mtime_ns, stat.st_size


def bundle_watches(settings: ServiceSettings, holder: Holder, served: str) -> Sequence[BundleWatch]:
    """One for each path that the settings name. served: the version of the stable bundle, which the holder has already."""
    stable = BundleWatch(settings.bundle, Track.STABLE, holder, served)
    if settings.canary_bundle is None:
        return [stable]
    return [stable, BundleWatch(settings.canary_bundle, Track.CANARY, holder)]


@asynccontextmanager
async def following(
    watches: Sequence[BundleWatch], poll_seconds: float, patience_seconds: float | None = None
) -> AsyncIterator[None]:
    """Follow the paths for as long as the block lasts. It begins when all that they name now has been taken up or refused.

    patience_seconds: how long that may take at most; what takes longer goes on beside the block.
    """
    hurry = asyncio.Event()
    try:
        await _first_look(watches, patience_seconds)
        async with background_task(_follow(watches, poll_seconds, hurry), "bundle-watch"):
            with _heard_by(watches, hurry):
                yield
    finally:
        for watch in watches:
            await watch.give_up()


async def _first_look(watches: Sequence[BundleWatch], patience_seconds: float | None) -> None:
    for watch in watches:
        await watch.look()
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(patience_seconds):
            for watch in watches:
                await watch.settle()


async def _follow(watches: Sequence[BundleWatch], poll_seconds: float, hurry: asyncio.Event) -> None:
    while True:
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(poll_seconds):
                await hurry.wait()
        hurry.clear()
        for watch in watches:
            await watch.look()


@contextmanager
def _heard_by(watches: Sequence[BundleWatch], hurry: asyncio.Event) -> Iterator[None]:
    """SIGHUP has all of them look again, at once."""
    loop = asyncio.get_running_loop()

    def look_again() -> None:
        for watch in watches:
            watch.forget()
        hurry.set()

    with contextlib.suppress(ValueError, RuntimeError):  # only a main thread hears signals
        loop.add_signal_handler(signal.SIGHUP, look_again)
    try:
        yield
    finally:
        with contextlib.suppress(ValueError, RuntimeError):
            loop.remove_signal_handler(signal.SIGHUP)
