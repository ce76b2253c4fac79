"""Pass stats: tokens and times, counted by the model services."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field, fields


@dataclass(frozen=True)
class PassStats:
    """Tokens and times of one pass, or of several together. Times are in nanoseconds; each token counts once.

    Attributes:
        queue_ns: the wait for the worker thread.
        forward_ns: the time in the model, moving KV in and out included. Co-batched requests each have all of it.
        selection_ns: the choice of the best children.
        new_tokens: tokens that were computed.
        cached_tokens_by_tier: prompt tokens whose KV was cached, by the name of the tier.
        batch_requests: requests that shared the pass; the maximum of several passes.
        batch_tokens: tokens that were computed for all co-batched requests, padding included.
        lookup_ns: the wait for cached KV, in a first pass.
        unordered_passes: passes on a replica where the check of plan invariance failed.
    """

    queue_ns: int = 0
    forward_ns: int = 0
    selection_ns: int = 0
    new_tokens: int = 0
    cached_tokens_by_tier: Mapping[str, int] = field(default_factory=dict)
    batch_requests: int = 0
    batch_tokens: int = 0
    lookup_ns: int = 0
    unordered_passes: int = 0

    @property
    def cached_tokens(self) -> int:
        """Return the prompt tokens whose KV was cached, in any tier."""
        return sum(self.cached_tokens_by_tier.values())

    def __add__(self, other: PassStats) -> PassStats:
        """Return the statistics of both together."""
        sums = {name: getattr(self, name) + getattr(other, name) for name in COUNTS}
        sums["batch_requests"] = max(self.batch_requests, other.batch_requests)
        cached = Counter(self.cached_tokens_by_tier)
        cached.update(other.cached_tokens_by_tier)
        return PassStats(**sums, cached_tokens_by_tier=dict(cached))


COUNTS = tuple(one.name for one in fields(PassStats) if one.name != "cached_tokens_by_tier")
"""Names of the fields that are plain counts."""
