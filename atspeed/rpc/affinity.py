"""User affinity: a user's calls go to the replica that holds the user's KV.

The replica never changes the answer of a call, only the work that is needed for it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Generic, TypeVar

from atspeed.rpc.channels import KEY_HEADER

Stub = TypeVar("Stub")


class Affinity:
    """Limits the calls that follow one key at the same time.

    One user with many calls at once could otherwise fill a replica. The calls beyond the limit go round-robin.
    """

    def __init__(self, max_calls: int) -> None:
        self._max_calls = max_calls
        self._running: Counter[str] = Counter()

    @contextmanager
    def hold(self, key: str) -> Iterator[str]:
        """Yield `key` if the call may follow it, else the empty string. The block lasts as long as the call."""
        if not key or self._running[key] >= self._max_calls:
            yield ""
            return
        self._running[key] += 1
        try:
            yield key
        finally:
            self._running[key] -= 1
            if not self._running[key]:
                del self._running[key]

    def __len__(self) -> int:
        """Return the number of keys with running calls."""
        return len(self._running)


@dataclass(frozen=True)
class Route(Generic[Stub]):
    """The route of one call.

    Attributes:
        stub: stub to call.
        metadata: metadata of the call.
    """

    stub: Stub
    metadata: tuple[tuple[str, str], ...] = ()


class Routes(Generic[Stub]):
    """The routes to a service's replicas: round-robin, and by key if there is a stub on a channel `by_key`."""

    def __init__(self, in_turn: Stub, by_key: Stub | None = None, *, max_calls: int = 0) -> None:
        self.in_turn = in_turn
        self._by_key = by_key
        self._affinity = Affinity(max_calls if by_key is not None else 0)

    @contextmanager
    def route(self, key: str) -> Iterator[Route[Stub]]:
        """Yield the route of a call for its duration. A retry should use `in_turn`, not the key."""
        with self._affinity.hold(key) as held:
            if held and self._by_key is not None:
                yield Route(self._by_key, ((KEY_HEADER, held),))
            else:
                yield Route(self.in_turn)
