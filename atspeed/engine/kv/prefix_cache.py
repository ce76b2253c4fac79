"""Prefix KV in two tiers as one cache: memory first, then Redis."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass

from atspeed.engine.arrays import KvArray
from atspeed.engine.kv.fetch_cost import FetchPolicy
from atspeed.engine.kv.memory_cache import NO_OWNER, KvLayout, MemoryKvCache, is_shared_prefix_key, owner_of
from atspeed.engine.kv.redis_store import KvStore

_logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class CachedPrefix:
    """What the tiers hold of a prompt's beginning.

    blocks: read-only [layers, 2, block_tokens, kv_heads, head_dim] each, in prompt order.
    memory_tokens, redis_tokens: how many prompt tokens came from which tier, memory's first.
    """

    blocks: tuple[KvArray, ...]
    memory_tokens: int
    redis_tokens: int


class PrefixCache:
    """Memory and, where there is a `store`, Redis as one cache. For the event loop only.

    The store never fails a request and delays it by its read timeout at most; `fetching` says when it is read and written.
    Writes are background tasks, up to `max_pending_writes` of them; beyond that a write is dropped and counted. `memory` and
    `store` stay the caller's.

    For `hold_seconds` after `forget`, nothing of that owner is kept: passes that had begun before may still bring blocks.
    """

    hold_seconds = 60.0

    def __init__(
        self,
        layout: KvLayout,
        memory: MemoryKvCache,
        store: KvStore | None = None,
        *,
        fetching: FetchPolicy | None = None,
        max_pending_writes: int = 8,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._layout = layout
        self._memory = memory
        self._store = store
        self.fetching = fetching or FetchPolicy(layout.bytes_per_token)
        self._max_pending_writes = max_pending_writes
        self._clock = clock
        self._keeps_owned = True
        # Until when nothing of an owner is kept.
        self._forgotten: dict[bytes, float] = {}
        # With the owners of what they write; the event loop itself only keeps weak references to tasks.
        self._writes: dict[asyncio.Task[None], bytes] = {}
        self._dropped_writes = 0
        self._closed = False

    @property
    def pending_writes(self) -> int:
        """Writes to the store that are under way."""
        return len(self._writes)

    @property
    def dropped_writes(self) -> int:
        """Writes given up because too many were pending, or because the cache was closed."""
        return self._dropped_writes

    async def lookup(self, keys: Sequence[bytes]) -> CachedPrefix:
        """The longest cached beginning of a prompt with these block keys. What the store adds moves up into memory."""
        found = self._memory.get_chain(keys)
        fetched = await self._fetch(keys[len(found) :], len(found))
        kept = self._keepable(keys)[: len(found) + len(fetched)]
        new = fetched[: max(0, len(kept) - len(found))]
        if new:
            fetched = [*self._memory.put_chain(kept, new), *fetched[len(new) :]]
        step = self._layout.block_tokens
        return CachedPrefix((*found, *fetched), len(found) * step, len(fetched) * step)

    async def _fetch(self, missing: Sequence[bytes], known: int) -> list[KvArray]:
        """What the store has of the blocks after the first `known`, where reading it is worth while."""
        step = self._layout.block_tokens
        if self._store is None or not missing or not self.fetching.should_read(len(missing) * step, known * step):
            return []
        begun, failures = time.perf_counter_ns(), self._store.failures
        fetched = await self._store.get_chain(missing)
        if self._store.failures == failures:  # else the store leaves Redis alone for a while by itself
            self.fetching.observe(len(missing) * step, len(fetched) * step, time.perf_counter_ns() - begun)
        return fetched

    def remember(self, keys: Sequence[bytes], new: Sequence[KvArray]) -> None:
        """Keep the blocks that `lookup` did not find: in memory before this returns, in the store some time later.

        keys: of the prompt's whole blocks. new: the blocks of the last `len(new)` of them, as `copy_blocks` makes them; they
        are not copied again. Raises ValueError when there are more than keys.
        """
        found = len(keys) - len(new)
        keys = self._keepable(keys)
        new = new[: max(0, len(keys) - found)]
        last = keys[max(0, len(keys) - len(new)) :]
        # Another request with the same prefix may have been quicker; then its write is under way.
        known = [key in self._memory for key in last]
        kept = self._memory.put_chain(keys, new)
        unknown = {key: block for key, block, was_known in zip(last, kept, known, strict=True) if not was_known}
        if unknown and self._store and self.fetching.should_write(len(keys) * self._layout.block_tokens):
            self._write(unknown)

    @property
    def accepts_user_blocks(self) -> bool:
        """Whether blocks of stored users are kept. Only where someone says when a user is to be forgotten; False drops them."""
        return self._keeps_owned

    @accepts_user_blocks.setter
    def accepts_user_blocks(self, value: bool) -> None:
        self._keeps_owned = value
        if not value:
            self._memory.drop(lambda key: owner_of(key) != NO_OWNER)

    async def forget(self, owners: Collection[bytes]) -> None:
        """Drop users' blocks, here and in the store, with those that are on their way there. Looks at all keys in memory, once.

        Raises RedisError or OSError where the store did not do it; here it is done then, and it should be called again.
        """
        now = self._clock()
        self._forgotten = {tag: until for tag, until in self._forgotten.items() if until > now}
        self._forgotten |= dict.fromkeys(owners, now + self.hold_seconds)
        gone = frozenset(owners)
        self._memory.drop(lambda key: owner_of(key) in gone)
        if self._store and gone:
            if writing := {task for task, owner in self._writes.items() if owner in gone}:
                await asyncio.wait(writing)
            await self._store.forget(gone)

    def _keepable(self, keys: Sequence[bytes]) -> Sequence[bytes]:
        """A chain, or only what of it is nobody's while its owner's may not be kept."""
        owner = owner_of(keys[-1]) if keys else NO_OWNER
        held = self._forgotten.get(owner, -float("inf")) > self._clock()
        if owner == NO_OWNER or (self._keeps_owned and not held):
            return keys
        return keys[: is_shared_prefix_key(keys)]

    async def close(self, timeout_seconds: float = 2.0) -> None:
        """Give pending writes `timeout_seconds` to end, then cancel them. Later writes are dropped."""
        self._closed = True
        if not self._writes:
            return
        _, late = await asyncio.wait(self._writes, timeout=timeout_seconds)
        for task in late:
            task.cancel()
        await asyncio.gather(*late, return_exceptions=True)

    def _write(self, blocks: Mapping[bytes, KvArray]) -> None:
        if self._store is None or not blocks:
            return
        if self._closed or len(self._writes) >= self._max_pending_writes:
            self._dropped_writes += 1
            return
        task = asyncio.get_running_loop().create_task(self._store.put(blocks), name="kv-write")
        self._writes[task] = owner_of(list(blocks)[-1])
        task.add_done_callback(self._written)

    def _written(self, task: asyncio.Task[None]) -> None:
        self._writes.pop(task, None)
        if not task.cancelled() and (error := task.exception()):
            _logger.error("KV write failed", exc_info=error)
