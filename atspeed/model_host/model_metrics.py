"""Metrics of a hosted model: passes, prompt tokens, prefix cache, health."""

from __future__ import annotations

from collections.abc import Sequence

from prometheus_client import CollectorRegistry

from atspeed.engine.kv.erasure import ErasureSubscriber
from atspeed.engine.kv.memory_cache import MemoryKvCache
from atspeed.engine.kv.page_pool import PagePool
from atspeed.engine.kv.prefix_cache import PrefixCache
from atspeed.engine.kv.redis_store import RedisKvStore
from atspeed.engine.kv.tier import KvTier
from atspeed.engine.model.pass_stats import PassStats
from atspeed.engine.model.tree_evaluator import TreeEvaluator
from atspeed.engine.model.tree_session import TreeSession
from atspeed.model_host.model_health import ModelHealth
from atspeed.observability.metrics import (
    SIZES,
    CounterOf,
    HistogramOf,
    Read,
    ReadCounter,
    ReadGauge,
    Readings,
    Reads,
    SummedReadings,
)
from atspeed.v1 import types_pb2

PASS_SECONDS = HistogramOf(
    "atspeed_pass_seconds",
    "Time of a pass by stage: lookup (cached KV, for the first pass), queue (wait for the model), forward, selection.",
    ("stage",),
    essential=True,
)
PASS_NODES = HistogramOf("atspeed_pass_nodes", "Trie nodes that a pass evaluated.", buckets=SIZES)
PASS_TOKENS = HistogramOf(
    "atspeed_pass_tokens", "New tokens of a pass: prompt tokens without cached KV, and nodes.", buckets=SIZES
)
PROMPT_TOKENS = CounterOf(
    "atspeed_prompt_tokens_total",
    "Prompt tokens by the source of their KV: device, memory, redis, or computed.",
    ("source",),
    essential=True,
)
PASS_REQUESTS = HistogramOf(
    "atspeed_pass_requests", "Co-batched requests of a pass, counted once per request.", buckets=SIZES
)
WAITING = ReadGauge("atspeed_waiting_passes", "Passes that wait for the model.")
TREES = ReadGauge("atspeed_open_trees", "Token trees of requests; the target has one per open stream.")
TREE_BYTES = ReadGauge("atspeed_open_tree_kv_bytes", "Bytes of KV that open token trees use or have reserved.")
TREE_LIMIT = ReadGauge("atspeed_open_tree_kv_limit_bytes", "Limit of atspeed_open_tree_kv_bytes.")
KV_BYTES = ReadGauge("atspeed_kv_memory_bytes", "Bytes of the prefix cache in memory.")
KV_LIMIT = ReadGauge("atspeed_kv_memory_limit_bytes", "Limit of atspeed_kv_memory_bytes.")
KV_PAGES = ReadGauge(
    "atspeed_kv_device_bytes",
    "Bytes of the prefix cache in pages on the model's device, those of open streams included.",
)
KV_PAGE_EVICTIONS = ReadCounter("atspeed_kv_device_evictions_total", "Blocks that the device's pages evicted.")
KV_LOOKUPS = ReadCounter(
    "atspeed_kv_block_lookups_total", "Lookups of KV blocks, by tier and result: hit or miss.", ("tier", "result")
)
KV_EVICTIONS = ReadCounter("atspeed_kv_evictions_total", "Blocks that memory evicted.")
KV_INVALID = ReadCounter("atspeed_kv_redis_invalid_total", "Blocks in Redis that were damaged or of another format.")
KV_FAILURES = ReadCounter("atspeed_kv_redis_failures_total", "Failed calls to Redis of the KV tier.")
KV_SKIPPED = ReadCounter("atspeed_kv_redis_skipped_total", "Calls to Redis that the open circuit breaker stopped.")
KV_READS = ReadCounter(
    "atspeed_kv_redis_reads_total",
    "Lookups with a miss in memory, by decision: asked (Redis was asked) or not_worth (Redis is slower than the model). "
    "Subsets of asked: found (a hit) and explored (asked although it looked slower).",
    ("decision",),
)
KV_UNWRITTEN = ReadCounter(
    "atspeed_kv_redis_writes_skipped_total",
    "Prompts whose KV was not written to Redis, because reading it would not pay.",
)
KV_DROPPED = ReadCounter(
    "atspeed_kv_writes_dropped_total", "Writes of KV to Redis that were dropped, because too many were pending."
)
KV_PENDING = ReadGauge("atspeed_kv_writes_pending", "Pending writes of KV to Redis.")
ERASURE_LAG = ReadGauge(
    "atspeed_erasure_lag_seconds",
    "Time since this replica last knew that all erasures had reached it. Above 300 it keeps no KV of stored users. "
    "Absent without Redis.",
    essential=True,
)
UNHEALTHY = ReadGauge(
    "atspeed_unhealthy_models",
    "Unhealthy model versions: their passes failed in a row. Each is NOT_SERVING until a probe succeeds.",
    essential=True,
)
MODEL = ReadGauge(
    "atspeed_model_info",
    "1, with the served model as labels.",
    ("bundle_name", "model_version", "catalogue_version", "architecture", "precision", "provider"),
)
PLAN_VARIANT = ReadGauge(
    "atspeed_plan_variant_models",
    "Served model versions whose scores depend on the other tokens of a pass: by their graph, or by the check at the load. "
    "Lists of such a target are not called exact. Drafts are not checked.",
    essential=True,
)
METRICS = (
    *(PASS_SECONDS, PASS_NODES, PASS_TOKENS, PASS_REQUESTS, PROMPT_TOKENS),
    *(WAITING, UNHEALTHY, TREES, TREE_BYTES, TREE_LIMIT),
    *(KV_BYTES, KV_LIMIT, KV_LOOKUPS, KV_EVICTIONS),
    *(KV_PAGES, KV_PAGE_EVICTIONS),
    *(KV_READS, KV_UNWRITTEN),
    *(KV_INVALID, KV_FAILURES, KV_SKIPPED, KV_DROPPED, KV_PENDING, ERASURE_LAG, MODEL, PLAN_VARIANT),
)


