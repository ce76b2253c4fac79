"""One user's searches under every configuration, in this process: the orchestrator's loop over warm models.

Two warm targets: one answers the searches without a draft, one those with. So the lists that are compared come from passes of
different shapes, as they do in serving.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from enum import StrEnum
from functools import lru_cache
from itertools import islice
from pathlib import Path

from atspeed.benchmarks.eval_examples import HeldOutCase, Quality, quality
from atspeed.benchmarks.shared_tree_models import (
    TEMPERATURE,
    SharedTreeEvaluator,
    WarmDraft,
    WarmTarget,
    load_decoder_of,
    prefix_cache,
    prompt_tokens,
    warm_evaluator,
)
from atspeed.engine.bundle.catalogue import Catalogue
from atspeed.engine.bundle.manifest import Bundle
from atspeed.engine.model.tree_session import Selection
from atspeed.engine.search.beams import Beams
from atspeed.engine.search.list_comparison import RankedList, Verdict, compare
from atspeed.engine.search.mode import Mode
from atspeed.engine.search.plan import PlanSize, Proposal
from atspeed.engine.search.scoring import Perturbation
from atspeed.engine.search.trie import ROOT, Pruning
from draft_service.drafter import Drafter, DraftRequest
from orchestrator.planning.sized_draft import NoDraft
from orchestrator.search.beam_loop import SearchResult, beam_search
from orchestrator.search.policies import ExactSampling, Policy, RelaxedSampling, Strict, Tolerance

NO_DRAFT = "none"
CUTOFFS = (5, 10, 20)


class BudgetUnit(StrEnum):
    """What a budget counts."""

    BEAM_WIDTHS = "beam widths per level"
    PER_LEVEL = "nodes per level"
    IN_ALL = "nodes in all"


@dataclass(frozen=True)
class Budget:
    """How much may be planned. label: its name in results."""

    label: str
    count: int
    unit: BudgetUnit

    def size(self, k: int, levels: int) -> PlanSize:
        """The plan for K beams over a trie of so many levels; the last one's nodes are leaves and never planned."""
        if self.unit is BudgetUnit.IN_ALL:
            return PlanSize(beam_width=k, width=self.count, max_nodes=self.count)
        width = self.count * (k if self.unit is BudgetUnit.BEAM_WIDTHS else 1)
        return PlanSize(beam_width=k, width=width, max_nodes=width * max(1, levels - 1))


@dataclass(frozen=True)
class Configuration:
    """One way to search. draft: its name, or NO_DRAFT, which has no budget and is what the others are compared with."""

    draft: str
    mode: Mode
    k: int
    budget: Budget | None

    @property
    def reference(self) -> Configuration:
        """The target alone: its beam search, or for the sampling modes its stochastic beam search by the same seed."""
        return Configuration(NO_DRAFT, Mode.EXACT_SAMPLING if self.mode.samples else Mode.TARGET_ONLY, self.k, None)


@dataclass(frozen=True)
class Setup:
    """All that a worker has to know. drafts: the bundle that each named draft comes from; the target is `bundle`'s."""

    bundle: Path
    drafts: tuple[tuple[str, Path], ...]
    configurations: tuple[Configuration, ...]
    tolerance: float
    threads: int


@dataclass(frozen=True)
class Outcome:
    """One search. pass_levels: the depth of the beams that each target pass was made for, ascending.

    nodes_used: planned nodes that the search went through. beams: all inner nodes that it went through, the root apart;
    nodes_forced: those of them that are their parent's only child. verdict: against the reference's list. quality: by cutoff.
    """

    pass_levels: tuple[int, ...]
    draft_passes: int
    nodes_planned: int
    nodes_used: int
    nodes_forced: int
    beams: int
    largest_slack: float
    verdict: Verdict
    quality: Mapping[int, Quality]


def cutoffs(k: int) -> tuple[int, ...]:
    """Where lists of K items are measured: the usual places within them, and their end."""
    return tuple(sorted({k, *(cutoff for cutoff in CUTOFFS if cutoff < k)}))


def search_all(setup: Setup, cases: Sequence[HeldOutCase]) -> list[list[Outcome]]:
    """Every case under every configuration: [cases][configurations]. Loads the models once per process."""
    return asyncio.run(_opened(setup).search_all(cases))


@lru_cache(maxsize=1)
def _opened(setup: Setup) -> _Searcher:
    return _Searcher(setup)


@dataclass(frozen=True)
class _Found:
    """A search and what it took."""

    result: SearchResult
    pass_levels: tuple[int, ...]
    draft_passes: int


