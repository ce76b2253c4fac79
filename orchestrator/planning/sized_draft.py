"""The draft as the loop sees it: a request's plan sizer in front of its draft."""

from __future__ import annotations

from typing import Protocol

from atspeed.engine.search.beams import Beams
from atspeed.engine.search.plan import Plan, PlanSize
from atspeed.observability import tracing
from orchestrator.degraded_reason import DegradedReason
from orchestrator.planning.plan_sizer import FixedPlanSizer
from orchestrator.planning.usage import Usage


class DraftSource(Protocol):
    """Source of the plans of one request: the interface that another kind of draft implements.

    `draft_client.DraftSession` is the one in use: a language model behind gRPC. A draft without a model, like a table of
    prefixes, needs this interface only. A source proposes nodes and decides nothing: the target evaluates every node, and the
    verification policy chooses the beams. So a bad source costs time, but it never changes a strict list.

    The loop calls `SizedDraft.plan`, which asks the plan sizer for a size, the source for a plan of that size, and the sizer
    again for the part of the plan that pays.
    """

    @property
    def prompt_tokens(self) -> int:
        """Return the number of tokens that the source reads before its first plan; the sizer predicts its time with it."""

    @property
    def usage(self) -> Usage:
        """Return the stats of its calls. Every plan that was returned adds one entry to `costs` and one to `waits`."""

    @property
    def degraded_reason(self) -> DegradedReason | None:
        """Return why the source failed; None if it did not."""

    async def plan(self, below: Beams, size: PlanSize, seconds: float) -> Plan:
        """Return a plan of at most this size below these beams, within this time; an empty plan after a failure.

        Raises DeadlineExceededError when the request's own time is up, and nothing else.
        """


class TargetState(Protocol):
    """The part of a target that decides whether a plan is needed; see `model_clients.interfaces.RequestTarget`."""

    @property
    def has_next_pass(self) -> bool:
        """Return whether the target has made the next pass already."""


class RequestDraft(Protocol):
    """The draft for one request, sized: what the loop and the reply need of it."""

    @property
    def usage(self) -> Usage:
        """Return the costs of the draft's calls."""

    @property
    def degraded_reason(self) -> DegradedReason | None:
        """Return why the draft failed; None if it did not."""

    async def plan(self, below: Beams) -> Plan:
        """Return a plan below these beams; see `beam_loop.Draft`."""


class NoDraft:
    """A draft that proposes nothing: the search is plain beam search.

    Attributes:
        usage: empty.
        degraded_reason: always None.
    """

    def __init__(self) -> None:
        self.usage = Usage()
        self.degraded_reason: DegradedReason | None = None

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

    @property
    def degraded_reason(self) -> DegradedReason | None:
        """Return why the draft failed; None if it did not."""
        return self._draft.degraded_reason

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
