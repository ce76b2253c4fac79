"""What earlier requests say about the next: how well plans covered, what misses led to, when it pays to weigh one at all."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from atspeed.engine.speculation.acceptance_model import AcceptanceModel, Requirement, WorkloadKey
from atspeed.engine.speculation.latency_estimate import RemainingWorkRatio
from orchestrator.planning.model_costs import ModelCosts

_LONGEST_LULL = 32
"""Requests in a row that are not weighed."""
_OLDEST = 5.0
"""Requests that one observation stands for at most: what is rarely asked is learnt from the latest 20 at least."""


@dataclass
class SkipBackoff:
    """Requests that are not weighed, because none of those before them was worth a plan: 1, then 2, 4 ... between two that are.

    learnt: plans that had been learnt from when one was last weighed: after another one the next is weighed. passes, alone_ns:
    what was then expected of the target alone.
    """

    length: int = 0
    left: int = 0
    learnt: int = 0
    passes: float = 0.0
    alone_ns: float = 0.0

    def covers(self, learnt: int) -> bool:
        """Whether one more request need not be weighed."""
        if self.left <= 0 or learnt != self.learnt:
            return False
        self.left -= 1
        return True

    def goes_on(self, learnt: int, passes: float, alone_ns: float) -> None:
        """One was weighed, and no plan would pay."""
        self.length = self.left = min(_LONGEST_LULL, max(1, 2 * self.length))
        self.learnt, self.passes, self.alone_ns = learnt, passes, alone_ns

    def ends(self) -> None:
        """One was weighed, and a plan is expected to pay."""
        self.length = self.left = 0


class PlannerState:
    """What earlier requests say about the next.

    further: what searches went on to take, drafts included, from a level on of which beams were missing. explored_share: of the
    time of requests that no plan would speed up, what may be spent on plans all the same, so that this experience stays true.
    patience: how often the time of the target alone a plan may take.
    """

    def __init__(self, costs: ModelCosts, levels: int, max_nodes: int, explored_share: float, patience: float) -> None:
        self.costs, self.coverage, self.patience = costs, AcceptanceModel(levels, max_nodes), patience
        self.further = RemainingWorkRatio()
        self._lulls: dict[tuple[WorkloadKey, int, int, int], SkipBackoff] = defaultdict(SkipBackoff)
        self._since: Counter[tuple[WorkloadKey, int]] = Counter()
        self._explored_share, self._saved_ns, self._asked_ns = (
            explored_share / max(1, levels - 1),
            np.zeros(levels),
            np.ones(levels),
        )

    def lull(self, kind: WorkloadKey, start: int, beams: int, prompt_tokens: int) -> SkipBackoff:
        """That of requests like this one, which is counted."""
        self._since[kind, start] += 1
        return self._lulls[kind, start, beams.bit_length(), prompt_tokens.bit_length()]

    def learn(self, kind: WorkloadKey, start: int, requirements: Sequence[Requirement]) -> None:
        """What each level below a plan's beams turned out to require; of the requests before it that had no plan nobody knows."""
        self.coverage.learn(kind, start, requirements, min(_OLDEST, self._since.pop((kind, start), 1)))

    def save(self, start: int, alone_ns: float) -> None:
        """Save up of a search that goes on for so long alone."""
        self._saved_ns[start] += self._explored_share * alone_ns

    def has_saved(self, start: int) -> bool:
        """Whether it is enough to draft for the experience, by what that was last expected to take."""
        return bool(self._saved_ns[start] >= self._asked_ns[start])

    def explores(self, start: int, draft_ns: float) -> bool:
        """Whether so much was saved up, which then is spent."""
        self._asked_ns[start] = draft_ns
        if not self.has_saved(start):
            return False
        self._saved_ns[start] -= draft_ns
        return True
