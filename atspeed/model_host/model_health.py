"""Whether a model's passes work: a replica whose passes fail one after the other says so, until one works again."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

import structlog

from atspeed.engine.errors import EngineError

_FIRST_PAUSE_SECONDS = 1.0
_LONGEST_PAUSE_SECONDS = 30.0

_log: structlog.stdlib.BoundLogger = structlog.get_logger(__name__)


class ModelHealth:
    """Counts the outcomes of one model's passes. For the event loop only.

    unhealthy_after: so many that fail in a row make it unfit; 0: it never is. What the engine refuses is the request's own fault, or
    a limit, and does not count. rehearse: a pass that nobody waits for. It is tried a second after that, then with pauses that
    grow to half a minute, and makes it fit again when it works. declare: hears of both.
    """

    def __init__(
        self,
        unhealthy_after: int,
        rehearse: Callable[[], Awaitable[None]],
        declare: Callable[[bool], Awaitable[None]],
        *,
        first_pause_seconds: float = _FIRST_PAUSE_SECONDS,
    ) -> None:
        self._unhealthy_after, self._rehearse, self._declare = unhealthy_after, rehearse, declare
        self._first_pause_seconds = first_pause_seconds
        self._failures = 0
        self._recovery: asyncio.Task[None] | None = None

    @property
    def fit(self) -> bool:
        """Whether passes work, as far as is known."""
        return self._recovery is None

    def passed(self) -> None:
        """A pass has worked."""
        self._failures = 0

    def failed(self, error: Exception) -> None:
        """A pass has not."""
        if isinstance(error, EngineError):
            return
        self._failures += 1
        if self._failures == self._unhealthy_after and self.fit:
            _log.error("passes fail one after the other, calls should go elsewhere", error_type=type(error).__name__)
            self._recovery = asyncio.get_running_loop().create_task(self._recover(), name="unfit-model")

    async def close(self) -> None:
        """Try no more."""
        if self._recovery is not None:
            self._recovery.cancel()
            await asyncio.gather(self._recovery, return_exceptions=True)
            await self._declare(True)  # for the next model of that name

    async def _recover(self) -> None:
        await self._declare(False)
        pause = self._first_pause_seconds
        while not await self._works(pause):
            pause = min(2 * pause, _LONGEST_PAUSE_SECONDS)
        self._failures, self._recovery = 0, None
        _log.info("passes work again")
        await self._declare(True)

    async def _works(self, pause: float) -> bool:
        await asyncio.sleep(pause)
        try:
            await self._rehearse()
        except Exception as error:  # noqa: BLE001 - whatever it is, it is tried again
            _log.warning("a rehearsed pass failed", error_type=type(error).__name__)
            return False
        return True
