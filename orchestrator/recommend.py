"""The recommendation: history -> prompt -> loop -> items. Knows no protobuf."""

from __future__ import annotations

import secrets
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import structlog

from atspeed.concurrency.deadline import Deadline
from atspeed.engine.arrays import Int64
from atspeed.engine.bundle.catalogue import Catalogue
from atspeed.engine.bundle.manifest import Manifest, ModelEntry
from atspeed.engine.search.beams import Beams
from atspeed.engine.search.scoring import Perturbation
from atspeed.engine.search.trie import Pruning
from atspeed.errors import InvalidArgumentError, NotFoundError, UnavailableError, UnimplementedError
from atspeed.observability import tracing
from orchestrator.history import HistoryStore, HistoryUnavailable
from orchestrator.model_clients.draft_client import DraftClient, DraftSession
from orchestrator.model_clients.model_request import ModelRequest, PlanUnansweredError
from orchestrator.model_clients.target_client import TargetClient, TargetSession
from orchestrator.planning.plan_sizer import PlanContext
from orchestrator.planning.planner import Planner
from orchestrator.planning.sized_draft import NoDraft, SizedDraft
from orchestrator.recommendation import Item, Origin, Recommendation, RecommendParams, StageTimes, SubjectHistory
from orchestrator.search.beam_loop import Draft, SearchResult, beam_search
from orchestrator.search.memo import Memo
from orchestrator.search.policies import POLICIES, Policy
from orchestrator.speculation_breaker import SWITCHED_OFF, SpeculationBreaker
from orchestrator.user_key import FIRST_ITEMS, digest

UNANSWERED = "speculation: the target had no answer to what was planned, it was asked without"
"""What a list says of it that was begun anew for this reason."""

_log: structlog.stdlib.BoundLogger = structlog.get_logger(__name__)


@dataclass(frozen=True)
class Candidates:
    """What a request may recommend. excluded, allowed: item indices; allowed is None where everything is.

    unknown_excluded, unknown_allowed: how many of the request's ids the catalogue does not know.
    """

    excluded: frozenset[int]
    allowed: frozenset[int] | None
    pruning: Pruning
    unknown_excluded: int
    unknown_allowed: int

    def __contains__(self, item: int) -> bool:
        return item not in self.excluded and (self.allowed is None or item in self.allowed)


