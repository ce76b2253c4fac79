"""Values of an explanation; `explanation.proto` has their meaning. No protobuf."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum

from orchestrator.recommendation import Recommendation

MAX_NODES = 4096
MAX_ITEMS = 16


class NodeOrigin(StrEnum):
    """Way in which a node came into the search."""

    ROOT = "root"
    DRAFTED = "drafted"
    PREFETCHED = "prefetched"
    RECOVERED = "recovered"
    FORCED = "forced"
    UNEVALUATED = "unevaluated"


@dataclass(frozen=True)
class SearchNode:
    """Node of a search's token tree.

    Attributes:
        parent: index of the parent among the nodes; -1 for the root.
        level: number of codes from the root.
        code: last code of its path; -1 for the root and ended places.
        used: whether it was a beam.
        log_p: log-probability after its parent under the target; None if the target did not return it.
        log_q: the same under the draft; None without a plan that held it.
        score: cumulative log-probability under the target; None where a log_p of the path is missing.
        pass_number: number of the pass that evaluated it, from 1; 0 without one.
        beam_rank: rank among the beams of its level, from 1; 0 if it was none.
        item_ids: items of the list with this path.
    """

    parent: int
    level: int
    code: int
    origin: NodeOrigin
    used: bool
    log_p: float | None
    log_q: float | None
    score: float | None
    pass_number: int
    beam_rank: int
    item_ids: Sequence[str] = ()


@dataclass(frozen=True)
class SearchTree:
    """Token tree of a search.

    Attributes:
        nodes: the nodes, parents before children.
        left_out: number of nodes that did not fit.
    """

    nodes: Sequence[SearchNode]
    left_out: int


class Stage(StrEnum):
    """Stage of a request."""

    ADMISSION = "admission"
    HISTORY = "history"
    PLAN = "plan"
    PASS = "pass"  # noqa: S105 - a pass of the target
    SELECTION = "selection"


@dataclass(frozen=True)
class StageSpan:
    """Time of one stage.

    Attributes:
        start_ns: nanoseconds from the arrival of the request.
        pass_number: number of the pass; 0 for other stages.
        nodes: nodes of the plan or of the pass.
        in_advance: whether the target had made the pass before it was asked for.
        queue_ns: wait in the target's queue.
        forward_ns: time in the target's model.
        selection_ns: the target's choice of children.
        new_tokens: tokens that the pass computed.
    """

    stage: Stage
    start_ns: int
    duration_ns: int
    pass_number: int = 0
    nodes: int = 0
    in_advance: bool = False
    queue_ns: int = 0
    forward_ns: int = 0
    selection_ns: int = 0
    new_tokens: int = 0


class ItemOutcome(StrEnum):
    """Reason why an item is not in a list, or that it is."""

    IN_LIST = "in-list"
    UNKNOWN_ITEM = "unknown-item"
    EXCLUDED = "excluded"
    SEEN = "seen"
    NOT_ALLOWED = "not-allowed"
    ITEMS_PER_PATH = "items-per-path"
    BEYOND_K = "beyond-k"
    OUTSIDE_BEAM = "outside-beam"


@dataclass(frozen=True)
class PathStep:
    """Step of an item's path.

    Attributes:
        log_p: log-probability of the code after the prefix before it.
        score: cumulative log-probability of the prefix.
        rank: rank among the candidates of its level, from 1; 0 below the level on which the prefix was lost.
        beam_width: beam width of the level.
    """

    code: int
    log_p: float
    score: float
    rank: int
    beam_width: int


@dataclass(frozen=True)
class ItemExplanation:
    """Answer to why an item is not in the list.

    Attributes:
        path: its steps; empty for an unknown item.
        lost_level: level on which the search lost its prefix, from 1; 0 if it did not.
        rank: rank in the list without a limit k; 0 if the search did not find it.
        wider_rank: rank in the wider list of the target alone; 0 if it is not there.
        items_per_path: most items of its path in the list; None without a limit.
    """

    item_id: str
    outcome: ItemOutcome
    path: Sequence[PathStep] = ()
    lost_level: int = 0
    rank: int = 0
    wider_rank: int = 0
    items_per_path: int | None = None

    @property
    def score(self) -> float | None:
        """Return the log-probability of its path; None for an unknown item."""
        return self.path[-1].score if self.path else None

    @property
    def description(self) -> str:
        """Return the answer as text for people."""
        match self.outcome:
            case ItemOutcome.IN_LIST:
                return f"the list has the item at rank {self.rank}"
            case ItemOutcome.ITEMS_PER_PATH:
                return f"at most {self.items_per_path} items of its code path are listed, and others come first"
            case ItemOutcome.BEYOND_K:
                return f"the search found the item at rank {self.rank}, below the first k"
            case ItemOutcome.OUTSIDE_BEAM:
                lost = self.path[self.lost_level - 1]
                place = f"rank {lost.rank} among the candidates, and {lost.beam_width} were kept"
                return f"the search lost its path on level {self.lost_level}: {place}"
        return _DESCRIPTIONS[self.outcome]


_DESCRIPTIONS = {
    ItemOutcome.UNKNOWN_ITEM: "this version of the catalogue does not know the item",
    ItemOutcome.EXCLUDED: "the request excludes the item",
    ItemOutcome.SEEN: "the item is in the history, and the request excludes those",
    ItemOutcome.NOT_ALLOWED: "the request allows other items only",
}


@dataclass(frozen=True)
class Explanation:
    """List with its explanation.

    Attributes:
        items: explanation of each item that was asked for.
        wider_beam_width: beam width of the wider list; 0 if none was made.
        history_item_ids: items of the history in the prompt, oldest first.
        titles: titles by item id.
    """

    recommendation: Recommendation
    tree: SearchTree
    stages: Sequence[StageSpan]
    items: Sequence[ItemExplanation]
    wider_beam_width: int
    history_item_ids: Sequence[str]
    titles: Mapping[str, str]
