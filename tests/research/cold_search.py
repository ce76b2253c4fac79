"""Cold search, the oracle of `research acceptance`."""

from __future__ import annotations

from dataclasses import dataclass

from atspeed.benchmarks.histories import prompt_tokens
from atspeed.engine.model.tree_session import Selection
from atspeed.engine.search.beams import Beams
from atspeed.engine.search.plan import Plan, PlanSize, Proposal
from atspeed.engine.search.trie import Pruning
from draft_service.drafter import DraftRequest
from draft_service.language_model_drafter import LanguageModelDrafter
from orchestrator.planning.sized_draft import NoDraft
from orchestrator.search.beam_loop import SearchResult, beam_search
from orchestrator.search.policies import Policy
from research.eval_examples import HeldOutCase
from tests.oracles.models import ModelDraft, Models, ModelTarget


@dataclass(frozen=True)
class Cold:
    """One search with models that know nothing yet, and what it took."""

    result: SearchResult
    draft_passes: int

    @property
    def passes(self) -> int:
        return self.result.memo.passes


async def cold_search(models: Models, case: HeldOutCase, policy: Policy, size: PlanSize | None) -> Cold:
    """The loop over fresh evaluators, as the tests of the drafter run it."""
    target, draft = models.evaluator("target"), models.evaluator("draft")
    bundle, noise = models.bundle.bundle, policy.noise
    prompt = prompt_tokens(models.catalogue, bundle.manifest.target, case.history)
    limit = policy.max_children or max(models.catalogue.trie.codebook_sizes)
    asked = ModelTarget(target, prompt, Selection(Pruning.none(), limit, noise if policy.perturbed else None))
    trie = models.catalogue.trie
    if size is None:
        result = await beam_search(trie, models.rule, policy, asked, NoDraft())
        passes = 0
    else:
        sample = policy.proposal is Proposal.SAMPLE
        order = DraftRequest(prompt, Beams.root(), size, policy.proposal, Pruning.none(), noise, with_evaluation=sample)
        drafting = CountingDraft(LanguageModelDrafter(draft), trie, order)
        result = await beam_search(trie, models.rule, policy, asked, drafting)
        passes = drafting.passes
    await target.close()
    await draft.close()
    return Cold(result, passes)


@dataclass
class CountingDraft(ModelDraft):
    """Knows that the draft takes a pass for each level below its beams down to the last that is planned."""

    passes: int = 0

    async def plan(self, below: Beams) -> Plan:
        self.passes += self.trie.levels - 1 - int(self.trie.depth(below.node[:1])[0])
        return await super().plan(below)
