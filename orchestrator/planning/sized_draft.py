"""The draft as the loop sees it: a request's plan sizer in front of its draft."""

from __future__ import annotations

from typing import Protocol

from atspeed.engine.search.beams import Beams
from atspeed.engine.search.plan import Plan, PlanSize
from atspeed.observability import tracing
from orchestrator.planning.plan_sizer import FixedPlanSizer
from orchestrator.planning.usage import Usage


class DraftSource(Protocol):
    """A draft that makes plans of a given size; see `draft_client.DraftSession`."""

    @property
    def usage(self) -> Usage:
        """Return the costs of its calls."""

    async def plan(self, below: Beams, size: PlanSize, seconds: float) -> Plan:
        """Return a plan of at most this size, within this time; an empty plan when it fails."""


class TargetState(Protocol):
    """The part of a target that decides whether a plan is needed; see `target_client.TargetSession`."""

    @property
    def has_next_pass(self) -> bool:
        """Return whether the target has made the next pass already."""


class NoDraft:
    """A draft that proposes nothing: the search is plain beam search."""

    def __init__(self) -> None:
        self.usage = Usage()

    async def plan(self, below: Beams) -> Plan:
        """Return an empty plan."""
        return Plan.empty(below)


class SizedDraft:
    """A draft that is asked when a plan is expected to pay, and whose plans are cut to the part that pays."""

    def __init__(self, draft: DraftSource, sizer: FixedPlanSizer, target: TargetState) -> None:
        self._draft = draft
        self._sizer = sizer
        self._target = target

    @property
    def usage(self) -> Usage:
        """Return the costs of the draft's calls."""
        return self._draft.usage

    async def plan(self, below: Beams) -> Plan:
        """Return a plan below these beams; an empty one when none pays, or when the target has made the next pass."""
        with tracing.span("plan", beams=len(below)) as span:
            size = None if self._target.has_next_pass else self._sizer.size(below)
            plan = Plan.empty(below) if size is None else await self._sized(below, size)
            span.set(nodes=len(plan.node))
        return plan

    async def _sized(self, below: Beams, size: PlanSize) -> Plan:
        usage = self._draft.usage
        answered, waited = len(usage.costs), usage.wait_ns
        plan = await self._draft.plan(below, size, self._sizer.patience_seconds)
        if len(usage.costs) > answered:
            return self._sizer.cut(below, size, plan, usage.costs[-1])
        if usage.wait_ns > waited:
            self._sizer.failed(below, size, usage.wait_ns - waited)
        return plan
