"""What passes cost: counted by the model services, summed by the draft and the orchestrator."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class PassCost:
    """What passes cost. Times in nanoseconds; tokens counted once each.

    queue_ns: waiting for cached KV and for the worker thread. forward_ns: reading the tokens, KV moved in and out included.
    """

    queue_ns: int = 0
    forward_ns: int = 0
    selection_ns: int = 0
    new_tokens: int = 0
    memory_cached_tokens: int = 0
    redis_cached_tokens: int = 0

    def __add__(self, other: PassCost) -> PassCost:
        """Both together."""
        return PassCost(*(getattr(self, name) + getattr(other, name) for name in self.__dataclass_fields__))
