"""Follows the bundle that a service's settings name, a directory or a symlink, and has another one taken up when it changes.

A bundle is another one when its manifest's version is. One that cannot be served is refused, once, and what is served goes on;
SIGHUP has it looked at again.
"""

from __future__ import annotations

import asyncio
import contextlib
import signal
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import structlog

from engine.bundle import MANIFEST, Bundle
from engine.errors import BundleError, EngineError

TakeUp = Callable[[Bundle], Awaitable[None]]
"""Serves a bundle from its return on. Raises EngineError where that cannot be. Cancelled when the path names another one."""

_MISSES = 2

_log: structlog.stdlib.BoundLogger = structlog.get_logger(__name__)


def open_bundle(path: Path) -> Bundle:
    """The bundle that a path names now, by the directory itself: a link that moves meanwhile does not mix two."""
    return Bundle(path.resolve())


class BundleWatch:
    """Looks at a path every `poll_seconds`. served: the version of the bundle that is served.

    taken, refused: how many others there were. pending: the version that is being taken up, empty when none is.
    """

    def __init__(self, path: Path, served: str, take_up: TakeUp, poll_seconds: float) -> None:
        self._path, self._take_up, self._poll_seconds = path, take_up, poll_seconds
        self.served, self.pending = served, ""
        self.taken = self.refused = 0
        self._seen: tuple[str, int, int, int] | None = None
        self._misses = 0
        self._hurry = asyncio.Event()
        self._taking: asyncio.Task[None] | None = None

    @asynccontextmanager
    async def following(self) -> AsyncIterator[BundleWatch]:
        """Follow the path for as long as the block lasts."""
        task = asyncio.get_running_loop().create_task(self._follow(), name="bundle-watch")
        loop = asyncio.get_running_loop()
        with contextlib.suppress(ValueError, RuntimeError):  # only a main thread hears signals
            loop.add_signal_handler(signal.SIGHUP, self.look_again)
        try:
            yield self
        finally:
            with contextlib.suppress(ValueError, RuntimeError):
                loop.remove_signal_handler(signal.SIGHUP)
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)
            await self._give_up()

    def look_again(self) -> None:
        """Look now, also at a bundle that was refused."""
        self._seen = None
        self._hurry.set()

    async def look(self) -> None:
        """Compare what the path names with what is served, and start to take it up where it is another one."""
        stamp = self._stamp()
        if stamp is None:
            self._miss()
            return
        self._misses = 0
        if stamp == self._seen:
            return
        self._seen = stamp
        try:
            bundle = open_bundle(self._path)
        except BundleError as error:
            await self._give_up()
            self._refuse(error)
            return
        version = bundle.manifest.version
        if version == (self.pending or self.served):
            return
        await self._give_up()
        if version == self.served:
            _log.info("the bundle is again the one that is served", version=version)
            return
        self.pending = version
        self._taking = asyncio.get_running_loop().create_task(self._take(bundle), name="bundle-take-up")

    async def settle(self) -> None:
        """Wait until what is being taken up is, or is refused."""
        if self._taking is not None:
            await asyncio.wait((self._taking,))

    async def _follow(self) -> None:
        while True:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(self._poll_seconds):
                    await self._hurry.wait()
            self._hurry.clear()
            await self.look()

    async def _take(self, bundle: Bundle) -> None:
        version = bundle.manifest.version
        _log.info("another bundle", root=str(bundle.root), version=version, name=bundle.manifest.name)
        try:
            await self._take_up(bundle)
        except EngineError as error:
            self._refuse(error)
        except Exception as error:  # noqa: BLE001 - whatever it is, what is served goes on
            self.refused += 1
            _log.error("the bundle is refused, the old one goes on", root=str(bundle.root), exc_info=error)
        else:
            self.taken += 1
            self.served = version
            _log.info("the bundle is served", root=str(bundle.root), version=version)
        self.pending = ""

    async def _give_up(self) -> None:
        """Let go of what is being taken up."""
        if self._taking is not None:
            self._taking.cancel()
            await asyncio.gather(self._taking, return_exceptions=True)
        self._taking, self.pending = None, ""

    def _refuse(self, error: EngineError) -> None:
        self.refused += 1
        _log.error("the bundle is refused, the old one goes on", reason=" ".join(str(error).split()))

    def _miss(self) -> None:
        """Nothing is there: for a moment while one directory takes another's place, so only the second look in a row counts."""
        self._misses, self._seen = self._misses + 1, None
        if self._misses == _MISSES:
            self._refuse(BundleError(f"{self._path}/{MANIFEST}: is not there"))

    def _stamp(self) -> tuple[str, int, int, int] | None:
        """What changes whenever the path names another manifest; None where there is none."""
        try:
            root = self._path.resolve()
            stat = (root / MANIFEST).stat()
        except OSError:
            return None
        return str(root), stat.st_ino, stat.st_mtime_ns, stat.st_size
