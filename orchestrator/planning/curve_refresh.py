"""Learns from the model services what passes cost on them, as soon as both can be asked."""

from __future__ import annotations

import asyncio
from typing import Protocol

import grpc
import structlog

from atspeed.engine.model.cost_curve import CostCurve
from atspeed.errors import InvalidArgumentError
from orchestrator.planning.planner import Planner

_FIRST_PAUSE_SECONDS = 0.25
_LONGEST_PAUSE_SECONDS = 30.0
_REFRESH_SECONDS = 180.0

_log: structlog.stdlib.BoundLogger = structlog.get_logger(__name__)


class Measured(Protocol):
    """A model service that says what its passes cost."""

    async def cost_curve(self) -> CostCurve:
        """Raises grpc.aio.AioRpcError when it is out of reach, InvalidArgumentError when it does not say."""


async def learn_curves(planner: Planner, target: Measured, draft: Measured) -> None:
    """Give the planner both curves as soon as there are both, and again from time to time: replicas come and go.

    Never ends, whatever goes wrong: without curves the planner would not plan by cost any more, and nobody would hear of it.
    """
    pause = _FIRST_PAUSE_SECONDS
    while True:
        if await _learned(planner, target, draft):
            pause = _FIRST_PAUSE_SECONDS
            await asyncio.sleep(_REFRESH_SECONDS)
        else:
            await asyncio.sleep(pause)
            pause = min(_LONGEST_PAUSE_SECONDS, 2 * pause)


async def _learned(planner: Planner, target: Measured, draft: Measured) -> bool:
    try:
        planner.measure_by(await target.cost_curve(), await draft.cost_curve())
    except (grpc.aio.AioRpcError, InvalidArgumentError) as error:
        _log.info("costs of passes are not known", problem=str(error))
        return False
    except Exception:  # noqa: BLE001 - nobody waits for this task
        _log.exception("costs of passes could not be learnt")
        return False
    return True
