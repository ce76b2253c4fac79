"""Release tracks: a stable bundle, and a canary for a share of the users."""

from __future__ import annotations

from enum import StrEnum
from typing import Any

import grpc

from atspeed.errors import InvalidArgumentError

TRACK_HEADER = "x-atspeed-track"
"""Metadata key that selects a track for one call, whatever the user's share."""


class Track(StrEnum):
    """Release track. The values are label values of metrics."""

    STABLE = "stable"
    CANARY = "canary"

    @classmethod
    def asked_by(cls, context: grpc.aio.ServicerContext[Any, Any]) -> Track | None:
        """Return the track in a call's metadata, or None. Raises InvalidArgumentError for an unknown track."""
        named = [str(value) for key, value in context.invocation_metadata() or () if key == TRACK_HEADER]
        if not named:
            return None
        if len(named) > 1 or named[0] not in set(cls):
            raise InvalidArgumentError(TRACK_HEADER, f"must be one of {', '.join(cls)}")
        return cls(named[0])
