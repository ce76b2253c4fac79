"""Learns from the model services what passes cost on them, as soon as both can be asked."""

from __future__ import annotations

import asyncio
from typing import Protocol

import grpc
import structlog

from engine.cost_curve import CostCurve
from orchestrator.planner import Planner
from service_kit.errors import InvalidArgumentError

_FIRST_PAUSE_SECONDS = 0.25
_LONGEST_PAUSE_SECONDS = 30.0

_log: structlog.stdlib.BoundLogger = structlog.get_logger(__name__)


class Measured(Protocol):
    """A model service that says what its passes cost."""

    async def cost_curve(self) -> CostCurve:
        """Raises grpc.aio.AioRpcError when it is out of reach, InvalidArgumentError when it does not say."""


async def learn_curves(planner: Planner, target: Measured, draft: Measured) -> None:
    """Give the planner both curves, asking again and again until there are both."""
    pause = _FIRST_PAUSE_SECONDS
    while True:
        try:
            curves = await target.cost_curve(), await draft.cost_curve()
        except (grpc.aio.AioRpcError, InvalidArgumentError) as error:
            _log.info("costs of passes are not known yet", problem=str(error))
            await asyncio.sleep(pause)
            pause = min(_LONGEST_PAUSE_SECONDS, 2 * pause)
        else:
            planner.measure_by(*curves)
            return
