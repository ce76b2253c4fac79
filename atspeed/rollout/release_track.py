"""The bundles that a service serves side by side: the stable one, and a canary that a share of the users meets first."""

from __future__ import annotations

from enum import StrEnum
from typing import Any

import grpc

from atspeed.errors import InvalidArgumentError

TRACK_HEADER = "x-atspeed-track"
"""Metadata by which a call asks for a track, whoever's it is."""


class Track(StrEnum):
    """Which of the two. The values are label values of metrics."""

    STABLE = "stable"
    CANARY = "canary"

    @classmethod
    def asked_by(cls, context: grpc.aio.ServicerContext[Any, Any]) -> Track | None:
        """The track that a call's metadata ask for, if they do. Raises InvalidArgumentError where there is no such track."""
        named = [str(value) for key, value in context.invocation_metadata() or () if key == TRACK_HEADER]
        if not named:
            return None
        if len(named) > 1 or named[0] not in set(cls):
            raise InvalidArgumentError(TRACK_HEADER, f"must be one of {', '.join(cls)}")
        return cls(named[0])
