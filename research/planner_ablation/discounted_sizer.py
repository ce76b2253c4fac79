"""Plan sizer that chooses the size of the least discounted mean latency."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

from atspeed.engine.ewma import Ewma
from atspeed.engine.model.pass_stats import PassStats
from atspeed.engine.search.beams import Beams
from atspeed.engine.search.mode import Mode
from atspeed.engine.search.plan import Plan, PlanSize
from atspeed.engine.search.trie import Trie
from atspeed.engine.speculation.acceptance_model import WorkloadKey
from orchestrator.planning.plan_sizer import FixedPlanSizer, PlanContext
from orchestrator.planning.planner import PlanLimits
from orchestrator.planning.usage import Usage
from orchestrator.search.memo import Memo
from research.planner_ablation.discounted_choice import DiscountedChoice
from research.planner_ablation.saturation import Saturation

# Shortest wait for a plan, 100 ms. On a crowded machine a draft call takes 16 to 20 ms (docs/log.md); this is five times that.
_MIN_PATIENCE_SECONDS = 0.1
# Plan sizes that are compared: no plan, the draft's own beams, and two, four and eight times as many nodes. The AtSpeed paper
# drafts twice as many. With half of them, a strict search missed a beam in nearly every simulated request.
SIZES = (0.0, 1.0, 2.0, 4.0, 8.0)
Clock = Callable[[], int]


class SizeStatistics:
    """Outcomes of plan sizes in earlier requests: latency and passes by workload and size, and the target's queue.

    Attributes:
        sizes: nodes for each beam and level of a plan, ascending; 0 skips the draft.
        max_nodes: most nodes of a plan.
        patience: longest wait for a plan, in times of what the target alone takes.
        clock: nanoseconds.
        saturation: whether the target is saturated.
    """

    def __init__(
        self,
        sizes: Sequence[float],
        max_nodes: int,
        explored_share: float,
        patience: float,
        clock: Clock,
    ) -> None:
        self.sizes = tuple(sizes)
        self.max_nodes = max_nodes
        self.patience = patience
        self.clock = clock
        self.saturation = Saturation()
        self._explored_share = explored_share
        self._choices: dict[WorkloadKey, DiscountedChoice] = {}
        self._passes: dict[tuple[WorkloadKey, int], Ewma] = {}

    def choice(self, workload: WorkloadKey, levels: int) -> DiscountedChoice:
        """Return the choice of a workload whose plans have so many levels. Sizes above the limit count as one."""
        if workload not in self._choices:
            own_beams = 2**workload.width * levels
            options = sum(size * own_beams < self.max_nodes for size in self.sizes[:-1]) + 1
            self._choices[workload] = DiscountedChoice(options, self._explored_share)
        return self._choices[workload]

    def passes(self, workload: WorkloadKey, option: int) -> float | None:
        """Return the mean target passes of requests with this size; None before the first one."""
        known = self._passes.get((workload, option))
        return known.value if known else None

    def learn(self, workload: WorkloadKey, option: int, costs: Sequence[PassStats]) -> None:
        """Learn from the target passes of a request."""
        self._passes.setdefault((workload, option), Ewma(0.0)).add(len(costs))
        # The first pass reads the prompt. Passes of a request with a plan may hold planned nodes.
        self.saturation.learn(workload.width, costs, () if option else costs[1:])


class DiscountedPlanner:
    """Maker of these plan sizers, in place of the product's `Planner`.

    Args:
        sizes: nodes for each beam and level; 0 skips the draft.
    """

    def __init__(self, trie: Trie, sizes: Sequence[float], clock: Clock) -> None:
        limits = PlanLimits()
        self._trie = trie
        self._statistics = SizeStatistics(sizes, limits.max_nodes, limits.explored_share, limits.patience, clock)

    def sizer(self, mode: Mode, context: PlanContext) -> FixedPlanSizer:
        """Return the plan sizer of a request."""
        return DiscountedPlanSizer(self._trie, context, mode, self._statistics)


class DiscountedPlanSizer(FixedPlanSizer):
    """Plan sizer that chooses the size whose requests were the fastest. A request has one size for all its plans."""

    def __init__(self, trie: Trie, context: PlanContext, mode: Mode, statistics: SizeStatistics) -> None:
        super().__init__(trie, context, 0, None)
        self._workload = WorkloadKey.of(mode, context.beam_widths)
        self._statistics = statistics
        self._choice = statistics.choice(self._workload, trie.levels - 1)
        self._is_saturated = statistics.saturation(self._workload.width)
        self._option: int | None = None
        self._begun_ns = 0
        self._was_called = False

    def size(self, below: Beams) -> PlanSize | None:
        """Return the chosen size; None to skip the draft, which is the choice while the target is saturated."""
        start = self._start(below)
        self._known.update(below.node.tolist())
        if self._option is None:
            self._option = self._choose()
        beams = len(below) if start else self._context.beam_width  # after a miss, an earlier plan holds the other beams
        nodes = math.ceil(self._statistics.sizes[self._option] * beams * (self._trie.levels - 1 - start))
        return self._asked(min(nodes, self._statistics.max_nodes)) if nodes else None

    def cut(self, below: Beams, asked: PlanSize, plan: Plan, cost: PassStats) -> Plan:
        """Return the whole plan."""
        self._was_called = True
        return super().cut(below, asked, plan, cost)

    def failed(self, below: Beams, asked: PlanSize, waited_ns: int) -> None:
        """Note that the draft was called: the wait is a cost of the size."""
        self._was_called = True
        super().failed(below, asked, waited_ns)

    def learn(self, memo: Memo, target: Usage, draft: Usage) -> None:
        """Learn how long the request took since the choice. A draft that could not be called says nothing about a size."""
        super().learn(memo, target, draft)
        if self._option is None or not target.clean or not target.costs or (self._option and not self._was_called):
            return
        self._statistics.learn(self._workload, self._option, target.costs)
        if not self._is_saturated:
            # Prompt tokens that the target has to compute explain most of the difference between requests.
            computed = max(0, self._context.prompt_tokens - target.costs[0].cached_tokens)
            self._choice.learn(self._option, self._statistics.clock() - self._begun_ns, computed)

    def _choose(self) -> int:
        option = 0 if self._is_saturated else self._choice.choose()
        self._begun_ns = self._statistics.clock()
        self.report.expected_passes = self._statistics.passes(self._workload, option)
        self.report.expected_ns = None if self._is_saturated else self._choice.mean(option)
        if (alone_ns := self._choice.mean(0)) is not None:
            self.patience_seconds = max(_MIN_PATIENCE_SECONDS, self._statistics.patience * alone_ns / 1e9)
        return option
