"""Metrics of the draft service: its plans."""

from __future__ import annotations

from prometheus_client import CollectorRegistry

from atspeed.observability.metrics import SIZES, WHOLE, HistogramOf
from draft_service.drafter import Drafted, DraftRequest

PLAN_NODES = HistogramOf(
    "atspeed_plan_nodes", "Nodes of a plan, by proposal: top, perturbed or sample.", ("proposal",), SIZES
)
PLAN_PASSES = HistogramOf("atspeed_plan_passes", "Draft passes of a plan.", ("proposal",), WHOLE)
METRICS = (PLAN_NODES, PLAN_PASSES)


class PlanMetrics:
    """Counts plans, in the registry of the model's metrics."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self._nodes = PLAN_NODES.build(registry)
        self._passes = PLAN_PASSES.build(registry)

    def planned(self, request: DraftRequest, drafted: Drafted) -> None:
        """Count a plan."""
        proposal = request.proposal.name.lower()
        self._nodes.labels(proposal).observe(len(drafted.plan.node))
        self._passes.labels(proposal).observe(drafted.passes)
