"""Searches of one user under every configuration, with models that share a tree.

One target evaluates the searches without a draft, another those with one. So the compared lists come from passes of different
shapes, as in serving.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from enum import StrEnum
from functools import lru_cache
from itertools import islice
from pathlib import Path

from atspeed.benchmarks.histories import prompt_tokens
from atspeed.benchmarks.near_ties import Verdict, compare
from atspeed.engine.bundle.bundle import Bundle
from atspeed.engine.bundle.catalogue import Catalogue
from atspeed.engine.model.tree_session import Selection
from atspeed.engine.search.beam_widths import BeamWidths
from atspeed.engine.search.beams import Beams
from atspeed.engine.search.list_comparison import RankedList
from atspeed.engine.search.mode import Mode
from atspeed.engine.search.plan import PlanSize, Proposal
from atspeed.engine.search.scoring import Perturbation
from atspeed.engine.search.trie import ROOT, Pruning
from draft_service.draft_kinds import drafter_of
from draft_service.drafter import DraftRequest
from orchestrator.planning.sized_draft import NoDraft
from orchestrator.search.beam_loop import SearchResult, beam_search
from orchestrator.search.policies import ExactSampling, Policy, RelaxedSampling, Strict, Tolerance
from research.eval_examples import HeldOutCase, Quality, quality
from research.shared_tree_models import (
    TEMPERATURE,
    SharedTreeDraft,
    SharedTreeEvaluator,
    SharedTreeTarget,
    load_decoder_of,
    prefix_cache,
    shared_evaluator,
)

NO_DRAFT = "none"
CUTOFFS = (5, 10, 20)


class BudgetUnit(StrEnum):
    """Unit of a budget."""

    BEAM_WIDTHS = "beam widths per level"
    PER_LEVEL = "nodes per level"
    IN_ALL = "nodes in all"


@dataclass(frozen=True)
class Budget:
    """Plan size of a sweep. label: its name in results."""

    label: str
    count: int
    unit: BudgetUnit

    def size(self, k: int, levels: int) -> PlanSize:
        """Return the plan size for K beams over a trie of so many levels. Leaves are never planned."""
        if self.unit is BudgetUnit.IN_ALL:
            return PlanSize(beam_widths=BeamWidths.of(k), width=self.count, max_nodes=self.count)
        width = self.count * (k if self.unit is BudgetUnit.BEAM_WIDTHS else 1)
        return PlanSize(beam_widths=BeamWidths.of(k), width=width, max_nodes=width * max(1, levels - 1))


@dataclass(frozen=True)
class Configuration:
    """Configuration of a search. draft: its name, or NO_DRAFT for a reference, which has no budget."""

    draft: str
    mode: Mode
    k: int
    budget: Budget | None

    @property
    def reference(self) -> Configuration:
        """Configuration of the target alone, by the same seed: beam search, or exact sampling for the sampling modes."""
        return Configuration(NO_DRAFT, Mode.EXACT_SAMPLING if self.mode.samples else Mode.TARGET_ONLY, self.k, None)


@dataclass(frozen=True)
class SweepSetup:
    """Inputs of a worker process. drafts: the bundle of each named draft; the target is that of `bundle`."""

    bundle: Path
    drafts: tuple[tuple[str, Path], ...]
    configurations: tuple[Configuration, ...]
    tolerance: float
    threads: int


@dataclass(frozen=True)
class SearchOutcome:
    """Outcome of one search.

    Attributes:
        pass_levels: depth of the beams of each target pass, ascending.
        nodes_used: planned nodes that the search went through.
        nodes_forced: beams that are forced nodes.
        beams: inner nodes that the search went through, without the root.
        verdict: comparison with the reference's list.
        quality: by cutoff.
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
    """Return the cutoffs of lists of K items: the usual ones below K, and K."""
    return tuple(sorted({k, *(cutoff for cutoff in CUTOFFS if cutoff < k)}))


def search_all(setup: SweepSetup, cases: Sequence[HeldOutCase]) -> list[list[SearchOutcome]]:
    """Search for every case under every configuration: [cases][configurations]. Loads the models once per process."""
    return asyncio.run(_opened(setup).search_all(cases))


@lru_cache(maxsize=1)
def _opened(setup: SweepSetup) -> _Searcher:
    return _Searcher(setup)


@dataclass(frozen=True)
class _FinishedSearch:
    """Result of a search, and its passes."""

    result: SearchResult
    pass_levels: tuple[int, ...]
    draft_passes: int


