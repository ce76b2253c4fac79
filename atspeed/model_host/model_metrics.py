"""What the two model services measure of their model: passes, prompt tokens by where they came from, both cache tiers."""

from __future__ import annotations

from collections.abc import Sequence

from prometheus_client import CollectorRegistry

from atspeed.engine.kv.erasure import ErasureSubscriber
from atspeed.engine.kv.memory_cache import MemoryKvCache
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
    "Time of a pass by stage: lookup (cached KV, of a tree's first), queue (the wait for the model), forward, selection.",
    ("stage",),
)
PASS_NODES = HistogramOf("atspeed_pass_nodes", "Trie nodes that a pass evaluated.", buckets=SIZES)
PASS_TOKENS = HistogramOf(
    "atspeed_pass_tokens", "Tokens that a pass read: what was new of the prompt, and nodes.", buckets=SIZES
)
PROMPT_TOKENS = CounterOf(
    "atspeed_prompt_tokens_total", "Prompt tokens by where their KV came from: memory, redis, or computed.", ("source",)
)
PASS_REQUESTS = HistogramOf(
    "atspeed_pass_requests", "Requests that shared a pass, seen by each of them.", buckets=SIZES
)
WAITING = ReadGauge("atspeed_waiting_passes", "Passes that wait for the model.")
TREES = ReadGauge("atspeed_open_trees", "Token trees that requests hold; in the target one for each open stream.")
TREE_BYTES = ReadGauge("atspeed_open_tree_kv_bytes", "Bytes of KV that these trees hold or have reserved.")
TREE_LIMIT = ReadGauge("atspeed_open_tree_kv_limit_bytes", "Most bytes of KV in these trees.")
KV_BYTES = ReadGauge("atspeed_kv_memory_bytes", "Bytes of prefix KV in memory.")
KV_LIMIT = ReadGauge("atspeed_kv_memory_limit_bytes", "Most bytes of prefix KV in memory.")
KV_LOOKUPS = ReadCounter(
    "atspeed_kv_block_lookups_total", "Blocks of KV asked for, by tier and whether it had them.", ("tier", "result")
)
KV_EVICTIONS = ReadCounter("atspeed_kv_evictions_total", "Blocks that memory let go of for others.")
KV_INVALID = ReadCounter("atspeed_kv_redis_invalid_total", "Blocks in Redis that were damaged or foreign.")
KV_FAILURES = ReadCounter("atspeed_kv_redis_failures_total", "Calls of the KV tier that Redis failed.")
KV_SKIPPED = ReadCounter("atspeed_kv_redis_skipped_total", "Calls not made because Redis had just failed.")
KV_READS = ReadCounter(
    "atspeed_kv_redis_reads_total",
    "Look-ups that memory could not answer whole, by what was done: asked Redis, or not_worth it; those asked that found "
    "something: found, that did not seem worth it: explored.",
    ("decision",),
)
KV_UNWRITTEN = ReadCounter(
    "atspeed_kv_redis_writes_skipped_total", "Prompts whose KV was not written to Redis as reading it would never pay."
)
KV_DROPPED = ReadCounter("atspeed_kv_writes_dropped_total", "Writes of KV to Redis given up as too many were pending.")
KV_PENDING = ReadGauge("atspeed_kv_writes_pending", "Writes of KV to Redis that are under way.")
FORGETTING = ReadGauge(
    "atspeed_erasure_lag_seconds",
    "Since when this replica has not known that all forgotten users are erased; after 300 it keeps no KV of stored users. "
    "Absent without Redis.",
)
UNFIT = ReadGauge(
    "atspeed_unhealthy_models",
    "Versions whose passes fail one after the other; this replica says NOT_SERVING for each until one works again.",
)
MODEL = ReadGauge(
    "atspeed_model_info",
    "1, with what is served.",
    ("bundle_name", "model_version", "catalogue_version", "architecture", "precision", "provider"),
)
METRICS = (
    *(PASS_SECONDS, PASS_NODES, PASS_TOKENS, PASS_REQUESTS, PROMPT_TOKENS),
    *(WAITING, UNFIT, TREES, TREE_BYTES, TREE_LIMIT),
    *(KV_BYTES, KV_LIMIT, KV_LOOKUPS, KV_EVICTIONS),
    *(KV_READS, KV_UNWRITTEN),
    *(KV_INVALID, KV_FAILURES, KV_SKIPPED, KV_DROPPED, KV_PENDING, FORGETTING, MODEL),
)


