"""Plans of a draft with heads: one pass over the prompt, and a product per level."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from atspeed.engine.arrays import Float32, Int64
from atspeed.engine.bundle.manifest import MANIFEST
from atspeed.engine.errors import BundleError
from atspeed.engine.model.level_heads import LevelHeadsDecoder
from atspeed.engine.model.tree_evaluator import TreeEvaluator
from atspeed.engine.model.tree_session import PassProgram, Selection, TreeSession
from atspeed.engine.search.plan import Plan
from atspeed.engine.search.scoring import Evaluation, ScoringRule, best_children
from atspeed.engine.search.trie import ROOT, Trie
from draft_service.drafter import Drafted, DraftRequest
from draft_service.plan_growth import PlanGrowth, PlanRules


class LevelHeadsDrafter:
    """Proposes nodes by beam search with the heads of a draft, which read its state after the prompt.

    Raises BundleError, naming the field, when the model has no heads, heads of other codes than the catalogue's, or
    heads whose scores are not finite.
    """

    def __init__(self, evaluator: TreeEvaluator) -> None:
        decoder, trie = evaluator.decoder, evaluator.trie
        if not isinstance(decoder, LevelHeadsDecoder):
            raise BundleError(f"{MANIFEST}: draft.heads: run on the host only; set kv_paged to never")
        decoder.check_codes(trie.codebook_sizes[1:])
        decoder.check_finite(trie.codebook_sizes)  # probes of the model's health make passes of the decoder alone
        self._evaluator = evaluator
        self._heads = HeadsEvaluation(trie, evaluator.rule, decoder.score)
        self._rules = PlanRules.of(evaluator)

    async def plan(self, request: DraftRequest) -> Drafted:
        """Make a plan, by one draft pass. Raises PromptError for a prompt that does not fit, OverloadedError when busy."""
        growth, selection = self._rules.growth(request), self._rules.selection(request)
        tree = await self._evaluator.open(request.prompt, tenant=request.tenant, user_key=request.user_key)
        try:
            steps = self._steps(tree, growth, selection)
            plan, cost = await self._evaluator.run_steps(tree, steps, selection)
        finally:
            self._evaluator.end(tree)
        return Drafted(plan, cost, min(1, growth.passes))

    def _steps(self, tree: TreeSession, growth: PlanGrowth, selection: Selection) -> PassProgram[Plan]:
        """Yield the root, if any node is asked for, and evaluate all other nodes with the heads. Returns the plan."""
        steps = growth.steps()
        try:
            nodes = next(steps)
            root = yield np.array([ROOT])
            while True:
                if tree.state is None:
                    raise RuntimeError("the first pass gave no state")
                nodes = steps.send(self._heads.of(tree.state, nodes, root, selection))
        except StopIteration as end:
            plan: Plan = end.value
            return plan


@dataclass(frozen=True)
class HeadsEvaluation:
    """Evaluation of nodes below the root by heads.

    Attributes:
        trie: the catalogue's trie.
        rule: the scoring rule.
        score: scores the codes below paths of one length, see `LevelHeadsDecoder.score`.
    """

    trie: Trie
    rule: ScoringRule
    score: Callable[[Float32, Int64], tuple[Float32, Float32]]

    def of(self, state: Float32, nodes: Int64, root: Evaluation, selection: Selection) -> Evaluation:
        """Evaluate ascending nodes. The root, which can only be the first, is evaluated already."""
        # Nodes of one depth follow each other.
        spans = np.searchsorted(nodes, self.trie.level_start[: self.trie.levels + 1])
        parts = [root] if nodes[0] == ROOT else []
        for level, (start, end) in enumerate(pairwise(spans.tolist())):
            if level and start < end:
                parts.append(self._level(state, level, nodes[start:end], selection))
        return Evaluation.joined(parts)

    def _level(self, state: Float32, level: int, nodes: Int64, selection: Selection) -> Evaluation:
        """Evaluate the nodes of one depth."""
        scores, log_normalizer = self.score(state, path_columns(self.trie, nodes, level))
        logits = np.zeros((len(nodes), self.trie.columns), dtype=np.float32)
        first = int(self.trie.codebook_offset[level])
        logits[:, first : first + scores.shape[1]] = scores
        return best_children(
            self.trie,
            nodes,
            logits,
            log_normalizer,
            rule=self.rule,
            pruning=selection.pruning,
            limit=selection.limit,
            perturbation=selection.perturbation,
        )


def path_columns(trie: Trie, nodes: Int64, depth: int) -> Int64:
    """Return the code columns of nodes of one depth from the root down, int64 [n, depth]."""
    columns = np.empty((len(nodes), depth), dtype=np.int64)
    for level in range(depth - 1, -1, -1):
        columns[:, level] = trie.column(nodes)
        nodes = trie.parent[nodes].astype(np.int64)
    return columns
