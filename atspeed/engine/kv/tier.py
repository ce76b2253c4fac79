"""The contract of a tier of the prefix cache below memory."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from atspeed.engine.arrays import KvArray


@dataclass(frozen=True)
class TierStatistics:
    """Counters that every tier has, memory included, since it was made.

    Attributes:
        hits: blocks that were asked for and found.
        misses: blocks that were asked for and not found.
    """

    hits: int = 0
    misses: int = 0


class KvTier(Protocol):
    """A tier below memory. `PrefixCache` reads the tiers in order and writes to all of them.

    A new tier is a class with these members, and an entry in the list that `KvTiers.host` builds
    (`atspeed/model_host/loaded_model.py`). Metrics, traces and replies take its name from here.

    Except for `erase`, no method raises because of the state of the storage: a failure is a miss. The keys of one call belong
    to one prompt: first those of the shared prefix, then those of one user.
    """

    @property
    def name(self) -> str:
        """Return the tier's name: a label of metrics and a key of `cached_tokens_by_tier`."""

    @property
    def statistics(self) -> TierStatistics:
        """Return the counters as they are now."""

    @property
    def failures(self) -> int:
        """Return the number of calls without an answer: failed, or not made after a failure."""

    async def get_chain(self, keys: Sequence[bytes]) -> list[KvArray]:
        """Return the blocks of the longest leading run of `keys` that is stored and valid, each a read-only array of its own."""

    async def put(self, blocks: Mapping[bytes, KvArray]) -> None:
        """Store blocks of one prompt by key, as many as possible."""

    async def erase(self, user_keys: Collection[bytes]) -> None:
        """Erase all blocks of these users, one or more. Raises RedisError or OSError when that was not done."""