# What comes and goes with the versions that are served.
_BY_VERSION = (
    *(WAITING, UNFIT, TREE_BYTES, TREE_LIMIT, MODEL),
    *(KV_LOOKUPS, KV_READS, KV_UNWRITTEN, KV_INVALID, KV_FAILURES, KV_SKIPPED, KV_DROPPED, KV_PENDING),
)


def memory_reads(memory: MemoryKvCache) -> Reads:
    """What memory counts of prefix KV, of all versions."""
    return {
        KV_BYTES: lambda: memory.used_bytes,
        KV_LIMIT: lambda: memory.limit_bytes,
        KV_EVICTIONS: lambda: memory.statistics.evictions,
    }


def prefix_cache_reads(cache: PrefixCache) -> Reads:
    """Return what the cache of one model's weights counts, its tiers below memory included."""
    store = next((tier for tier in cache.tiers if isinstance(tier, RedisKvStore)), None)
    return {
        KV_DROPPED: lambda: cache.dropped_writes,
        KV_PENDING: lambda: cache.pending_writes,
        KV_UNWRITTEN: lambda: sum(policy.statistics.writes_not_worth for policy in cache.fetch_policies.values()),
        KV_READS: lambda: _decisions(cache),
        KV_LOOKUPS: lambda: _lookups(cache.tiers),
        KV_INVALID: lambda: store.statistics.invalid if store else 0,
        KV_FAILURES: lambda: store.statistics.failures if store else 0,
        KV_SKIPPED: lambda: store.statistics.skipped if store else 0,
    }


def served_reads(info: types_pb2.ModelInfo) -> Reads:
    """That a version is served."""
    served = tuple(str(getattr(info, label)) for label in MODEL.labels)
    return {MODEL: lambda: {served: 1}}


def _lookups(tiers: Sequence[MemoryKvCache | KvTier]) -> dict[tuple[str, ...], float]:
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
        self._listeners: tuple[ErasureSubscriber, ...] = ()
        self.registry.register(Readings({FORGETTING: self._silence}))
        self._by_version = SummedReadings(_BY_VERSION)
        self._by_version.add({KV_LOOKUPS: lambda: _lookups([memory])})
        self.registry.register(self._by_version)

    def add(self, reads: Reads) -> None:
        """What something counts that comes with a version."""
        self._by_version.add(reads)

    def remove(self, reads: Reads) -> None:
        """It has gone."""
        self._by_version.remove(reads)

    def watch(self, evaluator: TreeEvaluator, fitness: ModelHealth) -> Reads:
        """What the evaluator counts by itself, added; remove it when the evaluator goes."""
        memory = evaluator.open_kv
        reads: dict[ReadCounter | ReadGauge, Read] = {
            WAITING: lambda: evaluator.queued_passes,
            UNFIT: lambda: int(not fitness.fit),
            TREE_BYTES: lambda: memory.used_bytes,
            TREE_LIMIT: lambda: memory.limit_bytes,
        }
        self.add(reads)
        return reads

    def follow(self, listener: ErasureSubscriber) -> None:
        """How the erasure of users goes."""
        self._listeners = (*self._listeners, listener)

    def leave(self, listener: ErasureSubscriber) -> None:
        """It has ended."""
        self._listeners = tuple(other for other in self._listeners if other is not listener)

    def _silence(self) -> dict[tuple[str, ...], float]:
        """Of the listener that has heard nothing for longest."""
        listeners = self._listeners
        return {(): max(listener.lag_seconds for listener in listeners)} if listeners else {}

    def opened(self, tree: TreeSession) -> None:
        """A request has opened a tree; it counts until it has ended."""
        self._trees.add(id(tree))
        cost, prompt = tree.lookup_stats, len(tree.tokens.prompt)
        sources = {**cost.cached_tokens_by_tier, "computed": prompt - cost.cached_tokens}
        for source, tokens in sources.items():
            self._prompt.labels(source).inc(tokens)
        self._seconds.labels("lookup").observe(cost.lookup_ns / 1e9)

    def ended(self, tree: TreeSession) -> None:
        """Whoever opened it has let go of it."""
        self._trees.discard(id(tree))

    def knows(self, tree: TreeSession) -> bool:
        """Whether a request opened it; the warm-up's trees are nobody's."""
        return id(tree) in self._trees

    def passed(self, nodes: int, cost: PassStats) -> None:
        """A pass has ended."""
        self._nodes.observe(nodes)
        self._tokens.observe(cost.new_tokens)
        self._requests.observe(cost.batch_requests)
        for stage, nanoseconds in zip(self._stages, (cost.queue_ns, cost.forward_ns, cost.selection_ns), strict=True):
            stage.observe(nanoseconds / 1e9)