# Metrics of one version. They are summed over the versions that are served.
_BY_VERSION = (
    *(WAITING, UNHEALTHY, TREE_BYTES, TREE_LIMIT, MODEL, PLAN_VARIANT),
    *(KV_PAGES, KV_PAGE_EVICTIONS),
    *(KV_LOOKUPS, KV_READS, KV_UNWRITTEN, KV_INVALID, KV_FAILURES, KV_SKIPPED, KV_DROPPED, KV_PENDING),
)


def memory_reads(memory: MemoryKvCache) -> Reads:
    """Return the readings of the memory tier, over all versions."""
    return {
        KV_BYTES: lambda: memory.used_bytes,
        KV_LIMIT: lambda: memory.limit_bytes,
        KV_EVICTIONS: lambda: memory.statistics.evictions,
    }


def prefix_cache_reads(cache: PrefixCache) -> Reads:
    """Return the readings of one model's prefix cache, with its tiers below memory."""
    pages = [cache.pages] if cache.pages else []
    store = next((tier for tier in cache.tiers if isinstance(tier, RedisKvStore)), None)
    return {
        KV_DROPPED: lambda: cache.dropped_writes,
        KV_PENDING: lambda: cache.pending_writes,
        KV_UNWRITTEN: lambda: sum(policy.statistics.writes_not_worth for policy in cache.fetch_policies.values()),
        KV_READS: lambda: _decisions(cache),
        KV_LOOKUPS: lambda: _lookups([*cache.tiers, *pages]),
        KV_PAGES: lambda: sum(one.statistics.used_bytes for one in pages),
        KV_PAGE_EVICTIONS: lambda: sum(one.statistics.evictions for one in pages),
        KV_INVALID: lambda: store.statistics.invalid if store else 0,
        KV_FAILURES: lambda: store.statistics.failures if store else 0,
        KV_SKIPPED: lambda: store.statistics.skipped if store else 0,
    }


def served_reads(info: types_pb2.ModelInfo) -> Reads:
    """Return the readings of a served version."""
    served = tuple(str(getattr(info, label)) for label in MODEL.labels)
    return {MODEL: lambda: {served: 1}, PLAN_VARIANT: lambda: int(not info.plan_invariant)}


def _lookups(tiers: Sequence[MemoryKvCache | KvTier | PagePool]) -> dict[tuple[str, ...], float]:
    counted: dict[tuple[str, ...], float] = {}
    for tier in tiers:
        counted[tier.name, "hit"] = tier.statistics.hits
        counted[tier.name, "miss"] = tier.statistics.misses
    return counted


