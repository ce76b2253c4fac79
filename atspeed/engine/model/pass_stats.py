"""Pass stats: tokens and times, counted by the model services."""

from __future__ import annotations

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
        # Written out: a list adds up its passes several times.
        cached = dict(self.cached_tokens_by_tier)
        for tier, tokens in other.cached_tokens_by_tier.items():
            cached[tier] = cached.get(tier, 0) + tokens
        return PassStats(
            queue_ns=self.queue_ns + other.queue_ns,
            forward_ns=self.forward_ns + other.forward_ns,
            selection_ns=self.selection_ns + other.selection_ns,
            new_tokens=self.new_tokens + other.new_tokens,
            cached_tokens_by_tier=cached,
            batch_requests=max(self.batch_requests, other.batch_requests),
            batch_tokens=self.batch_tokens + other.batch_tokens,
            lookup_ns=self.lookup_ns + other.lookup_ns,
            unordered_passes=self.unordered_passes + other.unordered_passes,
        )


COUNTS = tuple(one.name for one in fields(PassStats) if one.name != "cached_tokens_by_tier")
"""Names of the fields that are plain counts."""
