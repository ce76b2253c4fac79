"""The prefix cache: KV of prompts in tiers, memory first, then the tiers below it."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass

import structlog

from atspeed.engine.arrays import KvArray
from atspeed.engine.kv.fetch_policy import FetchPolicy, RecomputeNs
from atspeed.engine.kv.memory_cache import NO_USER_KEY, KvLayout, MemoryKvCache, shared_prefix_length, user_key_of
from atspeed.engine.kv.page_pool import PagePool
from atspeed.engine.kv.tier import KvTier

_log: structlog.stdlib.BoundLogger = structlog.get_logger(__name__)


@dataclass(frozen=True)
class CachedPrefix:
    """The beginning of a prompt that the tiers hold.

    Attributes:
        blocks: read-only [layers, 2, block_tokens, kv_heads, head_dim] each, in prompt order.
        tokens_by_tier: the number of prompt tokens that each tier supplied, by the tier's name; 0 included.
        pages: the device's pages with the blocks before these, which the caller holds.
    """

    blocks: tuple[KvArray, ...]
    tokens_by_tier: Mapping[str, int]
    pages: tuple[int, ...] = ()


class PrefixCache:
    """Device pages, memory and the tiers below it as one cache. For the event loop only.

    Device pages are asked first, if the model has a pool of them. Their users put blocks into them (`keepable`), and take blocks
    from memory and the tiers into pages before a pass.

    A tier below memory never fails a request and delays it by its read timeout at most. Its fetch policy decides when it is
    read and written. Writes are background tasks, up to `max_pending_writes` of them; one more is dropped and counted. Memory
    and tiers stay the caller's to close.

    For `hold_seconds` after `erase`, no block of that user is kept: passes that began earlier may still deliver some.

    Attributes:
        tiers: the tiers below memory, in the order in which they are read.
        pages: the pool of the model's device; None on the host.
        fetch_policies: the fetch policy of each of these tiers, by the tier's name.
        dropped_writes: writes that were given up because too many were pending, or because the cache was closed.
    """

    # Longer than requests run, so that those that began before an erasure have ended. Chosen, not measured.
    hold_seconds = 60.0

    def __init__(
        self,
        layout: KvLayout,
        memory: MemoryKvCache,
        tiers: Sequence[KvTier] = (),
        *,
        fetch_policies: Mapping[str, FetchPolicy] | None = None,
        pages: PagePool | None = None,
        max_pending_writes: int = 8,  # a prompt each; it bounds the blocks that a slow tier keeps in memory
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._layout = layout
        self._memory = memory
        self.tiers = tuple(tiers)
        self.pages = pages
        self.fetch_policies = {tier.name: FetchPolicy() for tier in tiers}
        self.fetch_policies |= fetch_policies or {}
        self._max_pending_writes = max_pending_writes
        self._clock = clock
        self._accepts_user_blocks = True
        # User key -> the time until which no block of the user is kept.
        self._held_until: dict[bytes, float] = {}
        # Write -> the user key of its blocks. The references keep the tasks alive: the event loop's own are weak.
        self._writes: dict[asyncio.Task[None], bytes] = {}
        self.dropped_writes = 0
        self._closed = False

    @property
    def pending_writes(self) -> int:
        """Return the number of writes to tiers that are under way."""
        return len(self._writes)

    def set_recompute_cost(self, recompute_ns: RecomputeNs) -> None:
        """Let the fetch policies compare a read with recomputing. Until then every tier is read."""
        for policy in self.fetch_policies.values():
            policy.recompute_ns = recompute_ns

    async def lookup(self, keys: Sequence[bytes]) -> CachedPrefix:
        """Return the longest cached beginning of a prompt with these block keys. Blocks from below move up into memory."""
        if self.pages is None:
            return await self._lookup_host(keys, 0)
        held = self.pages.hold_chain(keys)
        try:
            found = await self._lookup_host(keys, len(held))
        except BaseException:
            self.pages.release(held)
            raise
        self._memory.touch(keys)  # a chain whose head is used on the device keeps its head in memory too
        tokens = {self.pages.name: len(held) * self._layout.block_tokens, **found.tokens_by_tier}
        return CachedPrefix(found.blocks, tokens, tuple(held))

    async def _lookup_host(self, keys: Sequence[bytes], known: int) -> CachedPrefix:
        """Return the cached blocks after the first `known` of a prompt."""
        step = self._layout.block_tokens
        blocks = self._memory.get_chain(keys[known:])
        in_memory = len(blocks)
        tokens = {self._memory.name: in_memory * step}
        for tier in self.tiers:
            end = known + len(blocks)
            fetched = await self._fetch(tier, keys[end:], end)
            tokens[tier.name] = len(fetched) * step
            blocks = [*blocks, *fetched]
        # An erasure may have come while the tiers were read: what memory keeps is decided now.
        kept = self.keepable(keys)[known : known + len(blocks)]
        if len(kept) > in_memory:
            blocks[in_memory : len(kept)] = self._memory.put_chain(kept, blocks[in_memory : len(kept)])
        return CachedPrefix(tuple(blocks), tokens)

    async def _fetch(self, tier: KvTier, missing: Sequence[bytes], known: int) -> list[KvArray]:
        """Read the blocks after the first `known` from a tier, if its policy expects the read to pay."""
        step, policy = self._layout.block_tokens, self.fetch_policies[tier.name]
        if not missing or not policy.should_read(len(missing) * step, known * step):
            return []
        begun, failures = time.perf_counter_ns(), tier.failures
        fetched = await tier.get_chain(missing)
        if tier.failures == failures:  # a failure says nothing about the time of a read; the tier's breaker handles it
            policy.observe(len(missing) * step, len(fetched) * step, time.perf_counter_ns() - begun)
        return fetched

    def remember(self, keys: Sequence[bytes], new: Sequence[KvArray]) -> None:
        """Keep the blocks that `lookup` did not find: in memory before this returns, in the tiers below some time later.

        Raises ValueError when there are more blocks than keys.

        Args:
            keys: the keys of the prompt's whole blocks.
            new: the blocks of the last `len(new)` keys, as `copy_blocks` makes them; they are not copied again.
        """
        found = len(keys) - len(new)
        keys = self.keepable(keys)
        new = new[: max(0, len(keys) - found)]
        last = keys[max(0, len(keys) - len(new)) :]
        # Another request with the same prefix may have been faster; its write is under way then.
        known = [key in self._memory for key in last]
        kept = self._memory.put_chain(keys, new)
        unknown = {key: block for key, block, was_known in zip(last, kept, known, strict=True) if not was_known}
        if unknown:
            for tier in self.tiers:
                if self.fetch_policies[tier.name].should_write(len(keys) * self._layout.block_tokens):
                    self._write(tier, unknown)

    @property
    def keeps_on_host(self) -> bool:
        """Return whether memory or a tier below it can keep a block at all."""
        return bool(self._memory.limit_bytes or self.tiers)

    @property
    def accepts_user_blocks(self) -> bool:
        """Return whether blocks of stored users are kept. Set it only while erasures are received; False drops the blocks."""
        return self._accepts_user_blocks

    @accepts_user_blocks.setter
    def accepts_user_blocks(self, value: bool) -> None:
        self._accepts_user_blocks = value
        if not value:
            self._drop(lambda key: user_key_of(key) != NO_USER_KEY)

    async def erase(self, user_keys: Collection[bytes]) -> None:
        """Drop users' blocks from all tiers, those of pending writes included. Looks at all keys in memory, once.

        Device pages are overwritten with zeros: those that a request still reads when it ends. Raises RedisError, OSError or the
        device's error. Memory and pages have dropped the blocks then, and the call has to be repeated.
        """
        now = self._clock()
        self._held_until = {user: until for user, until in self._held_until.items() if until > now}
        self._held_until |= dict.fromkeys(user_keys, now + self.hold_seconds)
        erased = frozenset(user_keys)
        self._drop(lambda key: user_key_of(key) in erased)
        if not erased:
            return
        if writing := {task for task, user in self._writes.items() if user in erased}:
            await asyncio.wait(writing)
        for tier in self.tiers:
            await tier.erase(erased)
        if self.pages is not None:
            await self.pages.clean()

    def keepable(self, keys: Sequence[bytes]) -> Sequence[bytes]:
        """Return a chain's keys, or only those of the shared prefix while the user's blocks may not be kept."""
        user = user_key_of(keys[-1]) if keys else NO_USER_KEY
        held = self._held_until.get(user, -float("inf")) > self._clock()
        if user == NO_USER_KEY or (self._accepts_user_blocks and not held):
            return keys
        return keys[: shared_prefix_length(keys)]

    def _drop(self, unwanted: Callable[[bytes], bool]) -> None:
        self._memory.drop(unwanted)
        if self.pages is not None:
            self.pages.drop(unwanted)

    async def close(self, timeout_seconds: float = 2.0) -> None:
        """Wait `timeout_seconds` for pending writes, then cancel them. Later writes are dropped."""
        self._closed = True
        if not self._writes:
            return
        _, late = await asyncio.wait(self._writes, timeout=timeout_seconds)
        for task in late:
            task.cancel()
        await asyncio.gather(*late, return_exceptions=True)

    def _write(self, tier: KvTier, blocks: Mapping[bytes, KvArray]) -> None:
        if self._closed or len(self._writes) >= self._max_pending_writes:
            self.dropped_writes += 1
            return
        task = asyncio.get_running_loop().create_task(tier.put(blocks), name="kv-write")
        self._writes[task] = user_key_of(list(blocks)[-1])
        task.add_done_callback(self._end_write)

    def _end_write(self, task: asyncio.Task[None]) -> None:
        self._writes.pop(task, None)
        if not task.cancelled() and (error := task.exception()):
            _log.error("kv_write_failed", exc_info=error)
