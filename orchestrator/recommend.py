"""The recommender: history, candidates, session, search, list. No protobuf."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import closing
from itertools import islice

import numpy as np
import structlog

from atspeed.concurrency.deadline import Deadline
from atspeed.engine.arrays import Int64
from atspeed.engine.bundle.catalogue import Catalogue
from atspeed.engine.bundle.manifest import Manifest, Role
from atspeed.engine.bundle.prompts import Prompts
from atspeed.engine.bundle.user_fields import UserFieldError, check_user_fields
from atspeed.engine.search.beam_widths import BeamWidths
from atspeed.engine.search.mode import Mode
from atspeed.engine.search.scoring import Children
from atspeed.engine.search.trie import ENDED, ROOT
from atspeed.errors import InvalidArgumentError, NotFoundError, Reason, UnavailableError, UnimplementedError, Violations
from atspeed.observability import tracing
from atspeed.rpc.admission import Priority
from orchestrator.degraded_reason import DegradedReason
from orchestrator.history import HistoryStore, HistoryUnavailable
from orchestrator.model_clients.interfaces import DraftModel, TargetModel
from orchestrator.planning.plan_sizer import PlanContext
from orchestrator.planning.planner import Planner
from orchestrator.planning.sized_draft import DraftSource, NoDraft, SizedDraft
from orchestrator.recommendation import Diagnostics, Item, Origin, Recommendation, RecommendParams, SubjectHistory
from orchestrator.request_session import Candidates, PromptBuilder, RequestSession
from orchestrator.search.beam_loop import SearchResult
from orchestrator.search.memo import Memo
from orchestrator.speculation_breaker import SpeculationBreaker

_log: structlog.stdlib.BoundLogger = structlog.get_logger(__name__)


class Recommender:
    """Recommender over one bundle's catalogue and models.

    Attributes:
        manifest: the bundle's manifest.
        catalogue: the bundle's items.
        histories: the store of users' histories; None without Redis.
    """

    def __init__(
        self,
        manifest: Manifest,
        catalogue: Catalogue,
        prompts: Mapping[Role, Prompts],
        target: TargetModel,
        draft: DraftModel | None,
        planner: Planner,
        histories: HistoryStore | None,
        speculation_breaker: SpeculationBreaker,
        *,
        target_prefetch: bool = True,
    ) -> None:
        self.manifest = manifest
        self.catalogue = catalogue
        self.histories = histories
        self._prompts = prompts
        self._target = target
        self._draft = draft
        self._planner = planner
        self._speculation_breaker = speculation_breaker
        self._target_prefetch = target_prefetch

    async def recommend(
        self,
        params: RecommendParams,
        deadline: Deadline,
        *,
        opened: Callable[[RequestSession], RequestSession] | None = None,
    ) -> Recommendation:
        """Return the list of one request.

        opened: takes the open session, and returns the one to search with, such as a recorded one.

        Raises:
            NotFoundError: nothing is stored for the user.
            InvalidArgumentError: there are more beam widths than levels, the user's fields are not those of the bundle's
                prompts, or the history has no known item and the bundle does not allow an empty one.
            UnimplementedError: the request names a user, and the service keeps no histories.
            UnavailableError: the target or the history store is unavailable.
            DeadlineExceededError: the request's time is up.
        """
        started_ns = time.perf_counter_ns()
        self._check_widths(params)
        self._check_user_fields(params)
        history = await self._history(params)
        candidates = self._candidates(params, history)
        session = self._open_session(PromptBuilder.of(self.catalogue, params, history, candidates, deadline))
        session = session if opened is None else opened(session)
        searched_ns = time.perf_counter_ns()
        result, reason = await session.search(self.catalogue.trie, self.manifest.scoring_rule)
        session.learn(result.memo)
        items = list(islice(self._items(result, candidates, self._items_per_path(params)), params.k))
        times = session.stage_times(started_ns, searched_ns, time.perf_counter_ns())
        target, draft, planning = session.target.usage, session.draft.usage, session.sizer.report
        diagnostics = Diagnostics(result.memo, result.leaves, session.prompt_tokens, target, draft, planning, times)
        return self._recommendation(session, items, session.degraded_reasons(reason), diagnostics)

    @property
    def reads_ahead(self) -> bool:
        """Return whether a user's prompt is known before a request: one with fields of users waits for their values."""
        return not self._prompts["target"].template.user_fields

    async def read_prompt(self, user_id: str, tenant: str, deadline: Deadline) -> None:
        """Let the target read the prompt of a stored user, for the prefix cache. Raises as `recommend`, for a user."""
        params = RecommendParams(
            1, BeamWidths.of(1), Mode.TARGET_ONLY, user_id=user_id, tenant=tenant, priority=Priority.BATCH
        )
        self._check_user_fields(params)
        history = await self._history(params)
        candidates = self._candidates(params, history)
        prompts = PromptBuilder.of(self.catalogue, params, history, candidates, deadline)
        target = self._target.session(prompts.target_request(self._prompts["target"]), max_children=1)
        with closing(target), tracing.span("read prompt"):
            await target.evaluate(np.array([ROOT], dtype=np.int64))

    async def evaluate(self, prompts: PromptBuilder, levels: Iterable[Int64]) -> dict[int, Children]:
        """Evaluate nodes, level by level, with all of their children. Nothing is learned from it.

        levels: ascending inner nodes of each level, the root's first; parents are evaluated with an earlier level, or before.
        """
        target = self._target.session(prompts.target_request(self._prompts["target"]), max_children=None)
        with closing(target):
            return {node: children for nodes in levels for node, children in (await target.evaluate(nodes)).items()}

    def window(self, history: SubjectHistory) -> list[str]:
        """Return the ids of the history items in the target's prompt, oldest first."""
        return [self.catalogue.id_of(int(item)) for item in self._prompts["target"].window(history.known)]

    def _check_widths(self, params: RecommendParams) -> None:
        widths, levels = len(params.beam_widths.listed), self.catalogue.trie.levels
        if widths > levels:
            raise InvalidArgumentError("beam_widths", f"has {widths} widths, but code paths have {levels} levels")

    def _check_user_fields(self, params: RecommendParams) -> None:
        """Raise InvalidArgumentError with every field that the target's prompts cannot hold, or that they lack."""
        try:
            check_user_fields(self._prompts["target"].template.user_fields, params.user_fields)
        except UserFieldError as error:
            found = Violations()
            for name, problem in error.problems.items():
                found.add(f"user_fields.{name}", problem)
            found.raise_any()

    async def _history(self, params: RecommendParams) -> SubjectHistory:
        with tracing.span("history") as span:
            item_ids = params.history
            if item_ids is None:
                item_ids = await self._stored_history(params.user_id or "", params.tenant)
            index = self.catalogue.find(item_ids)
            known = index[index >= 0]
            if not len(known) and not self.manifest.allow_empty_history:
                count = len(item_ids)
                problem = f"none of its {count} history items is in the catalogue" if count else "the history is empty"
                raise InvalidArgumentError(params.subject_field, problem, reason=Reason.HISTORY_WITHOUT_KNOWN_ITEM)
            unknown = [item for item, found in zip(item_ids, index.tolist(), strict=True) if found < 0]
            span.set(known=len(known), stored=params.history is None)
        return SubjectHistory(known, unknown)

    async def _stored_history(self, user_id: str, tenant: str) -> Sequence[str]:
        if self.histories is None:
            raise UnimplementedError("user_id: this service keeps no histories; send the history in the request")
        try:
            stored = await self.histories.get(user_id, tenant=tenant)
        except HistoryUnavailable as error:
            _log.warning("history_store_unavailable", error=str(error))
            # With an empty history instead, the list would be another user's.
            raise UnavailableError(
                "user_id: histories are out of reach; send the history in the request",
                reason=Reason.HISTORIES_UNAVAILABLE,
            ) from None
        if stored is None and not self.manifest.allow_empty_history:
            raise NotFoundError("user_id", "no history is stored for this user")
        return stored or ()

    def _candidates(self, params: RecommendParams, history: SubjectHistory) -> Candidates:
        excluded = self._indices(params.excluded)
        unknown_excluded = len(params.excluded) - len(excluded)
        if params.exclude_seen:
            excluded = np.union1d(excluded, history.known)
        allowed = self._indices(params.allowed) if params.allowed else None
        return Candidates(
            excluded=frozenset(excluded.tolist()),
            allowed=None if allowed is None else frozenset(allowed.tolist()),
            pruning=self.catalogue.pruning(excluded=excluded, allowed=allowed),
            unknown_excluded=unknown_excluded,
            unknown_allowed=len(params.allowed) - (0 if allowed is None else len(allowed)),
        )

    def _indices(self, item_ids: Sequence[str]) -> Int64:
        index = self.catalogue.find(item_ids)
        return index[index >= 0]

    def _open_session(self, prompts: PromptBuilder) -> RequestSession:
        mode, policy = prompts.params.mode, prompts.policy
        request = prompts.target_request(self._prompts["target"])
        enabled = self._speculation_breaker.enabled
        speculates = mode.properties.speculates and enabled
        target = self._target.session(
            request,
            max_children=policy.max_children,
            beam_widths=policy.beam_widths,
            prefetches=speculates and self._target_prefetch,
            speculates=speculates and (self._target_prefetch or self._draft is not None),
        )
        source = self._draft_session(prompts) if speculates else None
        prompt_tokens = len(request.prompt)
        context = PlanContext(prompts.params.beam_widths, prompt_tokens, source.prompt_tokens if source else 0)
        sizer = self._planner.sizer(mode, context)
        draft = SizedDraft(source, sizer, target) if source else NoDraft()
        has_draft = self._draft is not None and self.manifest.draft is not None
        disabled = mode.properties.speculates and has_draft and not enabled
        return RequestSession(prompts, target, draft, sizer, prompt_tokens, disabled)

    def _draft_session(self, prompts: PromptBuilder) -> DraftSource | None:
        if self._draft is None or "draft" not in self._prompts:
            return None
        return self._draft.session(prompts.draft_request(self._prompts["draft"]), prompts.policy.proposal)

    def _items(self, result: SearchResult, candidates: Candidates, limit: int | None) -> Iterator[Item]:
        """Yield the leaves' candidates, leaf by leaf, at most `limit` of a leaf, in the catalogue's order within a leaf."""
        catalogue = self.catalogue
        found = [catalogue.items_of(leaf) for leaf in result.leaves.node.tolist()]
        paths = catalogue.spelled_codes(np.array([of_path[0] for of_path in found], dtype=np.int64))
        for leaf, score, path, of_path in zip(
            result.leaves.node.tolist(), result.leaves.score.tolist(), paths, found, strict=True
        ):
            shown, origin = tuple(path.tolist()), _origin(result.memo, leaf)
            permitted = islice((item for item in of_path if item in candidates), limit)
            yield from (Item(catalogue.id_of(item), score, shown, len(of_path), origin) for item in permitted)

    def _items_per_path(self, params: RecommendParams) -> int | None:
        return params.items_per_path or self.manifest.items_per_path

    def _recommendation(
        self, session: RequestSession, items: list[Item], reasons: list[DegradedReason], diagnostics: Diagnostics
    ) -> Recommendation:
        prompts = session.prompts
        return Recommendation(
            items=items,
            params=prompts.params,
            seed=prompts.noise.seed if prompts.noise else None,
            history=prompts.history,
            items_per_path=self._items_per_path(prompts.params),
            history_items_used=len(prompts.window(self._prompts["target"])),
            degraded_reasons=reasons,
            plan_invariant=self.manifest.target.plan_invariant and not diagnostics.target.cost.unordered_passes,
            unknown_excluded=prompts.candidates.unknown_excluded,
            unknown_allowed=prompts.candidates.unknown_allowed,
            diagnostics=diagnostics,
        )


def _origin(memo: Memo, leaf: int) -> Origin:
    if memo.was_recovered(leaf):
        return Origin.RECOVERED
    last, trie = leaf, memo.trie
    while trie.code[last] == ENDED:
        last = int(trie.parent[last])
    return Origin.FORCED if memo.is_forced(int(trie.parent[last])) else Origin.DRAFTED
