"""Whether a model's passes work: a replica whose passes fail one after the other says so, until one works again."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

import structlog

from atspeed.engine.errors import EngineError, NoNumbersError, OverloadedError

_FIRST_PAUSE_SECONDS = 1.0
_LONGEST_PAUSE_SECONDS = 30.0

_log: structlog.stdlib.BoundLogger = structlog.get_logger(__name__)


class ModelHealth:
    """Counts the outcomes of one model's passes. For the event loop only.

    unhealthy_after: so many that fail in a row make it unfit; 0: it never is. What the engine refuses is the request's own fault, or
    a limit, and does not count. Passes that give no numbers do, but one node may spoil a pass that was planned, and so may one
    user's history: before they make it unfit a pass is rehearsed, and if that works the count begins anew.
    rehearse: plain passes that nobody waits for. They are tried a second after it became unfit, then with pauses that grow to
    half a minute, and make it fit again when they work. declare: hears of both.
    """

    def __init__(
        self,
        unhealthy_after: int,
        rehearse: Callable[[], Awaitable[None]],
        declare: Callable[[bool], Awaitable[None]],
        *,
        first_pause_seconds: float = _FIRST_PAUSE_SECONDS,
    ) -> None:
        self._unhealthy_after = unhealthy_after
        self._rehearse = rehearse
        self._declare = declare
        self._first_pause_seconds = first_pause_seconds
        self._failures = 0
        self._judging: asyncio.Task[None] | None = None
        self.fit = True

    async def examine(self) -> None:
        """Rehearse before the first call comes; where that fails it is unfit from the start."""
        if self._unhealthy_after and not await self._works():
            self._give_up()
            await self._declare(False)

    def passed(self) -> None:
        """A pass has worked."""
        self._failures = 0

    def failed(self, error: Exception) -> None:
        """A pass has not."""
        if isinstance(error, EngineError) and not isinstance(error, NoNumbersError):
            return
        self._failures += 1
        if self._failures != self._unhealthy_after or self._judging is not None:
            return
        if isinstance(error, NoNumbersError):
            self._judging = asyncio.get_running_loop().create_task(self._doubt(), name="doubted-model")
        else:
            self._give_up(type(error).__name__)

    async def close(self) -> None:
        """Try no more."""
        if self._judging is not None:
            self._judging.cancel()
            await asyncio.gather(self._judging, return_exceptions=True)
            await self._declare(True)  # for the next model of that name

    def _give_up(self, error_type: str = NoNumbersError.__name__) -> None:
        _log.error("passes fail one after the other, calls should go elsewhere", error_type=error_type)
        self.fit = False
        self._judging = asyncio.get_running_loop().create_task(self._recover(), name="unfit-model")

    async def _doubt(self) -> None:
        """Whether plain passes work, or those that failed had something of their own."""
        if await self._works(while_full=True):
            self._failures = 0
            self._judging = None
            _log.warning("passes gave no numbers, plain ones do")
        else:
            self._give_up()

    async def _recover(self) -> None:
        await self._declare(False)
        pause = self._first_pause_seconds
        while True:
            await asyncio.sleep(pause)
            if await self._works():
                break
            pause = min(2 * pause, _LONGEST_PAUSE_SECONDS)
        self._failures = 0
        self._judging = None
        self.fit = True
        _log.info("passes work again")
        await self._declare(True)

    async def _works(self, *, while_full: bool = False) -> bool:
        """Whether a rehearsal does. while_full: what is to be said where there is no room for one."""
        try:
            await self._rehearse()
        except OverloadedError:
            return while_full
        except Exception as error:  # noqa: BLE001 - whatever it is, it is tried again
            _log.warning("a rehearsed pass failed", error_type=type(error).__name__)
            return False
        return True
