"""What passes cost: counted by the model services, summed by the draft and the orchestrator."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class PassStats:
    """What passes cost. Times in nanoseconds; tokens counted once each.

    lookup_ns: waiting for cached KV, of a first pass. queue_ns: waiting for the worker thread. forward_ns: reading the tokens,
    KV moved in and out included; requests that share a pass each have all of its time. batch_requests: how many shared it; of
    several passes the most. batch_tokens: what the passes computed for all who shared them, padding included.
    """

    queue_ns: int = 0
    forward_ns: int = 0
    selection_ns: int = 0
    new_tokens: int = 0
    memory_cached_tokens: int = 0
    redis_cached_tokens: int = 0
    batch_requests: int = 0
    batch_tokens: int = 0
    lookup_ns: int = 0

    def __add__(self, other: PassStats) -> PassStats:
        """Both together."""
        sums = {name: getattr(self, name) + getattr(other, name) for name in self.__dataclass_fields__}
        return PassStats(**sums | {"batch_requests": max(self.batch_requests, other.batch_requests)})