def _decisions(cache: PrefixCache) -> dict[tuple[str, ...], float]:
    counted = [policy.statistics for policy in cache.fetch_policies.values()]
    return {
        ("asked",): sum(one.asked for one in counted),
        ("found",): sum(one.hits for one in counted),
        ("explored",): sum(one.explored for one in counted),
        ("not_worth",): sum(one.not_worth for one in counted),
    }


class ModelMetrics:
    """The metrics of one model process, over all versions that it serves."""

    def __init__(self, memory: MemoryKvCache) -> None:
        self.registry = CollectorRegistry()
        self._seconds = PASS_SECONDS.build(self.registry)
        self._stages = [self._seconds.labels(stage) for stage in ("queue", "forward", "selection")]
        self._nodes = PASS_NODES.build(self.registry)
        self._tokens = PASS_TOKENS.build(self.registry)
        self._requests = PASS_REQUESTS.build(self.registry)
        self._prompt = PROMPT_TOKENS.build(self.registry)
        self._trees: set[int] = set()
        self.registry.register(Readings({TREES: lambda: len(self._trees), **memory_reads(memory)}))
        self._subscribers: tuple[ErasureSubscriber, ...] = ()
        self.registry.register(Readings({ERASURE_LAG: self._max_lag}))
        self._by_version = SummedReadings(_BY_VERSION)
        self._by_version.add({KV_LOOKUPS: lambda: _lookups([memory])})
        self.registry.register(self._by_version)

    def add(self, reads: Reads) -> None:
        """Add the readings of a version."""
        self._by_version.add(reads)

    def remove(self, reads: Reads) -> None:
        """Remove the readings of a version."""
        self._by_version.remove(reads)

    def add_evaluator(self, evaluator: TreeEvaluator, health: ModelHealth) -> Reads:
        """Add the readings of an evaluator. Its close removes them."""
        memory = evaluator.open_kv
        reads: dict[ReadCounter | ReadGauge, Read] = {
            WAITING: lambda: evaluator.queued_passes,
            UNHEALTHY: lambda: int(not health.healthy),
            TREE_BYTES: lambda: memory.used_bytes,
            TREE_LIMIT: lambda: memory.limit_bytes,
        }
        self.add(reads)
        return reads

    def add_subscriber(self, subscriber: ErasureSubscriber) -> None:
        """Include the erasure lag of a subscriber."""
        self._subscribers = (*self._subscribers, subscriber)

    def remove_subscriber(self, subscriber: ErasureSubscriber) -> None:
        """Exclude the erasure lag of a subscriber."""
        self._subscribers = tuple(other for other in self._subscribers if other is not subscriber)

    def _max_lag(self) -> dict[tuple[str, ...], float]:
        """Return the longest erasure lag of the subscribers."""
        subscribers = self._subscribers
        return {(): max(subscriber.lag_seconds for subscriber in subscribers)} if subscribers else {}

    def tree_opened(self, tree: TreeSession) -> None:
        """Count the tree of a request, until `tree_ended`."""
        self._trees.add(id(tree))
        cost, prompt = tree.lookup_stats, len(tree.tokens.prompt)
        sources = {**cost.cached_tokens_by_tier, "computed": prompt - cost.cached_tokens}
        for source, tokens in sources.items():
            self._prompt.labels(source).inc(tokens)
        self._seconds.labels("lookup").observe(cost.lookup_ns / 1e9)

    def tree_ended(self, tree: TreeSession) -> None:
        """Stop counting a tree."""
        self._trees.discard(id(tree))

    def is_open(self, tree: TreeSession) -> bool:
        """Return whether the tree belongs to a request. The warm-up's trees do not."""
        return id(tree) in self._trees

    def pass_done(self, nodes: int, cost: PassStats) -> None:
        """Count a finished pass."""
        self._nodes.observe(nodes)
        self._tokens.observe(cost.new_tokens)
        self._requests.observe(cost.batch_requests)
        for stage, nanoseconds in zip(self._stages, (cost.queue_ns, cost.forward_ns, cost.selection_ns), strict=True):
            stage.observe(nanoseconds / 1e9)
