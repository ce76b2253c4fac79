"""How much to draft: who plans a request, and the draft as the loop sees it, behind that plan."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from typing import Protocol

from engine.beams import Beams
from engine.cost_curve import CostCurve
from engine.plan import Plan, PlanSize
from engine.trie import Trie
from orchestrator.adaptive import AdaptivePlanning, Experience
from orchestrator.costs import CallCosts
from orchestrator.coverage import Kind
from orchestrator.planning import ModelCosts, Planning, Task
from orchestrator.question import Usage
from orchestrator.recommendation import Mode


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
        self._experience: Experience | None = None

    def measure_by(self, target: CostCurve, draft: CostCurve) -> None:
        """What passes of the two models cost. Asked again, the curves are replaced, and all that was learnt is kept."""
        if self._experience is not None:
            costs = self._experience.costs
            costs.target.curve, costs.draft.curve = target, draft
            return
        costs, limits = ModelCosts(CallCosts(target), CallCosts(draft)), self._limits
        levels = self._trie.levels
        self._experience = Experience(costs, levels, limits.max_nodes, limits.explored_share, limits.patience)

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

    def planning(self, mode: Mode, task: Task) -> Planning:
        """The planning of one request. A sample cannot be cut to its best, so its size is always the fixed one."""
        nodes, experience = self.fixed_nodes(task.beam_width), self._experience
        fixed = self._limits.kind is PlannerKind.FIXED or mode in {Mode.TARGET_ONLY, Mode.RELAXED_SAMPLING}
        if experience is None or fixed or self._trie.levels == 1:
            return Planning(self._trie, task, nodes, experience.costs if experience else None)
        kind, most = Kind.of(mode, task.beam_width), self._limits.max_nodes
        return AdaptivePlanning(self._trie, task, nodes, most, kind, experience)


class SizedDraft(Protocol):
    """A draft that is told how much to plan; see `draft_client.DraftSession`."""

    @property
    def usage(self) -> Usage:
        """What its calls took."""

    async def plan(self, below: Beams, size: PlanSize, seconds: float) -> Plan:
        """At most so much below these beams, in so many seconds; an empty plan where it fails."""


class PlannedDraft:
    """The draft as the loop sees it: asked as far as that is expected to pay, and cut to what does."""

    def __init__(self, draft: SizedDraft, planning: Planning) -> None:
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
