"""How a list is made: the public choice of a verification policy, and of whether to draft at all."""

from __future__ import annotations

from enum import StrEnum


class Mode(StrEnum):
    """How a list is made; see the proto's `Mode`."""

    TARGET_ONLY = "target-only"
    STRICT = "strict"
    TOLERANCE = "tolerance"
    RELAXED_SAMPLING = "relaxed-sampling"
    EXACT_SAMPLING = "exact-sampling"

    @property
    def samples(self) -> bool:
        """Whether the mode takes a seed and a temperature."""
        return self in {Mode.RELAXED_SAMPLING, Mode.EXACT_SAMPLING}