class _Searcher:
    """Loaded models of a setup."""

    def __init__(self, setup: SweepSetup) -> None:
        bundle = Bundle(setup.bundle)
        self._setup = setup
        self._entry = bundle.manifest.target
        self._rule = bundle.manifest.scoring_rule
        self._catalogue: Catalogue = bundle.catalogue()
        decoder, cache = load_decoder_of(bundle, "target", setup.threads), prefix_cache(self._entry)
        # Two trees, one prefix cache: the prompt's whole blocks are computed once.
        self._alone = shared_evaluator(decoder, self._entry, self._catalogue, self._rule, cache)
        self._speculating = shared_evaluator(decoder, self._entry, self._catalogue, self._rule, cache)
        self._drafts = {name: self._draft(Bundle(root)) for name, root in setup.drafts}

    def _draft(self, bundle: Bundle) -> SharedTreeEvaluator:
        decoder, entry = load_decoder_of(bundle, "draft", self._setup.threads), bundle.model("draft")
        return shared_evaluator(decoder, entry, self._catalogue, self._rule, prefix_cache(entry))

    async def search_all(self, cases: Sequence[HeldOutCase]) -> list[list[SearchOutcome]]:
        return [await self._case(case) for case in cases]

    async def _case(self, case: HeldOutCase) -> list[SearchOutcome]:
        """Search for one user under every configuration. The largest come first: the others then find their nodes evaluated."""
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

    async def _search(self, case: HeldOutCase, configuration: Configuration) -> _FinishedSearch:
        trie, policy = self._catalogue.trie, self._policy(configuration, case.seed)
        selection = Selection(
            Pruning.none(),
            policy.max_children or max(trie.codebook_sizes),
            policy.noise if policy.perturbed else None,
        )
        evaluator = self._alone if configuration.budget is None else self._speculating
        target = SharedTreeTarget(evaluator, prompt_tokens(self._catalogue, self._entry, case.history), selection)
        if configuration.budget is None:
            result = await beam_search(trie, self._rule, policy, target, NoDraft())
            return _FinishedSearch(result, tuple(target.pass_levels), 0)
        drafting = self._drafts[configuration.draft]
        request = DraftRequest(
            prompt=prompt_tokens(self._catalogue, drafting.entry, case.history),
            below=Beams.root(),
            size=configuration.budget.size(configuration.k, trie.levels),
            proposal=policy.proposal,
            pruning=Pruning.none(),
            noise=policy.noise,
            with_evaluation=policy.proposal is Proposal.SAMPLE,
        )
        draft = SharedTreeDraft(drafter_of(drafting), trie, request)
        result = await beam_search(trie, self._rule, policy, target, draft)
        return _FinishedSearch(result, tuple(target.pass_levels), draft.passes)

    def _policy(self, configuration: Configuration, seed: int) -> Policy:
        width, noise = configuration.k, Perturbation(seed, TEMPERATURE)
        if configuration.mode is Mode.TOLERANCE:
            return Tolerance(BeamWidths.of(width), self._setup.tolerance)
        if configuration.mode is Mode.EXACT_SAMPLING:
            return ExactSampling(BeamWidths.of(width), noise)
        if configuration.mode is Mode.RELAXED_SAMPLING:
            return RelaxedSampling(BeamWidths.of(width), noise)
        return Strict(BeamWidths.of(width))

    def _outcome(
        self, case: HeldOutCase, configuration: Configuration, found: _FinishedSearch, reference: _FinishedSearch
    ) -> SearchOutcome:
        memo, k = found.result.memo, configuration.k
        # A sample is in the order of its draws. Ranked by score, two samples differ only if their items differ.
        by_score = found.result.leaves.by_score()
        compared = [result.leaves for result in (found.result, reference.result)]
        if configuration.mode is Mode.RELAXED_SAMPLING:
            compared = [replace(leaves.by_score(), priority=leaves.by_score().score) for leaves in compared]
        lists = [self._ranked(leaves, k) for leaves in compared]
        return SearchOutcome(
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
        """Return the first K items, leaf by leaf, in id order within a leaf."""
        return list(islice((item for leaf in leaves.node.tolist() for item in self._catalogue.items_of(leaf)), k))

    def _ranked(self, leaves: Beams, k: int) -> RankedList:
        """Return a list to compare, with the scores that order it; for a sample these are the perturbed ones."""
        scored = zip(leaves.node.tolist(), leaves.priority.tolist(), strict=True)
        pairs = list(islice(((item, at) for leaf, at in scored for item in self._catalogue.items_of(leaf)), k))
        return RankedList(tuple(self._catalogue.id_of(item) for item, _ in pairs), tuple(at for _, at in pairs))
