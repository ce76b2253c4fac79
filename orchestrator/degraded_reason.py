"""Reasons why a list is degraded."""

from __future__ import annotations

from enum import StrEnum


class DegradedReason(StrEnum):
    """Component that a list was made without, or reduction of its search.

    The values are label values of `atspeed_degraded_total`. The proto's `DegradedReason` has the same names.
    """

    BEAM_WIDTH_NARROWED = "beam_width_narrowed"
    SPECULATION_DISABLED = "speculation_disabled"
    PLAN_UNANSWERED = "plan_unanswered"
    DRAFT_CIRCUIT_OPEN = "draft_circuit_open"
    DRAFT_REPLY_INVALID = "draft_reply_invalid"
    DRAFT_UNAVAILABLE = "draft_unavailable"
    DRAFT_DEADLINE = "draft_deadline"
    DRAFT_BUSY = "draft_busy"
    DRAFT_VERSION = "draft_version"
    DRAFT_REFUSED = "draft_refused"
    DRAFT_ACCESS_DENIED = "draft_access_denied"
    DRAFT_FAILED = "draft_failed"

    @property
    def description(self) -> str:
        """Return the reason as text for people."""
        return _DESCRIPTIONS[self]


_DESCRIPTIONS = {
    DegradedReason.BEAM_WIDTH_NARROWED: "the service is busy, so fewer beams were searched",
    DegradedReason.SPECULATION_DISABLED: "speculation is disabled, because lists differed from the target's own",
    DegradedReason.PLAN_UNANSWERED: "the target had no valid answer to a plan, so the search ran without one",
    DegradedReason.DRAFT_CIRCUIT_OPEN: "the draft failed several times in a row and is not called for a while",
    DegradedReason.DRAFT_REPLY_INVALID: "the draft's reply is invalid",
    DegradedReason.DRAFT_UNAVAILABLE: "no draft replica could answer",
    DegradedReason.DRAFT_DEADLINE: "the draft did not answer in time",
    DegradedReason.DRAFT_BUSY: "the draft replicas are busy",
    DegradedReason.DRAFT_VERSION: "no draft replica serves the orchestrator's model version",
    DegradedReason.DRAFT_REFUSED: "the draft refused the call as invalid",
    DegradedReason.DRAFT_ACCESS_DENIED: "the draft does not accept the orchestrator's credentials",
    DegradedReason.DRAFT_FAILED: "the draft's call failed",
}
