"""User affinity: a user's calls go to the replica whose memory holds the user's keys and values, as long as that is fair.

Where a call goes never changes its answer, only what has to be computed for it.
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
    """Decides call by call whether a key counts: at most `most_at_once` calls with one key are under way by it.

    So a user who asks for everything at once keeps no replica from the others: what is beyond goes to replicas in turn.
    """

    def __init__(self, most_at_once: int) -> None:
        self._most_at_once = most_at_once
        self._under_way: Counter[str] = Counter()

    @contextmanager
    def hold(self, key: str) -> Iterator[str]:
        """For the time of a call: `key` where the call goes by it, else the empty string."""
        if not key or self._under_way[key] >= self._most_at_once:
            yield ""
            return
        self._under_way[key] += 1
        try:
            yield key
        finally:
            self._under_way[key] -= 1
            if not self._under_way[key]:
                del self._under_way[key]

    def __len__(self) -> int:
        """Keys with calls under way."""
        return len(self._under_way)


@dataclass(frozen=True)
class Route(Generic[Stub]):
    """One call's way: the stub to call, and metadata that belongs to the call."""

    stub: Stub
    metadata: tuple[tuple[str, str], ...] = ()


class Routes(Generic[Stub]):
    """The ways to a service's replicas: in turn and, where there is a stub on such a channel, by key."""

    def __init__(self, in_turn: Stub, by_key: Stub | None = None, *, most_at_once: int = 0) -> None:
        self.in_turn = in_turn
        self._by_key = by_key
        self._affinity = Affinity(most_at_once if by_key is not None else 0)

    @contextmanager
    def route(self, key: str) -> Iterator[Route[Stub]]:
        """The way of a call, for as long as it lasts. A call that is tried again should not go by its key again."""
        with self._affinity.hold(key) as held:
            if held and self._by_key is not None:
                yield Route(self._by_key, ((KEY_HEADER, held),))
            else:
                yield Route(self.in_turn)
