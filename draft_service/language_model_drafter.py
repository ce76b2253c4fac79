"""Plans of a language model: beam search with one draft pass per level."""

from __future__ import annotations

from atspeed.engine.model.tree_evaluator import TreeEvaluator
from draft_service.drafter import Drafted, DraftRequest
from draft_service.plan_growth import PlanRules


class LanguageModelDrafter:
    """Proposes nodes by beam search with a language model."""

    def __init__(self, evaluator: TreeEvaluator) -> None:
        self._evaluator = evaluator
        self._rules = PlanRules.of(evaluator)

    async def plan(self, request: DraftRequest) -> Drafted:
        """Make a plan, by one draft pass for each planned level. A pass evaluates the plan's nodes of the level above.

        Raises PromptError or CapacityError for a prompt or beams that do not fit the model, OverloadedError when it is busy.
        """
        growth = self._rules.growth(request)
        tree = await self._evaluator.open(request.prompt, tenant=request.tenant, user_key=request.user_key)
        try:
            plan, cost = await self._evaluator.run_steps(tree, growth.steps(), self._rules.selection(request))
        finally:
            self._evaluator.end(tree)
        return Drafted(plan, cost, growth.passes)
