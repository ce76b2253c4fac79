"""Who plans: one planner for all requests of a bundle, a planning of its own for each of them."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

from atspeed.engine.model.cost_curve import CostCurve
from atspeed.engine.search.mode import Mode
from atspeed.engine.search.trie import Trie
from atspeed.engine.speculation.acceptance_model import WorkloadKey
from atspeed.engine.speculation.latency_model import LatencyModel
from orchestrator.planning.adaptive_sizer import AdaptivePlanSizer
from orchestrator.planning.model_costs import ModelCosts
from orchestrator.planning.plan_sizer import FixedPlanSizer, PlanContext
from orchestrator.planning.planner_state import PlannerState


class PlannerKind(StrEnum):
    """Whether plans are of the size that is expected to pay, or of a fixed one."""

    ADAPTIVE = "adaptive"
    FIXED = "fixed"


@dataclass(frozen=True)
class PlanLimits:
    """The planner's settings.

    nodes_per_beam: nodes of a fixed plan for each beam of each level 1..L-1; the AtSpeed paper drafts N = 2K per level.
    max_nodes: most nodes of a plan. explored_share: of the time of requests that no plan would speed up, what may be spent
    on plans all the same. patience: how often the time that the target alone is expected to take a plan may take.
    """

    kind: PlannerKind = PlannerKind.ADAPTIVE
    nodes_per_beam: float = 2.0
    max_nodes: int = 240
    explored_share: float = 0.01
    patience: float = 4.0


class Planner:
    """Plans requests, and learns from each. Until both models' curves are known its plans are of a fixed size."""

    def __init__(self, trie: Trie, limits: PlanLimits) -> None:
        self._trie, self._limits = trie, limits
        self._experience: PlannerState | None = None

    def measure_by(self, target: CostCurve, draft: CostCurve) -> None:
        """What passes of the two models cost. Asked again, the curves are replaced, and all that was learnt is kept."""
        if self._experience is not None:
            costs = self._experience.costs
            costs.target.curve, costs.draft.curve = target, draft
            return
        costs, limits = ModelCosts(LatencyModel(target), LatencyModel(draft)), self._limits
        levels = self._trie.levels
        self._experience = PlannerState(costs, levels, limits.max_nodes, limits.explored_share, limits.patience)

    def over(self, trie: Trie) -> Planner:
        """A planner for another catalogue under the same models, with the same experience."""
        other = Planner(trie, self._limits)
        if trie.levels == self._trie.levels:
            other._experience = self._experience
        return other

    def fixed_nodes(self, beam_width: int) -> int:
        """Nodes of a plan of fixed size."""
        nodes = round(self._limits.nodes_per_beam * beam_width * (self._trie.levels - 1))
        return min(self._limits.max_nodes, max(1, nodes))

    def planning(self, mode: Mode, task: PlanContext) -> FixedPlanSizer:
        """The planning of one request. A sample cannot be cut to its best, so its size is always the fixed one."""
        nodes, experience = self.fixed_nodes(task.beam_width), self._experience
        fixed = self._limits.kind is PlannerKind.FIXED or not mode.properties.sized
        if experience is None or fixed or self._trie.levels == 1:
            return FixedPlanSizer(self._trie, task, nodes, experience.costs if experience else None)
        kind, most = WorkloadKey.of(mode, task.beam_width), self._limits.max_nodes
        return AdaptivePlanSizer(self._trie, task, nodes, most, kind, experience)