class Recommender:
    """Serves one bundle's catalogue with the models behind the clients. Without Redis `histories` is None."""

    def __init__(
        self,
        manifest: Manifest,
        catalogue: Catalogue,
        target: TargetClient,
        draft: DraftClient | None,
        planner: Planner,
        histories: HistoryStore | None,
        speculation_breaker: SpeculationBreaker,
        *,
        target_prefetch: bool = True,
    ) -> None:
        self.manifest = manifest
        self.catalogue = catalogue
        self.histories = histories
        self._target = target
        self._draft = draft
        self._planner = planner
        self._speculation_breaker = speculation_breaker
        self._target_prefetch = target_prefetch

    async def recommend(self, order: RecommendParams, deadline: Deadline) -> Recommendation:
        """The list for one order.

        Raises NotFoundError for an unknown user, InvalidArgumentError for a history without a known item (unless the
        bundle allows an empty one), UnimplementedError for a user id without Redis, UnavailableError when the target or a
        stored history is out of reach, and DeadlineExceededError.
        """
        begun = time.perf_counter_ns()
        degraded = [f"beam width: {order.beam_width}, the service is busy"] if order.asked_beam_width else []
        with tracing.span("history") as span:
            history = await self._history(order)
            span.set(known=len(history.known), stored=order.history is None)
        candidates = self._candidates(order, history)
        noise = _noise(order)
        policy = POLICIES[order.mode](order.beam_width, order.tolerance, noise)
        ask = _Asker(self.catalogue, history, candidates.pruning, deadline, order)
        speculates = order.mode.properties.speculates and self._speculation_breaker.on
        question = ask.question(self.manifest.target, noise if policy.perturbed else None)
        question = replace(question, speculates=speculates and (self._target_prefetch or self._draft is not None))
        target = self._target.session(
            question,
            max_children=policy.max_children,
            beam_width=policy.beam_width,
            prefetches=speculates and self._target_prefetch,
        )
        drafting = self._draft_session(order, ask, noise, policy, degraded)
        task = PlanContext(order.beam_width, len(question.prompt), drafting.prompt_tokens if drafting else 0)
        planning = self._planner.sizer(order.mode, task)
        draft = SizedDraft(drafting, planning, target) if drafting else NoDraft()
        searching = time.perf_counter_ns()
        try:
            result = await self._list(policy, target, draft, candidates.pruning, degraded)
        finally:
            target.close()
        planning.learn(result.memo, target.usage, draft.usage)
        items = self._items(result, candidates)[: order.k]
        ended = time.perf_counter_ns()
        return Recommendation(
            items=items,
            order=order,
            seed=noise.seed if noise else None,
            history=history,
            history_items_used=len(ask.window(self.manifest.target)),
            prompt_tokens=len(question.prompt),
            degraded=degraded,
            memo=result.memo,
            nodes=result.memo.counts(),
            plan_invariant=self.manifest.target.plan_invariant,
            target=target.usage,
            draft=draft.usage,
            planning=planning.report,
            times=StageTimes(
                history_ns=searching - begun,
                selection_ns=ended - searching - target.usage.wait_ns - draft.usage.wait_ns,
                total_ns=ended - begun,
            ),
            unknown_excluded=candidates.unknown_excluded,
            unknown_allowed=candidates.unknown_allowed,
        )

    async def _list(
        self, policy: Policy, target: TargetSession, draft: Draft, pruning: Pruning, degraded: list[str]
    ) -> SearchResult:
        """With a plan, and where the target has no answer to that, from the root on without one: no plan decides whether there is
        a list.
        """
        try:
            return await self._search(policy, target, draft, pruning)
        except PlanUnansweredError:
            degraded.append(UNANSWERED)
            return await self._search(policy, target, NoDraft(), pruning)

    async def _search(self, policy: Policy, target: TargetSession, draft: Draft, pruning: Pruning) -> SearchResult:
        trie, rule = self.catalogue.trie, self.manifest.scoring_rule
        if pruning.empties_catalogue:
            return SearchResult(Beams.root().take(np.empty(0, dtype=np.int64)), Memo(trie, rule))
        return await beam_search(trie, rule, policy, target, draft)

    async def _history(self, order: RecommendParams) -> SubjectHistory:
        item_ids = order.history if order.history is not None else await self._stored(order.user_id or "", order.tenant)
        index = self.catalogue.find(item_ids)
        known = index[index >= 0]
        if not len(known) and not self.manifest.allow_empty_history:
            raise InvalidArgumentError(
                order.subject_field,
                f"none of its {len(item_ids)} history items is in the catalogue"
                if item_ids
                else "the history is empty",
            )
        unknown = [item for item, found in zip(item_ids, index.tolist(), strict=True) if found < 0]
        return SubjectHistory(known, unknown)

    async def _stored(self, user_id: str, tenant: str) -> Sequence[str]:
        if self.histories is None:
            raise UnimplementedError("user_id: this service keeps no histories; send the history in the request")
        try:
            stored = await self.histories.get(user_id, tenant=tenant)
        except HistoryUnavailable as error:
            _log.warning("histories are out of reach", problem=str(error))
            # An empty history in its place would be another user's list.
            raise UnavailableError("user_id: histories are out of reach; send the history in the request") from None
        if stored is None and not self.manifest.allow_empty_history:
            raise NotFoundError("user_id", "no history is stored for this user")
        return stored or ()

    def _candidates(self, order: RecommendParams, history: SubjectHistory) -> Candidates:
        excluded = self._indices(order.excluded)
        unknown_excluded = len(order.excluded) - len(excluded)
        if order.exclude_seen:
            excluded = np.union1d(excluded, history.known)
        allowed = self._indices(order.allowed) if order.allowed else None
        return Candidates(
            excluded=frozenset(excluded.tolist()),
            allowed=None if allowed is None else frozenset(allowed.tolist()),
            pruning=self.catalogue.pruning(excluded=excluded, allowed=allowed),
            unknown_excluded=unknown_excluded,
            unknown_allowed=len(order.allowed) - (0 if allowed is None else len(allowed)),
        )

    def _indices(self, item_ids: Sequence[str]) -> Int64:
        index = self.catalogue.find(item_ids)
        return index[index >= 0]

    def _draft_session(
        self, order: RecommendParams, ask: _Asker, noise: Perturbation | None, policy: Policy, degraded: list[str]
    ) -> DraftSession | None:
        if not order.mode.properties.speculates or self._draft is None or self.manifest.draft is None:
            return None
        if not self._speculation_breaker.on:
            degraded.append(SWITCHED_OFF)
            return None
        return self._draft.session(ask.question(self.manifest.draft, noise), policy.proposal, degraded)

    def _items(self, result: SearchResult, candidates: Candidates) -> list[Item]:
        """The leaves' items that the request allows, leaf by leaf, in id order within a leaf."""
        trie = self.catalogue.trie
        items: list[Item] = []
        for leaf, score in zip(result.leaves.node.tolist(), result.leaves.score.tolist(), strict=True):
            path, origin = trie.path(leaf), _origin(result.memo, leaf)
            permitted = (item for item in self.catalogue.items_of(leaf) if item in candidates)
            items.extend(Item(self.catalogue.id_of(item), score, path, origin) for item in permitted)
        return items


@dataclass(frozen=True)
class _Asker:
    """Puts one request to the models, each in its own vocabulary and window."""

    catalogue: Catalogue
    history: SubjectHistory
    pruning: Pruning
    deadline: Deadline
    order: RecommendParams

    def window(self, model: ModelEntry) -> Int64:
        """The history items that a model's prompt holds."""
        return self.history.known[model.prompt.window_start(len(self.history.known)) :]

    def question(self, model: ModelEntry, noise: Perturbation | None) -> ModelRequest:
        """The request as one model gets it."""
        columns = self.catalogue.codes[self.window(model)] + self.catalogue.trie.codebook_offset
        tokens = np.asarray(model.code_tokens, dtype=np.int64)[columns]
        owner = self.order.owner
        return ModelRequest(
            prompt=model.prompt.tokens(list(tokens)),
            pruning=self.pruning,
            deadline=self.deadline,
            noise=noise,
            tenant=self.order.tenant,
            affinity=(owner or self._first_items(model)).hex(),
            owner=owner,
            priority=self.order.priority,
        )

    def _first_items(self, model: ModelEntry) -> bytes:
        """What tells the prompts of histories in requests apart, and stays while the window stands."""
        return digest(self.order.tenant, *map(str, self.window(model)[:FIRST_ITEMS].tolist()))


def _noise(order: RecommendParams) -> Perturbation | None:
    if not order.mode.samples:
        return None
    return Perturbation(order.seed if order.seed is not None else secrets.randbits(63), order.temperature)


def _origin(memo: Memo, leaf: int) -> Origin:
    if memo.was_recovered(leaf):
        return Origin.RECOVERED
    return Origin.FORCED if memo.is_forced(int(memo.trie.parent[leaf])) else Origin.DRAFTED
