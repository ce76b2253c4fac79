"""Parameters and result of a recommendation, as plain values."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from enum import StrEnum
from functools import cached_property

from atspeed.engine.arrays import Int64
from atspeed.engine.bundle.user_fields import UserFields
from atspeed.engine.search.beam_widths import BeamWidths
from atspeed.engine.search.beams import Beams
from atspeed.engine.search.mode import Guarantee, Mode
from atspeed.observability import tracing
from atspeed.rpc.admission import Priority
from orchestrator.degraded_reason import DegradedReason
from orchestrator.planning.plan_sizer import PlanningReport
from orchestrator.planning.usage import Usage
from orchestrator.search.memo import Memo, NodeCounts
from orchestrator.user_key import FIRST_ITEMS, digest, user_cache_key


class Origin(StrEnum):
    """Way in which the search found an item; see the proto's `Origin`."""

    DRAFTED = "drafted"
    RECOVERED = "recovered"
    FORCED = "forced"


class ColdStart(StrEnum):
    """Reason for a list without any history item; see the proto's `ColdStart`."""

    NO_STORED_HISTORY = "no-stored-history"
    EMPTY_HISTORY = "empty-history"
    UNKNOWN_ITEMS = "unknown-items"

    @property
    def description(self) -> str:
        """Return the reason as text for people."""
        return _COLD_STARTS[self]


_COLD_STARTS = {
    ColdStart.NO_STORED_HISTORY: "no history is stored for this user",
    ColdStart.EMPTY_HISTORY: "the history is empty",
    ColdStart.UNKNOWN_ITEMS: "no item of the history is in the catalogue",
}


class FewerThanK(StrEnum):
    """Reason for fewer than k items; see the proto's `FewerThanKReason`."""

    FILTERED = "filtered"
    ITEMS_PER_PATH = "items-per-path"
    SEARCH = "search"


@dataclass(frozen=True)
class RecommendParams:
    """Checked parameters of a request: the last beam width >= k >= 1, and user_id or history is set.

    A shadow check sets both. Its history is then the one that was read for the user, and the prompt's keys and values still
    belong to the user, so that they are erased with the user.

    Attributes:
        beam_widths: the beam widths of the search.
        user_id: a user whose history is stored.
        history: item ids, oldest first.
        tolerance: largest score gap of a substitution, in log-probability.
        excluded: item ids that must not be recommended.
        allowed: the only item ids that may be recommended; empty for all.
        exclude_seen: exclude the items of the history too.
        least_beam_width: fewest beams that the request accepts when the service is busy; None for no fewer than requested.
        items_per_path: most items of one code path in the list; None for the bundle's limit.
        requested_beam_widths: the beam widths before they were narrowed; None if they were not.
        user_fields: values of the user's fields in prompts, by name.
    """

    k: int
    beam_widths: BeamWidths
    mode: Mode = Mode.STRICT
    user_id: str | None = None
    history: Sequence[str] | None = None
    tolerance: float = 0.0
    temperature: float = 1.0
    seed: int | None = None
    excluded: Sequence[str] = ()
    allowed: Sequence[str] = ()
    exclude_seen: bool = False
    tenant: str = ""
    priority: Priority = Priority.INTERACTIVE
    least_beam_width: int | None = None
    items_per_path: int | None = None
    requested_beam_widths: BeamWidths | None = None
    user_fields: UserFields = field(default_factory=dict)

    def narrowed(self) -> RecommendParams:
        """Return the request with the fewest beams that it accepts."""
        if self.least_beam_width is None or self.least_beam_width >= self.beam_widths.largest:
            return self
        narrowed = self.beam_widths.narrowed(self.least_beam_width)
        return replace(self, beam_widths=narrowed, requested_beam_widths=self.beam_widths)

    @property
    def user_key(self) -> bytes | None:
        """Return the key of the stored user; None for a history that came with the request."""
        return None if self.user_id is None else user_cache_key(self.tenant, self.user_id)

    @property
    def subject(self) -> bytes:
        """Return a key of the person that the list is for, equal in every process.

        The first items of a history stand for the person if no stored user is named.
        """
        return self.user_key or digest("history", self.tenant, *(self.history or ())[:FIRST_ITEMS])

    @property
    def subject_field(self) -> str:
        """Return the name of the request's field that has the history."""
        return "user_id" if self.history is None else "history"


@dataclass(frozen=True)
class SubjectHistory:
    """History of the person that the list is for.

    Attributes:
        known: int64 [h], item indices in the catalogue, oldest first.
        unknown: ids that the catalogue does not hold.
    """

    known: Int64
    unknown: Sequence[str]


