"""Session of one request: prompts, verification policy, target and draft."""

from __future__ import annotations

import secrets
from contextlib import closing
from dataclasses import dataclass, replace

import numpy as np

from atspeed.concurrency.deadline import Deadline
from atspeed.engine.arrays import Int64
from atspeed.engine.bundle.catalogue import Catalogue
from atspeed.engine.bundle.prompts import Prompts
from atspeed.engine.search.beams import Beams
from atspeed.engine.search.scoring import Perturbation, ScoringRule
from atspeed.engine.search.trie import Pruning, Trie
from orchestrator.degraded_reason import DegradedReason
from orchestrator.model_clients.interfaces import RequestTarget
from orchestrator.model_clients.model_request import ModelRequest, PlanUnansweredError
from orchestrator.planning.plan_sizer import FixedPlanSizer
from orchestrator.planning.sized_draft import NoDraft, RequestDraft
from orchestrator.recommendation import RecommendParams, StageTimes, SubjectHistory
from orchestrator.search.beam_loop import SearchResult, beam_search
from orchestrator.search.memo import Memo
from orchestrator.search.policies import POLICIES, Policy
from orchestrator.user_key import FIRST_ITEMS, digest


@dataclass(frozen=True)
class Candidates:
    """Items that a request may recommend.

    Attributes:
        excluded: item indices.
        allowed: item indices; None for all items.
        pruning: the trie nodes that the search leaves out for these items.
        unknown_excluded: number of the request's excluded ids that the catalogue does not know.
        unknown_allowed: number of the request's allowed ids that the catalogue does not know.
    """

    excluded: frozenset[int]
    allowed: frozenset[int] | None
    pruning: Pruning
    unknown_excluded: int
    unknown_allowed: int

    def __contains__(self, item: int) -> bool:
        return item not in self.excluded and (self.allowed is None or item in self.allowed)


@dataclass(frozen=True)
class PromptBuilder:
    """Builder of both models' requests: each model has its own vocabulary and window.

    Attributes:
        noise: seed and temperature of a sampling mode, else None.
        policy: the verification policy.
    """

    catalogue: Catalogue
    params: RecommendParams
    history: SubjectHistory
    candidates: Candidates
    deadline: Deadline
    noise: Perturbation | None
    policy: Policy

    @staticmethod
    def of(
        catalogue: Catalogue,
        params: RecommendParams,
        history: SubjectHistory,
        candidates: Candidates,
        deadline: Deadline,
    ) -> PromptBuilder:
        """Return the builder of a request. A sampling mode without a seed gets a fresh one."""
        noise = None
        if params.mode.samples:
            # 63 bits: the seed is not negative and travels in an int64.
            seed = params.seed if params.seed is not None else secrets.randbits(63)
            noise = Perturbation(seed, params.temperature)
        policy = POLICIES[params.mode](params.beam_widths, params.tolerance, noise)
        return PromptBuilder(catalogue, params, history, candidates, deadline, noise, policy)

    def unpruned(self) -> PromptBuilder:
        """Return the builder for the same prompts, and for every item."""
        return replace(self, candidates=replace(self.candidates, pruning=Pruning.none()))

    def window(self, model: Prompts) -> Int64:
        """Return the history items in a model's prompt: int64 [n], oldest first."""
        return model.window(self.history.known)

    def target_request(self, model: Prompts) -> ModelRequest:
        """Return the target's request. The target gets the noise only if the policy perturbs its choice of children."""
        return self._request(model, self.noise if self.policy.perturbed else None)

    def draft_request(self, model: Prompts) -> ModelRequest:
        """Return the draft's request."""
        return self._request(model, self.noise)

    def _request(self, model: Prompts, noise: Perturbation | None) -> ModelRequest:
        window, params = self.window(model), self.params
        user_key = params.user_key
        # Prompts of histories in requests are told apart by the first items of the window, which stay while the window stands.
        affinity = user_key or digest(params.tenant, *map(str, window[:FIRST_ITEMS].tolist()))
        return ModelRequest(
            prompt=model.tokens(self.history.known, params.user_fields),
            pruning=self.candidates.pruning,
            deadline=self.deadline,
            noise=noise,
            tenant=params.tenant,
            affinity=affinity.hex(),
            user_key=user_key,
            priority=params.priority,
        )


@dataclass(frozen=True)
class RequestSession:
    """Policy, models and plan sizer of one request.

    Attributes:
        prompts: the builder of the models' requests.
        target: the target for the request.
        draft: the sized draft, or none.
        sizer: the plan sizer.
        prompt_tokens: length of the target's prompt.
        speculation_disabled: whether the request does without the draft because shadow checks disabled speculation.
    """

    prompts: PromptBuilder
    target: RequestTarget
    draft: RequestDraft
    sizer: FixedPlanSizer
    prompt_tokens: int
    speculation_disabled: bool

    async def search(self, trie: Trie, rule: ScoringRule) -> tuple[SearchResult, DegradedReason | None]:
        """Search with the draft's plans. If the target cannot answer a plan, search again without plans, and say so.

        So a plan never decides whether there is a list. The target is closed afterwards.
        """
        if self.prompts.candidates.pruning.empties_catalogue:
            return SearchResult(Beams.root().take(np.empty(0, dtype=np.int64)), Memo(trie, rule)), None
        policy = self.prompts.policy
        with closing(self.target):
            try:
                return await beam_search(trie, rule, policy, self.target, self.draft), None
            except PlanUnansweredError:
                plain = await beam_search(trie, rule, policy, self.target, NoDraft())
                return plain, DegradedReason.PLAN_UNANSWERED

    def learn(self, memo: Memo) -> None:
        """Let the planner learn from the finished search."""
        self.sizer.learn(memo, self.target.usage, self.draft.usage)

    def degraded_reasons(self, search: DegradedReason | None) -> list[DegradedReason]:
        """Return all reasons why the list is degraded. search: the reason that the search returned."""
        narrowed = self.prompts.params.requested_beam_widths is not None
        reasons = [
            DegradedReason.BEAM_WIDTH_NARROWED if narrowed else None,
            DegradedReason.SPECULATION_DISABLED if self.speculation_disabled else None,
            self.draft.degraded_reason,
            search,
        ]
        return [reason for reason in reasons if reason is not None]

    def stage_times(self, started_ns: int, searched_ns: int, ended_ns: int) -> StageTimes:
        """Return the stages' times from readings of the clock: start, start of the search, end."""
        return StageTimes(
            history_ns=searched_ns - started_ns,
            selection_ns=ended_ns - searched_ns - self.target.usage.wait_ns - self.draft.usage.wait_ns,
            total_ns=ended_ns - started_ns,
        )
