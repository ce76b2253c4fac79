"""Enums of the contract as text. Wherever the client takes one, its value does as well."""

from __future__ import annotations

from enum import StrEnum
from typing import Any, Generic, TypeVar

from google.protobuf.descriptor import EnumDescriptor, FileDescriptor

from atspeed_client.v1 import explanation_pb2, types_pb2
from atspeed_client.v1 import recommendation_pb2 as pb

_Enum = TypeVar("_Enum", bound=StrEnum)


class Mode(StrEnum):
    """Verification policy of a list."""

    UNKNOWN = "unknown"
    TARGET_ONLY = "target-only"
    STRICT = "strict"
    TOLERANCE = "tolerance"
    RELAXED_SAMPLING = "relaxed-sampling"
    EXACT_SAMPLING = "exact-sampling"


class Priority(StrEnum):
    """Priority of a request when the service is busy."""

    INTERACTIVE = "interactive"
    BATCH = "batch"


class Track(StrEnum):
    """Release track."""

    STABLE = "stable"
    CANARY = "canary"


class Origin(StrEnum):
    """Way in which the search found an item."""

    UNKNOWN = "unknown"
    DRAFTED = "drafted"
    RECOVERED = "recovered"
    FORCED = "forced"


class ColdStart(StrEnum):
    """Reason for a list without any item of the user's history."""

    UNKNOWN = "unknown"
    NO_STORED_HISTORY = "no-stored-history"
    EMPTY_HISTORY = "empty-history"
    UNKNOWN_ITEMS = "unknown-items"


class FewerThanK(StrEnum):
    """Reason for a list of fewer than k items."""

    UNKNOWN = "unknown"
    FILTERED = "filtered"
    ITEMS_PER_PATH = "items-per-path"
    SEARCH = "search"


class DegradedReason(StrEnum):
    """Component that a list was made without, or reduction of its search."""

    UNKNOWN = "unknown"
    BEAM_WIDTH_NARROWED = "beam-width-narrowed"
    SPECULATION_DISABLED = "speculation-disabled"
    PLAN_UNANSWERED = "plan-unanswered"
    DRAFT_CIRCUIT_OPEN = "draft-circuit-open"
    DRAFT_REPLY_INVALID = "draft-reply-invalid"
    DRAFT_UNAVAILABLE = "draft-unavailable"
    DRAFT_DEADLINE = "draft-deadline"
    DRAFT_BUSY = "draft-busy"
    DRAFT_VERSION = "draft-version"
    DRAFT_REFUSED = "draft-refused"
    DRAFT_ACCESS_DENIED = "draft-access-denied"
    DRAFT_FAILED = "draft-failed"


class NodeOrigin(StrEnum):
    """Way in which a node came into a search."""

    UNKNOWN = "unknown"
    ROOT = "root"
    DRAFTED = "drafted"
    PREFETCHED = "prefetched"
    RECOVERED = "recovered"
    FORCED = "forced"
    UNEVALUATED = "unevaluated"


class Stage(StrEnum):
    """Stage of a request."""

    UNKNOWN = "unknown"
    ADMISSION = "admission"
    HISTORY = "history"
    PLAN = "plan"
    PASS = "pass"  # noqa: S105 - a pass of the target
    SELECTION = "selection"


class ItemOutcome(StrEnum):
    """Reason why an item is not in a list, or that it is."""

    UNKNOWN = "unknown"
    IN_LIST = "in-list"
    UNKNOWN_ITEM = "unknown-item"
    EXCLUDED = "excluded"
    SEEN = "seen"
    NOT_ALLOWED = "not-allowed"
    ITEMS_PER_PATH = "items-per-path"
    BEYOND_K = "beyond-k"
    OUTSIDE_BEAM = "outside-beam"


class ScoringRule(StrEnum):
    """Rule by which a code's log-probability is normalised."""

    UNKNOWN = "unknown"
    VOCAB = "vocab"
    TRIE = "trie"
    CODES = "codes"


class Values(Generic[_Enum]):
    """Values of one enum of the contract, to and from text.

    A number that is not set, or that only a newer service knows, is `unknown`.
    """

    def __init__(self, known: type[_Enum], contract: EnumDescriptor) -> None:
        prefix = contract.values[0].name.removesuffix("UNSPECIFIED")
        numbers = {value.name.removeprefix(prefix): value.number for value in contract.values}
        self._numbers = {one: numbers.get(one.name, 0) for one in known}
        self._values = {number: one for one, number in self._numbers.items()}

    def number(self, value: _Enum) -> Any:
        """Return the number of a value."""
        return self._numbers[value]

    def value(self, number: int) -> _Enum:
        """Return the value of a number."""
        return self._values.get(number) or self._values[0]


def _values(known: type[_Enum], name: str, file: FileDescriptor = pb.DESCRIPTOR) -> Values[_Enum]:
    return Values(known, file.enum_types_by_name[name])


MODES = _values(Mode, "Mode")
ORIGINS = _values(Origin, "Origin")
COLD_STARTS = _values(ColdStart, "ColdStart")
FEWER_THAN_K = _values(FewerThanK, "FewerThanKReason")
DEGRADED_REASONS = _values(DegradedReason, "DegradedReason")
NODE_ORIGINS = _values(NodeOrigin, "NodeOrigin", explanation_pb2.DESCRIPTOR)
STAGES = _values(Stage, "Stage", explanation_pb2.DESCRIPTOR)
ITEM_OUTCOMES = _values(ItemOutcome, "ItemOutcome", explanation_pb2.DESCRIPTOR)
SCORING_RULES = _values(ScoringRule, "ScoringRule", types_pb2.DESCRIPTOR)