@dataclass(frozen=True)
class Item:
    """Recommended item.

    Attributes:
        score: log-probability of its code path.
        path: its codes before the tail.
        path_items: items of the catalogue with this path.
    """

    item_id: str
    score: float
    path: tuple[int, ...]
    path_items: int
    origin: Origin


@dataclass(frozen=True)
class StageTimes:
    """Nanoseconds of the orchestrator's own stages. The models' times are in their `Usage`.

    Attributes:
        history_ns: reading the history and building the prompts.
        selection_ns: selecting beams and items.
        total_ns: everything, the models included.
    """

    history_ns: int
    selection_ns: int
    total_ns: int


@dataclass(frozen=True)
class Diagnostics:
    """Work and time that a list took.

    Attributes:
        memo: all nodes that the target evaluated.
        leaves: the beams of the last level, in the order of the list.
        prompt_tokens: length of the target's prompt.
        target: use of the target.
        draft: use of the draft.
        planning: decisions of the planner.
    """

    memo: Memo
    leaves: Beams
    prompt_tokens: int
    target: Usage
    draft: Usage
    planning: PlanningReport
    times: StageTimes

    @cached_property
    def nodes(self) -> NodeCounts:
        """Return the numbers of nodes of the search."""
        return self.memo.counts()

    @property
    def accepted_levels(self) -> int:
        """Return the number of levels that needed no target pass of their own."""
        return max(0, self.memo.trie.levels - self.memo.passes) if self.memo.passes else 0


@dataclass(frozen=True)
class Recommendation:
    """List of items and the facts about it.

    Attributes:
        seed: seed of a sampling mode, else None.
        items_per_path: most items of one code path in the list; None without a limit.
        history_items_used: number of history items in the target's prompt.
        degraded_reasons: reasons why the list is degraded; empty if it is not.
        plan_invariant: whether the target's scores do not depend on other nodes of a pass: by its `ModelEntry`, and by the check
            of every replica that answered.
        unknown_excluded: number of excluded ids that the catalogue does not know.
        unknown_allowed: number of allowed ids that the catalogue does not know.
    """

    items: Sequence[Item]
    params: RecommendParams
    seed: int | None
    history: SubjectHistory
    items_per_path: int | None
    history_items_used: int
    degraded_reasons: Sequence[DegradedReason]
    plan_invariant: bool
    unknown_excluded: int
    unknown_allowed: int
    diagnostics: Diagnostics

    @property
    def cold_start(self) -> ColdStart | None:
        """Return why no history item is in the prompt; None if there is one."""
        if len(self.history.known):
            return None
        if self.history.unknown:
            return ColdStart.UNKNOWN_ITEMS
        return ColdStart.EMPTY_HISTORY if self.params.user_id is None else ColdStart.NO_STORED_HISTORY

    @property
    def exact(self) -> bool:
        """Return whether the list is the target's own, whatever shared its passes."""
        exact = self.params.mode.properties.guarantee is not Guarantee.NONE
        return exact and self.diagnostics.memo.substitutions == 0 and self.plan_invariant

    @property
    def fewer_than_k(self) -> list[FewerThanK]:
        """Return the reasons for fewer than k items; none if there are k."""
        params = self.params
        if len(self.items) >= params.k:
            return []
        restricted = params.excluded or params.allowed or params.exclude_seen
        reasons = [FewerThanK.FILTERED] if restricted else []
        reasons += [] if self.items_per_path is None else [FewerThanK.ITEMS_PER_PATH]
        return reasons or [FewerThanK.SEARCH]

    @property
    def fewer_than_k_description(self) -> str:
        """Return the reasons for fewer than k items as text for people; empty if there are k."""
        if not (reasons := self.fewer_than_k):
            return ""
        left = "are left after exclusions and filters" if FewerThanK.FILTERED in reasons else "came out of the search"
        limit = "" if self.items_per_path is None else f", at most {self.items_per_path} of a code path"
        return f"only {len(self.items)} of {self.params.k} items {left}{limit}"

    @property
    def trace_attributes(self) -> dict[str, tracing.Value]:
        """Return sizes and counts for a trace's span."""
        diagnostics = self.diagnostics
        cost = diagnostics.target.cost
        return {
            "target_passes": diagnostics.memo.passes,
            "accepted_levels": diagnostics.accepted_levels,
            "nodes_drafted": diagnostics.nodes.drafted,
            "nodes_recovered": diagnostics.nodes.recovered,
            "nodes_prefetched": diagnostics.nodes.prefetched,
            "prompt_tokens": diagnostics.prompt_tokens,
            "cached_tokens": cost.cached_tokens,
            "degraded": bool(self.degraded_reasons),
        }
