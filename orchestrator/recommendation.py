"""What is asked of the orchestrator and what it answers, as plain values."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from enum import StrEnum

from atspeed.engine.arrays import Int64
from atspeed.engine.search.mode import Guarantee, Mode
from atspeed.observability import tracing
from atspeed.rpc.admission import Priority
from orchestrator.planning.plan_sizer import PlanningReport
from orchestrator.planning.usage import Usage
from orchestrator.search.memo import Memo, NodeCounts
from orchestrator.user_key import FIRST_ITEMS, digest, user_cache_key


class Origin(StrEnum):
    """How the search came to an item; see the proto's `Origin`."""

    DRAFTED = "drafted"
    RECOVERED = "recovered"
    FORCED = "forced"


class ColdStart(StrEnum):
    """Why a list was made without any history item; see the proto's `ColdStart`."""

    NO_STORED_HISTORY = "no-stored-history"
    EMPTY_HISTORY = "empty-history"
    UNKNOWN_ITEMS = "unknown-items"


@dataclass(frozen=True)
class RecommendParams:
    """A checked request: beam_width >= k >= 1, and user_id or history is set. With both, history is what was read of the user's:
    what is kept of the request's prompt is still the user's, to be erased with the rest.

    least_beam_width: fewest beams that will do, 0 for no fewer than beam_width. asked_beam_width: before it was narrowed.
    """

    k: int
    beam_width: int
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
    least_beam_width: int = 0
    asked_beam_width: int = 0

    def narrowed(self) -> RecommendParams:
        """The order with as few beams as it allows; itself where it allows no fewer."""
        if not 0 < self.least_beam_width < self.beam_width:
            return self
        return replace(self, beam_width=self.least_beam_width, asked_beam_width=self.beam_width)

    @property
    def owner(self) -> bytes:
        """The stored user's tag; empty for a history that came with its request."""
        return b"" if self.user_id is None else user_cache_key(self.tenant, self.user_id)

    @property
    def subject(self) -> bytes:
        """Whom the list is for, the same for the same in every process: of a history in the request, its first items say it."""
        return self.owner or digest("history", self.tenant, *(self.history or ())[:FIRST_ITEMS])

    @property
    def subject_field(self) -> str:
        """Name of the request's field that says whom the list is for."""
        return "user_id" if self.history is None else "history"


@dataclass(frozen=True)
class SubjectHistory:
    """A history against the catalogue. known: int64 [h], item indices, oldest first. unknown: ids that it does not hold."""

    known: Int64
    unknown: Sequence[str]


@dataclass(frozen=True)
class Item:
    """One recommended item. score: log-probability of its code path."""

    item_id: str
    score: float
    path: tuple[int, ...]
    origin: Origin


@dataclass(frozen=True)
class StageTimes:
    """Nanoseconds of the orchestrator's own stages; the models' are in their `Usage`."""

    history_ns: int
    selection_ns: int
    total_ns: int


@dataclass(frozen=True)
class Recommendation:
    """A list and all that is to be said of it. degraded: what failed on the way, one line each.

    plan_invariant: whether the target's scores are the same whatever else is in a pass; see `ModelEntry`.
    unknown_excluded, unknown_allowed: how many of these ids the catalogue does not know.
    """

    items: Sequence[Item]
    order: RecommendParams
    seed: int | None
    history: SubjectHistory
    history_items_used: int
    prompt_tokens: int
    degraded: Sequence[str]
    memo: Memo
    nodes: NodeCounts
    plan_invariant: bool
    target: Usage
    draft: Usage
    planning: PlanningReport
    times: StageTimes
    unknown_excluded: int = 0
    unknown_allowed: int = 0

    @property
    def cold_start(self) -> ColdStart | None:
        """Why no history item is in the prompt; None where there is one."""
        if len(self.history.known):
            return None
        if self.history.unknown:
            return ColdStart.UNKNOWN_ITEMS
        return ColdStart.EMPTY_HISTORY if self.order.user_id is None else ColdStart.NO_STORED_HISTORY

    @property
    def exact(self) -> bool:
        """Return whether the list is the one that the target alone returns, whatever shared its passes."""
        exact = self.order.mode.properties.guarantee is not Guarantee.NONE and self.memo.substitutions == 0
        return exact and self.plan_invariant

    @property
    def accepted_levels(self) -> int:
        """Levels that needed no target pass of their own."""
        return max(0, self.memo.trie.levels - self.memo.passes) if self.memo.passes else 0

    @property
    def fewer_than_k_reason(self) -> str:
        """Why there are fewer than k items; empty when there are k."""
        if len(self.items) >= self.order.k:
            return ""
        order = self.order
        restricted = bool(order.excluded or order.allowed or order.exclude_seen)
        left = "are left after exclusions and filters" if restricted else "came out of the search"
        return f"only {len(self.items)} of {order.k} items {left}"

    @property
    def trace_attributes(self) -> dict[str, tracing.Value]:
        """What a trace says of it: sizes and counts."""
        cost = self.target.cost
        return {
            "target_passes": self.memo.passes,
            "accepted_levels": self.accepted_levels,
            "nodes_drafted": self.nodes.drafted,
            "nodes_recovered": self.nodes.recovered,
            "nodes_prefetched": self.nodes.prefetched,
            "prompt_tokens": self.prompt_tokens,
            "cached_tokens": cost.memory_cached_tokens + cost.redis_cached_tokens,
            "degraded": bool(self.degraded),
        }
