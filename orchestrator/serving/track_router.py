"""Stable and canary: what serves the requests of each track, and whose requests are served by the canary."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass

from atspeed.engine.bundle.manifest import Bundle
from atspeed.errors import FailedPreconditionError
from atspeed.rollout.release_track import TRACK_HEADER, Track
from orchestrator.serving.shadow import ShadowChecks
from orchestrator.serving.snapshots import Snapshots
from orchestrator.speculation_breaker import SpeculationBreaker


@dataclass(frozen=True)
class TrackState:
    """What serves the requests of one track: trust in its draft is its own, as its lists are."""

    track: Track
    snapshots: Snapshots
    speculation_breaker: SpeculationBreaker
    shadow: ShadowChecks


class TrackRouter:
    """One for each track, and the choice between them. share: of the users, whom the canary serves while there is one."""

    def __init__(self, lanes: Mapping[Track, TrackState], share: float) -> None:
        self._lanes = lanes
        self._share = share

    def __getitem__(self, track: Track) -> TrackState:
        return self._lanes[track]

    @property
    def share(self) -> float:
        """Of the users, whom the canary serves now."""
        return self._share if self._lanes[Track.CANARY].snapshots.ready else 0.0

    def of(self, subject: bytes, asked: Track | None = None) -> TrackState:
        """What serves the requests of a subject now; see `RecommendParams.subject`. asked: a track that they want whoever's they are.

        Raises FailedPreconditionError where a canary is asked for and there is none that a target serves.
        """
        if asked is None:
            asked = Track.CANARY if bucket(subject) < self.share else Track.STABLE
        elif asked is Track.CANARY and not self._lanes[asked].snapshots.ready:
            raise FailedPreconditionError(f"{TRACK_HEADER}: there is no canary that a target serves")
        return self._lanes[asked]

    async def activate(self, bundle: Bundle, track: Track) -> None:
        """Serve a bundle on a track when a target does. Raises BundleError or CatalogueError where that cannot be."""
        await self._lanes[track].snapshots.activate(bundle)

    def deactivate(self, track: Track) -> None:
        """Serve none on this track; requests that run end on theirs."""
        self._lanes[track].snapshots.deactivate()

    async def close(self) -> None:
        """Close all, whoever still holds one."""
        for lane in self._lanes.values():
            await lane.shadow.close()
            await lane.snapshots.close()


def bucket(subject: bytes) -> float:
    """Where a subject stands in [0, 1): subjects are spread evenly, and each stands at one place in every process for ever.

    So raising a share moves subjects to the canary and none away from it.
    """
    number = int.from_bytes(hashlib.blake2b(subject, digest_size=8, person=b"atspeed-canary").digest())
    return (number >> 11) / 2**53  # as many bits as a float has
