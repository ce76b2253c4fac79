"""What the draft service measures beside its model: the plans."""

from __future__ import annotations

from prometheus_client import CollectorRegistry

from atspeed.observability.metrics import SIZES, WHOLE, HistogramOf
from draft_service.drafter import Drafted, DraftRequest

PLAN_NODES = HistogramOf(
    "atspeed_plan_nodes", "Nodes of a plan, by how they were chosen: top, perturbed or sample.", ("proposal",), SIZES
)
PLAN_PASSES = HistogramOf("atspeed_plan_passes", "Draft passes that a plan took.", ("proposal",), WHOLE)
METRICS = (PLAN_NODES, PLAN_PASSES)


class PlanMetrics:
    """Counts plans, in the registry of the model that makes them."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self._nodes = PLAN_NODES.build(registry)
        self._passes = PLAN_PASSES.build(registry)

    def planned(self, order: DraftRequest, drafted: Drafted) -> None:
        """A plan is made."""
        proposal = order.proposal.name.lower()
        self._nodes.labels(proposal).observe(len(drafted.plan.node))
        self._passes.labels(proposal).observe(drafted.passes)
