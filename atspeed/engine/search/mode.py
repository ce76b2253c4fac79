"""The modes of a list, and the properties of each one.

A mode names a verification policy. Requests, planner, shadow checks, replies, clients and benchmarks read its properties here;
`orchestrator/search/policies.py` has the policies themselves.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum, StrEnum, auto


class Guarantee(Enum):
    """The relation of a mode's list to the list that the target alone returns.

    Attributes:
        EXACT: the same list, or for a sample the same law, whatever was proposed.
        EXACT_UNLESS_SUBSTITUTED: the same list as long as the policy replaced no beam.
        NONE: another law; the reply is never exact.
    """

    EXACT = auto()
    EXACT_UNLESS_SUBSTITUTED = auto()
    NONE = auto()


@dataclass(frozen=True)
class ModeProperties:
    """The properties of a mode.

    Attributes:
        guarantee: the relation to the target's own list.
        speculates: whether the draft is asked, and whether the target may prefetch.
        sized: whether the planner may choose the size of a plan and cut it. The samples of a level cannot be cut.
        shadow_checked: whether lists of this mode are compared with the target's own in production.
        fields: the optional fields of a request that belong to this mode.
    """

    guarantee: Guarantee
    speculates: bool = True
    sized: bool = True
    shadow_checked: bool = False
    fields: frozenset[str] = frozenset()


class Mode(StrEnum):
    """The verification policy of a list; the proto's `Mode` explains each one. The values are label values of metrics."""

    TARGET_ONLY = "target-only"
    STRICT = "strict"
    TOLERANCE = "tolerance"
    RELAXED_SAMPLING = "relaxed-sampling"
    EXACT_SAMPLING = "exact-sampling"

    @property
    def properties(self) -> ModeProperties:
        """Return the properties of the mode."""
        return MODES[self]

    @property
    def samples(self) -> bool:
        """Return whether the mode takes a seed and a temperature."""
        return "seed" in self.properties.fields


MODES = {
    Mode.TARGET_ONLY: ModeProperties(Guarantee.EXACT, speculates=False, sized=False),
    Mode.STRICT: ModeProperties(Guarantee.EXACT, shadow_checked=True),
    Mode.TOLERANCE: ModeProperties(Guarantee.EXACT_UNLESS_SUBSTITUTED, fields=frozenset({"tolerance"})),
    Mode.RELAXED_SAMPLING: ModeProperties(Guarantee.NONE, sized=False, fields=frozenset({"temperature", "seed"})),
    Mode.EXACT_SAMPLING: ModeProperties(Guarantee.EXACT, fields=frozenset({"temperature", "seed"})),
}
