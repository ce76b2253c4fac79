"""Estimates of the planner that outlive a request."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from atspeed.engine.ewma import Ewma
from atspeed.engine.model.cost_curve import CostCurve
from atspeed.engine.speculation.acceptance_model import AcceptanceModel, RequiredDepth, WorkloadKey
from atspeed.engine.speculation.latency_estimate import RemainingWorkRatio
from atspeed.engine.speculation.latency_model import LatencyModel
from orchestrator.planning.plan_passes import PlanPasses

# Most requests in a row that are not evaluated. To evaluate a level costs 0.5 ms (docs/log.md): once in 33 requests, 0.015 ms.
_MAX_SKIPS = 32
# Most requests that one plan stands for, so that rare plans are averaged over at least 20 (`ewma.MEMORY` / 5).
_MAX_AGE = 5.0


class ModelLatencies:
    """Latency of both models, and the share of a prompt that each computes because it is not cached.

    Attributes:
        target: the target's latency.
        draft: the draft's latency.
        plan_passes: passes of the draft for a plan.
        target_computed_share: mean share for the target. True: requests that found part of the draft's prompt cached.
            False: requests that did not. None: all requests.
        draft_computed_share: mean share for the draft.
    """

    def __init__(self, target: CostCurve, draft: CostCurve, plan_passes: PlanPasses) -> None:
        self.target = LatencyModel(target)
        self.draft = LatencyModel(draft, node_costs=plan_passes.one)
        self.plan_passes = plan_passes
        self.target_computed_share: dict[bool | None, Ewma] = {key: Ewma(1.0) for key in (None, False, True)}
        self.draft_computed_share = Ewma(1.0)


@dataclass
class SkipBackoff:
    """Exponential backoff of requests that are not evaluated while no plan pays: 1, then 2, 4 ... between two that are.

    Attributes:
        length: requests to skip after the latest evaluation.
        remaining: requests still to skip.
        observations: plans learned from at the latest evaluation; after a further one the next request is evaluated.
        passes: passes expected of the target alone at the latest evaluation.
        target_only_ns: their expected time.
    """

    length: int = 0
    remaining: int = 0
    observations: int = 0
    passes: float = 0.0
    target_only_ns: float = 0.0

    def consume(self, observations: int) -> bool:
        """Return true if one more request is skipped, and count it."""
        if self.remaining <= 0 or observations != self.observations:
            return False
        self.remaining -= 1
        return True

    def extend(self, observations: int, passes: float, target_only_ns: float) -> None:
        """Double the backoff after an evaluation that found no plan worth its time."""
        self.length = min(_MAX_SKIPS, max(1, 2 * self.length))
        self.remaining = self.length
        self.observations = observations
        self.passes = passes
        self.target_only_ns = target_only_ns

    def reset(self) -> None:
        """End the backoff after an evaluation that found a plan worth its time."""
        self.length = 0
        self.remaining = 0


class PlannerState:
    """Estimates that all requests of a pair of models share.

    Exploration has a budget for each start level: a share of the time of requests that no plan would speed up. It is spent on
    plans all the same, so that a draft that becomes useful is noticed.

    Attributes:
        latencies: both models' latency.
        acceptance: how likely plans cover each level.
        remaining_work: how long searches go on after a miss, draft calls included.
        patience: longest wait for a plan, in times of what the target alone would take.
    """

    def __init__(
        self, latencies: ModelLatencies, levels: int, max_nodes: int, explored_share: float, patience: float
    ) -> None:
        self.latencies = latencies
        self.acceptance = AcceptanceModel(levels, max_nodes)
        self.remaining_work = RemainingWorkRatio()
        self.patience = patience
        self._backoffs: dict[tuple[WorkloadKey, int, int, int], SkipBackoff] = defaultdict(SkipBackoff)
        self._requests_since_plan: Counter[tuple[WorkloadKey, int]] = Counter()
        # Each start level has an equal share of the exploration budget.
        self._explored_share = explored_share / max(1, levels - 1)
        self._budget_ns = np.zeros(levels)  # saved so far
        # Draft time of the latest exploration plan. 1 ns before the first: any budget lets the sizer compute the real one.
        self._price_ns = np.ones(levels)

    def backoff(self, workload: WorkloadKey, start: int, beams: int, prompt_tokens: int) -> SkipBackoff:
        """Return the backoff of requests like this one, and count the request."""
        self._requests_since_plan[workload, start] += 1
        return self._backoffs[workload, start, beams.bit_length(), prompt_tokens.bit_length()]

    def learn(self, workload: WorkloadKey, start: int, required: Sequence[RequiredDepth]) -> None:
        """Learn the required depths of the levels below a plan's beams. The plan stands for the requests since the last one."""
        age = min(_MAX_AGE, self._requests_since_plan.pop((workload, start), 1))
        self.acceptance.learn(workload, start, required, age)

    def save_budget(self, start: int, target_only_ns: float) -> None:
        """Add to the exploration budget for a search that the target alone finishes in so long."""
        self._budget_ns[start] += self._explored_share * target_only_ns

    def has_budget(self, start: int) -> bool:
        """Return true if the budget allows a plan at the latest price."""
        return bool(self._budget_ns[start] >= self._price_ns[start])

    def spend_budget(self, start: int, draft_ns: float) -> bool:
        """Return true if the budget allows a plan at this price, and spend it."""
        self._price_ns[start] = draft_ns
        if not self.has_budget(start):
            return False
        self._budget_ns[start] -= draft_ns
        return True