class _Searcher:
    """The models of a setup, loaded."""

    def __init__(self, setup: Setup) -> None:
        bundle = Bundle(setup.bundle)
        self._setup, self._entry, self._rule = setup, bundle.manifest.target, bundle.manifest.scoring_rule
        self._catalogue: Catalogue = bundle.catalogue()
        decoder, cache = load_decoder_of(bundle, "target", setup.threads), prefix_cache(self._entry)
        # Two trees, one prefix cache: the prompt's whole blocks are computed once.
        self._alone, self._speculating = (
            warm_evaluator(decoder, self._entry, self._catalogue, self._rule, cache) for _ in range(2)
        )
        self._drafts = {name: self._draft(Bundle(root)) for name, root in setup.drafts}

    def _draft(self, bundle: Bundle) -> SharedTreeEvaluator:
        decoder, entry = load_decoder_of(bundle, "draft", self._setup.threads), bundle.model("draft")
        return warm_evaluator(decoder, entry, self._catalogue, self._rule, prefix_cache(entry))

    async def search_all(self, cases: Sequence[HeldOutCase]) -> list[list[Outcome]]:
        return [await self._case(case) for case in cases]

    async def _case(self, case: HeldOutCase) -> list[Outcome]:
        """One user under every configuration, those first that ask for most: the others then find it computed."""
        asked = self._setup.configurations
        found = {
            configuration: await self._search(case, configuration)
            for configuration in sorted(asked, key=self._effort, reverse=True)
        }
        return [
            self._outcome(case, configuration, found[configuration], found[configuration.reference])
            for configuration in asked
        ]

    def _effort(self, configuration: Configuration) -> tuple[int, int]:
        budget, levels = configuration.budget, self._catalogue.trie.levels
        return configuration.k, budget.size(configuration.k, levels).max_nodes if budget else 0

    async def _search(self, case: HeldOutCase, configuration: Configuration) -> _Found:
        trie, policy = self._catalogue.trie, self._policy(configuration, case.seed)
        selection = Selection(
            Pruning.none(),
            policy.max_children or max(trie.codebook_sizes),
            policy.noise if policy.perturbed else None,
        )
        evaluator = self._alone if configuration.budget is None else self._speculating
        target = WarmTarget(evaluator, prompt_tokens(self._catalogue, self._entry, case.history), selection)
        if configuration.budget is None:
            result = await beam_search(trie, self._rule, policy, target, NoDraft())
            return _Found(result, tuple(target.pass_levels), 0)
        drafting = self._drafts[configuration.draft]
        order = DraftRequest(
            prompt=prompt_tokens(self._catalogue, drafting.entry, case.history),
            below=Beams.root(),
            size=configuration.budget.size(configuration.k, trie.levels),
            proposal=policy.proposal,
            pruning=Pruning.none(),
            noise=policy.noise,
            with_evaluation=policy.proposal is Proposal.SAMPLE,
        )
        draft = WarmDraft(Drafter(drafting), trie, order)
        result = await beam_search(trie, self._rule, policy, target, draft)
        return _Found(result, tuple(target.pass_levels), draft.passes)

    def _policy(self, configuration: Configuration, seed: int) -> Policy:
        width, noise = configuration.k, Perturbation(seed, TEMPERATURE)
        if configuration.mode is Mode.TOLERANCE:
            return Tolerance(width, self._setup.tolerance)
        if configuration.mode is Mode.EXACT_SAMPLING:
            return ExactSampling(width, noise)
        if configuration.mode is Mode.RELAXED_SAMPLING:
            return RelaxedSampling(width, noise)
        return Strict(width)

    def _outcome(self, case: HeldOutCase, configuration: Configuration, found: _Found, reference: _Found) -> Outcome:
        memo, k = found.result.memo, configuration.k
        # A sample is drawn in an order of its own; ranked by score, two samples differ by what was drawn alone.
        by_score = found.result.leaves.by_score()
        compared = [result.leaves for result in (found.result, reference.result)]
        if configuration.mode is Mode.RELAXED_SAMPLING:
            compared = [replace(leaves.by_score(), priority=leaves.by_score().score) for leaves in compared]
        lists = [self._ranked(leaves, k) for leaves in compared]
        return Outcome(
            pass_levels=found.pass_levels,
            draft_passes=found.draft_passes,
            nodes_planned=len(memo.drafted),
            nodes_used=len(memo.used & memo.drafted),
            nodes_forced=sum(memo.is_forced(node) for node in memo.used),
            beams=len(memo.used - {ROOT}),
            largest_slack=memo.largest_slack,
            verdict=compare(*lists),
            quality={cutoff: quality(self._items(by_score, k), case.answers, cutoff) for cutoff in cutoffs(k)},
        )

    def _items(self, leaves: Beams, k: int) -> list[int]:
        """The first K items, leaf by leaf, in id order within a leaf."""
        return list(islice((item for leaf in leaves.node.tolist() for item in self._catalogue.items_of(leaf)), k))

    def _ranked(self, leaves: Beams, k: int) -> RankedList:
        """A list to compare. Its scores are what it is ordered by, which for a sample are the perturbed ones."""
        scored = zip(leaves.node.tolist(), leaves.priority.tolist(), strict=True)
        pairs = list(islice(((item, at) for leaf, at in scored for item in self._catalogue.items_of(leaf)), k))
        return RankedList(tuple(self._catalogue.id_of(item) for item, _ in pairs), tuple(at for _, at in pairs))
