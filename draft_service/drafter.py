"""The interface of all kinds of drafts: requests, plans and their cost."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from atspeed.engine.arrays import Int64
from atspeed.engine.kv.memory_cache import NO_USER_KEY
from atspeed.engine.model.pass_stats import PassStats
from atspeed.engine.search.beams import Beams
from atspeed.engine.search.plan import Plan, PlanSize, Proposal
from atspeed.engine.search.scoring import Perturbation
from atspeed.engine.search.trie import Pruning


@dataclass(frozen=True)
class DraftRequest:
    """The request for a plan.

    Attributes:
        prompt: int64 [prompt], in the draft's vocabulary.
        below: beams of one depth, under which nodes are proposed.
        size: size of the plan.
        proposal: rule by which nodes are chosen.
        pruning: nodes that must not be proposed.
        noise: seed and temperature, for the proposals PERTURBED and SAMPLE.
        with_evaluation: True to return the draft's log-probabilities too.
        tenant: tenant of the cached KV.
        user_key: user key of the cached KV.
    """

    prompt: Int64
    below: Beams
    size: PlanSize
    proposal: Proposal
    pruning: Pruning
    noise: Perturbation | None = None
    with_evaluation: bool = False
    tenant: str = ""
    user_key: bytes = NO_USER_KEY


@dataclass(frozen=True)
class Drafted:
    """A plan and its cost.

    Attributes:
        plan: the plan.
        cost: pass stats of the draft, summed.
        passes: number of draft passes.
    """

    plan: Plan
    cost: PassStats
    passes: int


class Drafter(Protocol):
    """Proposes the nodes that the target's search will probably need."""

    async def plan(self, request: DraftRequest) -> Drafted:
        """Make a plan. Raises PromptError or CapacityError for a request that does not fit, OverloadedError when busy."""
