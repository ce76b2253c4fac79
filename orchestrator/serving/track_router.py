"""Release tracks: the state of each one, and the choice between them by user."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass

from atspeed.engine.bundle.bundle import Bundle
from atspeed.errors import FailedPreconditionError
from atspeed.rollout.release_track import TRACK_HEADER, Track
from orchestrator.serving.shadow import ShadowChecks
from orchestrator.serving.snapshots import Snapshots
from orchestrator.speculation_breaker import SpeculationBreaker


@dataclass(frozen=True)
class TrackState:
    """State of one release track. Each track has its own breaker, since each has its own bundle."""

    track: Track
    snapshots: Snapshots
    speculation_breaker: SpeculationBreaker
    shadow: ShadowChecks


class TrackRouter:
    """Router of requests to release tracks.

    Args:
        states: the state of every track.
        share: share of the users that the canary serves while there is one.
    """

    def __init__(self, states: Mapping[Track, TrackState], share: float) -> None:
        self._states = states
        self._share = share

    def __getitem__(self, track: Track) -> TrackState:
        return self._states[track]

    @property
    def share(self) -> float:
        """Return the share of the users that the canary serves now."""
        return self._share if self._states[Track.CANARY].snapshots.ready else 0.0

    def of(self, subject: bytes, asked: Track | None = None) -> TrackState:
        """Return the track of a subject's requests now. asked: the track that the call's metadata ask for.

        See `RecommendParams.subject`. Raises FailedPreconditionError if the call asks for a canary and no target serves one.
        """
        if asked is None:
            asked = Track.CANARY if bucket(subject) < self.share else Track.STABLE
        elif asked is Track.CANARY and not self._states[asked].snapshots.ready:
            raise FailedPreconditionError(f"{TRACK_HEADER}: there is no canary that a target serves")
        return self._states[asked]

    async def activate(self, bundle: Bundle, track: Track) -> None:
        """Serve a bundle on a track as soon as a target does. Raises BundleError or CatalogueError for an invalid bundle."""
        await self._states[track].snapshots.activate(bundle)

    def deactivate(self, track: Track) -> None:
        """Stop serving on a track. Running requests end on their snapshot."""
        self._states[track].snapshots.deactivate()

    async def close(self) -> None:
        """Close all tracks, even while requests run."""
        for state in self._states.values():
            await state.shadow.close()
            await state.snapshots.close()


def bucket(subject: bytes) -> float:
    """Return the fixed place of a subject in [0, 1). Places are spread evenly, and equal in every process.

    So a larger share moves subjects to the canary and none away from it.
    """
    number = int.from_bytes(hashlib.blake2b(subject, digest_size=8, person=b"atspeed-canary").digest())
    return (number >> 11) / 2**53  # a float has 53 bits
