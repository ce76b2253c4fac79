"""A loaded model and its prefix cache, shared by versions with the same weights.

Versions of a model that differ only in their catalogue have the same weights. These are loaded once, and their cached KV stays
valid. The keys of blocks include the weights, so one memory serves all models of a process.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from redis.asyncio import Redis

from atspeed.concurrency.refcount import RefCount
from atspeed.engine.bundle.manifest import ModelEntry
from atspeed.engine.kv.erasure import ErasureSubscriber
from atspeed.engine.kv.memory_cache import KvLayout, MemoryKvCache
from atspeed.engine.kv.prefix_cache import PrefixCache
from atspeed.engine.kv.redis_client import connect
from atspeed.engine.kv.redis_store import RedisKvStore
from atspeed.engine.kv.tier import KvTier
from atspeed.engine.model.cost_curve import CostCurve
from atspeed.engine.model.device_decoder import DeviceDecoder, ModelDecoder
from atspeed.model_host.model_metrics import ModelMetrics, prefix_cache_reads
from atspeed.model_host.settings import ModelSettings
from atspeed.observability.metrics import Reads

# Longest prompts of one stored user that Redis holds, for all models together. Chosen: some versions of a history for each model.
_USER_PROMPTS = 8


@dataclass(frozen=True)
class WeightsKey:
    """The properties that two models must share to use the same weights and caches.

    Attributes:
        fingerprint: hash of the weights.
        layout: layout of the KV.
        heads: the heads that are loaded with them.
    """

    fingerprint: str
    layout: KvLayout
    heads: tuple[str, ...]


def weights_key(settings: ModelSettings, entry: ModelEntry, item_codes: int) -> WeightsKey:
    """Return the key of a bundle's model. By default a block holds one item, so a new item costs one block.

    item_codes: the codes of an item in a prompt.
    """
    block_tokens = settings.kv_block_tokens or entry.prompt.item_stride(item_codes)
    dtype = entry.device_kv_dtype if settings.paged else entry.kv_dtype
    layout = KvLayout(entry.layers, entry.kv_heads, entry.head_dim, dtype, block_tokens=block_tokens)
    return WeightsKey(entry.fingerprint, layout, entry.heads)


@dataclass(eq=False)
class LoadedModel:
    """One model's weights, in memory.

    Attributes:
        key: identity of the weights.
        decoder: the model.
        cache: prefix cache of the weights.
        subscriber: applies erasures to the cache; None without Redis.
        reads: readings of the cache.
        cost_curve: cost curve of the weights; None until it is measured.
        refcount: the hosted models with these weights.
    """

    key: WeightsKey
    decoder: ModelDecoder
    cache: PrefixCache
    subscriber: ErasureSubscriber | None
    reads: Reads
    cost_curve: CostCurve | None = None
    refcount: RefCount = field(default_factory=RefCount)

    async def release(self, metrics: ModelMetrics) -> None:
        """Remove a reference. The last one writes what is pending, and closes the cache."""
        if not self.refcount.release():
            return
        if self.subscriber:
            await self.subscriber.close()
            metrics.remove_subscriber(self.subscriber)
        await self.cache.close()
        metrics.remove(self.reads)


class KvTiers:
    """The KV tiers of a process: one memory, and one Redis or none, for all weights."""

    def __init__(self, settings: ModelSettings) -> None:
        self._settings = settings
        self.memory = MemoryKvCache(settings.kv_memory_mb * 2**20)
        url = settings.redis_url.get_secret_value()
        self._timeout = settings.redis_timeout_seconds
        self._client: Redis | None = None
        if url:
            self._client = connect(url, timeout_seconds=self._timeout, tls=settings.redis_tls)

    async def host(
        self, key: WeightsKey, decoder: ModelDecoder, prompt_tokens: int, metrics: ModelMetrics
    ) -> LoadedModel:
        """Return loaded weights with a prefix cache, without a reference. prompt_tokens: length of the longest prompt."""
        settings, client = self._settings, self._client
        tiers: list[KvTier] = []  # below memory, in the order in which they are read
        if client and settings.kv_redis != "never":
            blocks = _USER_PROMPTS * (prompt_tokens // key.layout.block_tokens)
            redis = RedisKvStore(client, key.layout, settings.kv_ttl_seconds, self._timeout, user_blocks=blocks)
            tiers.append(redis)
        pages = decoder.pages if isinstance(decoder, DeviceDecoder) else None
        cache = PrefixCache(key.layout, self.memory, tiers, pages=pages)
        cache.accepts_user_blocks = client is not None  # without Redis no erasure would arrive
        subscriber = ErasureSubscriber(client, cache) if client else None
        if subscriber:
            await subscriber.start()
            metrics.add_subscriber(subscriber)
        reads = prefix_cache_reads(cache)
        metrics.add(reads)
        return LoadedModel(key, decoder, cache, subscriber, reads)

    async def close(self) -> None:
        """Close the connections to Redis."""
        if self._client:
            await self._client.aclose()
