"""The draft as the loop sees it: behind the planning of its request, or none."""

from __future__ import annotations

from typing import Protocol

from atspeed.engine.search.beams import Beams
from atspeed.engine.search.plan import Plan, PlanSize
from orchestrator.planning.plan_sizer import FixedPlanSizer
from orchestrator.planning.usage import Usage


class NoDraft:
    """Plans nothing: target-only beam search."""

    def __init__(self) -> None:
        self.usage = Usage()

    async def plan(self, below: Beams) -> Plan:
        """An empty plan."""
        return Plan.empty(below)


class SizedDraft(Protocol):
    """A draft that is told how much to plan; see `draft_client.DraftSession`."""

    @property
    def usage(self) -> Usage:
        """What its calls took."""

    async def plan(self, below: Beams, size: PlanSize, seconds: float) -> Plan:
        """At most so much below these beams, in so many seconds; an empty plan where it fails."""


class PlannedDraft:
    """The draft as the loop sees it: asked as far as that is expected to pay, and cut to what does."""

    def __init__(self, draft: SizedDraft, planning: FixedPlanSizer) -> None:
        self._draft, self._planning = draft, planning

    @property
    def usage(self) -> Usage:
        """What the draft's calls took."""
        return self._draft.usage

    async def plan(self, below: Beams) -> Plan:
        """A plan below these beams, or none."""
        size = self._planning.size(below)
        if size is None:
            return Plan.empty(below)
        usage = self._draft.usage
        answered, waited = len(usage.costs), usage.wait_ns
        plan = await self._draft.plan(below, size, self._planning.patience_seconds)
        if len(usage.costs) > answered:
            return self._planning.cut(below, size, plan, usage.costs[-1])
        if usage.wait_ns > waited:
            self._planning.failed(below, size, usage.wait_ns - waited)
        return plan
