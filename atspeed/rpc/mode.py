"""How a list is made: the contract's modes as plain words, for the orchestrator and its callers alike."""

from __future__ import annotations

from enum import StrEnum


class Mode(StrEnum):
    """How a list is made; the proto's `Mode` says what each means. The values are label values of metrics."""

    TARGET_ONLY = "target-only"
    STRICT = "strict"
    TOLERANCE = "tolerance"
    RELAXED_SAMPLING = "relaxed-sampling"
    EXACT_SAMPLING = "exact-sampling"

    @property
    def samples(self) -> bool:
        """Whether the mode takes a seed and a temperature."""
        return self in {Mode.RELAXED_SAMPLING, Mode.EXACT_SAMPLING}
