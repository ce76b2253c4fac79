"""LoadedModel in memory, with the keys and values that were made with them.

Versions of a model that differ in their catalogue alone have the same weights: these are loaded once, and what is cached of
prompts stays good. Keys name their weights, so one memory serves all of a process.
"""

from __future__ import annotations

from dataclasses import dataclass

from redis.asyncio import Redis

from atspeed.engine.bundle.manifest import ModelEntry
from atspeed.engine.kv.erasure import ErasureSubscriber
from atspeed.engine.kv.memory_cache import KvLayout, MemoryKvCache
from atspeed.engine.kv.prefix_cache import PrefixCache
from atspeed.engine.kv.redis_client import connect
from atspeed.engine.kv.redis_store import RedisKvStore
from atspeed.engine.model.cost_curve import CostCurve
from atspeed.engine.model.decoder import Decoder
from atspeed.model_host.model_metrics import ModelMetrics, prefix_cache_reads
from atspeed.model_host.settings import ModelSettings
from atspeed.observability.metrics import Reads

# Of a stored user Redis holds about so many of the longest prompts, all models' together.
_USER_PROMPTS = 8


@dataclass(frozen=True)
class WeightsKey:
    """What two models must have in common to share weights and caches."""

    fingerprint: str
    layout: KvLayout


def weights_key(settings: ModelSettings, entry: ModelEntry, levels: int) -> WeightsKey:
    """The key of a bundle's model. Blocks of an item each: a user who comes back with one more item pays for that one."""
    block_tokens = settings.kv_block_tokens or entry.prompt.item_stride(levels)
    layout = KvLayout(entry.layers, entry.kv_heads, entry.head_dim, entry.kv_dtype, block_tokens=block_tokens)
    return WeightsKey(entry.fingerprint, layout)


@dataclass(eq=False)
class LoadedModel:
    """One model's weights. cost_curve: what a pass costs with them, once that is measured.

    users: the models that have them."""

    key: WeightsKey
    decoder: Decoder
    cache: PrefixCache
    listener: ErasureSubscriber | None
    reads: Reads
    cost_curve: CostCurve | None = None
    users: int = 0

    async def release(self, metrics: ModelMetrics) -> None:
        """One user less. After the last one, what is pending is written, and that was it."""
        self.users -= 1
        if self.users:
            return
        if self.listener:
            await self.listener.close()
            metrics.leave(self.listener)
        await self.cache.close()
        metrics.remove(self.reads)


class KvTiers:
    """Where a process keeps keys and values: one memory, and one Redis or none, for all weights."""

    def __init__(self, settings: ModelSettings) -> None:
        self._settings = settings
        self.memory = MemoryKvCache(settings.kv_memory_mb * 2**20)
        url = settings.redis_url.get_secret_value()
        self._timeout = settings.redis_timeout_seconds
        self._client: Redis | None = None
        if url:
            self._client = connect(url, timeout_seconds=self._timeout, tls=settings.redis_tls)

    async def weights(
        self, key: WeightsKey, decoder: Decoder, prompt_tokens: int, metrics: ModelMetrics
    ) -> LoadedModel:
        """Caches for weights that are loaded, without a user yet. prompt_tokens: of the longest prompt."""
        settings, client = self._settings, self._client
        store = None
        if client and settings.kv_redis != "never":
            blocks = _USER_PROMPTS * (prompt_tokens // key.layout.block_tokens)
            store = RedisKvStore(client, key.layout, settings.kv_ttl_seconds, self._timeout, owner_blocks=blocks)
        cache = PrefixCache(key.layout, self.memory, store)
        cache.accepts_user_blocks = client is not None  # without Redis nobody says when to forget a user
        listener = ErasureSubscriber(client, cache) if client else None
        if listener:
            await listener.start()
            metrics.follow(listener)
        reads = prefix_cache_reads(cache, store)
        metrics.add(reads)
        return LoadedModel(key, decoder, cache, listener, reads)

    async def close(self) -> None:
        """Let go of Redis."""
        if self._client:
            await self._client.aclose()
