"""Model health: a circuit breaker over a model's passes, with a probe."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Coroutine
from contextvars import Context
from typing import Any

import structlog

from atspeed.engine.errors import DeviceError, EngineError, NoNumbersError, OverloadedError

# Pauses between probes. The first is short, as many failures pass by themselves; the last bounds the load of a broken model.
_FIRST_PAUSE_SECONDS = 1.0
_MAX_PAUSE_SECONDS = 30.0

_log: structlog.stdlib.BoundLogger = structlog.get_logger(__name__)


class ModelHealth:
    """Counts the failures of one model's passes. For one event loop.

    - Errors of the engine do not count: the request is wrong, or a limit is reached. `NoNumbersError` and
      `DeviceError` do count.
    - After `unhealthy_after` failures in a row the model is unhealthy. A probe then runs with growing pauses, and its first
      success makes the model healthy again.
    - One failure of the device makes the model unhealthy at once: a device that failed fails again, until its process restarts.
    - A single node or one user's history can cause `NoNumbersError`. So before such a failure makes the model unhealthy, a probe
      runs, and its success resets the count.

    Args:
        unhealthy_after: failures in a row that make the model unhealthy; None for never.
        probe: runs plain passes that no request waits for.
        on_change: receives False when the model becomes unhealthy, and True when it recovers.

    Attributes:
        healthy: the state.
    """

    def __init__(
        self,
        unhealthy_after: int | None,
        probe: Callable[[], Awaitable[None]],
        on_change: Callable[[bool], Awaitable[None]],
        *,
        first_pause_seconds: float = _FIRST_PAUSE_SECONDS,
    ) -> None:
        self._unhealthy_after = unhealthy_after
        self._probe = probe
        self._on_change = on_change
        self._first_pause_seconds = first_pause_seconds
        self._failures = 0
        self._probing: asyncio.Task[None] | None = None
        self.healthy = True

    async def probe_at_start(self) -> None:
        """Probe before the first call. A failure makes the model unhealthy, and on_change has returned by then."""
        if self._unhealthy_after is not None and not await self._probe_succeeds():
            self._become_unhealthy()
            await self._on_change(False)

    def record_success(self) -> None:
        """Count a pass that worked."""
        self._failures = 0

    def record_failure(self, error: Exception) -> None:
        """Count a failed pass."""
        if isinstance(error, EngineError) and not isinstance(error, (NoNumbersError, DeviceError)):
            return
        self._failures += 1
        if isinstance(error, DeviceError) and self._unhealthy_after is not None:
            self._failures = self._unhealthy_after
        if self._failures != self._unhealthy_after or self._probing is not None:
            return
        if isinstance(error, NoNumbersError):
            self._start(self._confirm(), "confirm-unhealthy")
        else:
            self._become_unhealthy(type(error).__name__)

    async def close(self) -> None:
        """Stop probing. The next model of this version starts healthy."""
        if self._probing is not None:
            self._probing.cancel()
            await asyncio.gather(self._probing, return_exceptions=True)
            await self._on_change(True)

    def _become_unhealthy(self, error_type: str = NoNumbersError.__name__) -> None:
        _log.error("model_unhealthy", consecutive_failures=self._failures, error_type=error_type)
        self.healthy = False
        self._start(self._recover(), "recover-model")

    def _start(self, work: Coroutine[Any, Any, None], name: str) -> None:
        # Its log lines are about the model, and not about the call whose pass failed.
        self._probing = asyncio.get_running_loop().create_task(work, name=name, context=Context())

    async def _confirm(self) -> None:
        """Probe after passes without numbers. The probe decides whether the model or its requests caused them."""
        if await self._probe_succeeds(if_overloaded=True):
            _log.warning("model_probe_succeeded", failures_without_numbers=self._failures)
            self._failures = 0
            self._probing = None
        else:
            self._become_unhealthy()

    async def _recover(self) -> None:
        await self._on_change(False)
        pause = self._first_pause_seconds
        while True:
            await asyncio.sleep(pause)
            if await self._probe_succeeds():
                break
            pause = min(2 * pause, _MAX_PAUSE_SECONDS)
        self._failures = 0
        self._probing = None
        self.healthy = True
        _log.info("model_recovered")
        await self._on_change(True)

    async def _probe_succeeds(self, *, if_overloaded: bool = False) -> bool:
        """Run a probe. if_overloaded: the result if the model is too busy for a probe."""
        try:
            await self._probe()
        except OverloadedError:
            return if_overloaded
        except Exception as error:  # noqa: BLE001 - any failure is tried again
            _log.warning("model_probe_failed", error_type=type(error).__name__)
            return False
        return True
