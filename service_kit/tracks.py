"""The bundles that a service serves side by side: the stable one, and a canary that a share of the users meets first."""

from __future__ import annotations

from enum import StrEnum


class Track(StrEnum):
    """Which of the two. The values are label values of metrics."""

    STABLE = "stable"
    CANARY = "canary"
