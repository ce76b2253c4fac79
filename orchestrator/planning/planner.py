"""Planner of a bundle: the plan sizer of each request, and fresh cost curves."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from enum import StrEnum
from typing import Protocol

import grpc
import structlog

from atspeed.engine.bundle.manifest import ModelEntry
from atspeed.engine.model.cost_curve import CostCurve
from atspeed.engine.search.mode import Mode
from atspeed.engine.search.trie import Trie
from atspeed.engine.speculation.acceptance_model import WorkloadKey
from atspeed.errors import InvalidArgumentError
from orchestrator.planning.adaptive_sizer import AdaptivePlanSizer
from orchestrator.planning.plan_passes import PlanPasses
from orchestrator.planning.plan_sizer import FixedPlanSizer, PlanContext
from orchestrator.planning.planner_state import ModelLatencies, PlannerState

# Pause before unknown curves are asked for again, doubled up to half a minute: services start within seconds, or are away.
_FIRST_RETRY_SECONDS = 0.25
_MAX_RETRY_SECONDS = 30.0
# Pause before known curves are asked for again: a replaced replica may run on another machine. Measured calls correct the
# curves meanwhile, so minutes are soon enough.
_REFRESH_SECONDS = 180.0

_log: structlog.stdlib.BoundLogger = structlog.get_logger(__name__)


class PlannerKind(StrEnum):
    """Kind of plan sizes: the ones with the least expected latency, or fixed ones."""

    ADAPTIVE = "adaptive"
    FIXED = "fixed"


@dataclass(frozen=True)
class PlanLimits:
    """Settings of the planner.

    Attributes:
        kind: adaptive or fixed sizes.
        nodes_per_beam: nodes of a fixed plan for each beam of each level 1 to L-1; the AtSpeed paper drafts N = 2K per level.
        max_nodes: most nodes of a plan.
        explored_share: share of the time of requests that no plan would speed up, spent on exploration.
        patience: longest wait for a plan, in times of what the target alone is expected to take.
    """

    kind: PlannerKind = PlannerKind.ADAPTIVE
    nodes_per_beam: float = 2.0
    max_nodes: int = 240
    explored_share: float = 0.01
    patience: float = 4.0


class Planner:
    """Maker of plan sizers, with estimates that all requests share.

    Plans have a fixed size until both models' cost curves are known.

    Args:
        draft: entry of the draft, which says how many passes its plans take; a pass for each level if None.
    """

    def __init__(self, trie: Trie, limits: PlanLimits, draft: ModelEntry | None = None) -> None:
        self._trie = trie
        self._limits = limits
        self._draft = draft
        self._state: PlannerState | None = None

    def set_curves(self, target: CostCurve, draft: CostCurve) -> None:
        """Set or replace the models' cost curves. Estimates are kept."""
        if self._state is not None:
            self._state.latencies.target.curve = target
            self._state.latencies.draft.curve = draft
            return
        latencies, limits = ModelLatencies(target, draft, PlanPasses.of(self._draft)), self._limits
        self._state = PlannerState(
            latencies, self._trie.levels, limits.max_nodes, limits.explored_share, limits.patience
        )

    def for_catalogue(self, trie: Trie) -> Planner:
        """Return a planner for another catalogue of the same models. It shares the estimates if the levels agree."""
        other = Planner(trie, self._limits, self._draft)
        if trie.levels == self._trie.levels:
            other._state = self._state
        return other

    def fixed_nodes(self, beam_width: int) -> int:
        """Return the number of nodes of a plan of fixed size."""
        nodes = round(self._limits.nodes_per_beam * beam_width * (self._trie.levels - 1))
        return min(self._limits.max_nodes, max(1, nodes))

    def sizer(self, mode: Mode, context: PlanContext) -> FixedPlanSizer:
        """Return the plan sizer of a request. Relaxed sampling gets a fixed size: a sample cannot be cut to its best nodes."""
        nodes, state = self.fixed_nodes(context.beam_width), self._state
        fixed = self._limits.kind is PlannerKind.FIXED or not mode.properties.sized
        if state is None or fixed or self._trie.levels == 1:
            return FixedPlanSizer(self._trie, context, nodes, state.latencies if state else None)
        workload = WorkloadKey.of(mode, context.beam_widths)
        return AdaptivePlanSizer(self._trie, context, nodes, self._limits.max_nodes, workload, state)


class MeasuredModel(Protocol):
    """Model service that publishes its cost curve."""

    async def cost_curve(self) -> CostCurve:
        """Return the curve; raise grpc.aio.AioRpcError or InvalidArgumentError if there is none."""


async def refresh_curves(planner: Planner, target: MeasuredModel, draft: MeasuredModel) -> None:
    """Give the planner both cost curves as soon as they are known, and again from time to time.

    Never returns, whatever goes wrong: without curves the planner would keep the fixed size.
    """
    pause = _FIRST_RETRY_SECONDS
    while True:
        if await _refreshed(planner, target, draft):
            pause = _FIRST_RETRY_SECONDS
            await asyncio.sleep(_REFRESH_SECONDS)
        else:
            await asyncio.sleep(pause)
            pause = min(_MAX_RETRY_SECONDS, 2 * pause)


async def _refreshed(planner: Planner, target: MeasuredModel, draft: MeasuredModel) -> bool:
    try:
        planner.set_curves(await target.cost_curve(), await draft.cost_curve())
    except (grpc.aio.AioRpcError, InvalidArgumentError) as error:
        _log.info("cost_curves_unavailable", error=str(error))
        return False
    except Exception:  # noqa: BLE001 - nobody awaits this task
        _log.exception("cost_curve_refresh_failed")
        return False
    return True
