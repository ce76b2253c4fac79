"""What the two model services share: the settings of a model and how a bundle becomes an evaluator."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Annotated, Literal

from atspeed.v1 import types_pb2
from prometheus_client import CollectorRegistry
from pydantic import Field

from engine.batcher import BatchLimits
from engine.bundle import Bundle, ModelEntry, Role
from engine.cost_curve import CostCurve
from engine.decoder import RuntimeOptions, load_decoder
from engine.forgetting import ForgetListener
from engine.kv_cache import KvLayout, MemoryKvCache
from engine.kv_store import PrefixCache, RedisKvStore, connect
from engine.tree_evaluator import TreeEvaluator
from service_kit import wire
from service_kit.model_metrics import KvTiers, ModelMetrics
from service_kit.observed_model import ObservedEvaluator
from service_kit.settings import ServiceSettings

# Of a stored user Redis holds about so many of the longest prompts, all models' together.
_USER_PROMPTS = 8


class ModelSettings(ServiceSettings):
    """The settings of a service that runs a model."""

    provider: Annotated[
        Literal["cpu", "cuda"], Field(description="Where the model runs. cuda needs the extra `gpu`.")
    ] = "cpu"
    threads: Annotated[int, Field(ge=1, le=256, description="Threads of one pass, on the CPU.")] = 2
    verify_bundle: Annotated[
        bool,
        Field(description="Check every file of the bundle against its hash before serving; cached KV relies on them."),
    ] = True
    max_nodes: Annotated[int, Field(ge=1, le=65_536, description="Most trie nodes in one message.")] = 16_384
    batch_requests: Annotated[
        int, Field(ge=1, le=256, description="Most requests that share a pass. 1 never batches.")
    ] = 16
    batch_tokens: Annotated[
        int,
        Field(
            ge=1,
            description="Most tokens in a shared pass, padding counted; one request's pass may have more. 32 suits a CPU, where "
            "larger passes gain little from company; a GPU takes some hundreds.",
        ),
    ] = 32
    batch_delay_ms: Annotated[
        float, Field(ge=0, le=60_000, description="How long a pass that could start waits for company.")
    ] = 0.0
    queue_passes: Annotated[
        int, Field(ge=1, description="Most passes that wait for their turn; more get RESOURCE_EXHAUSTED.")
    ] = 256
    batch_kv_mb: Annotated[
        int,
        Field(
            ge=0,
            description="Memory for the KV of a shared pass, in MiB, which is copied side by side; passes that would need more "
            "do not share one. Kept for the next one.",
        ),
    ] = 512
    kv_open_mb: Annotated[
        int,
        Field(
            ge=1,
            description="Memory for the KV of open streams, in MiB; streams beyond it get RESOURCE_EXHAUSTED. An eighth of it is "
            "for streams that grow.",
        ),
    ] = 4096
    kv_block_tokens: Annotated[
        int | None,
        Field(
            ge=1,
            le=1024,
            description="Prompt tokens in one block of cached KV. Not set: as many as an item has in the bundle's prompts.",
        ),
    ] = None
    kv_memory_mb: Annotated[int, Field(ge=0, description="Memory for the KV of prompts, in MiB. 0 keeps none.")] = 512
    kv_redis: Annotated[
        Literal["measured", "always", "never"],
        Field(
            description="Whether the KV of prompts is in Redis too, where there is one. measured: where reading it is quicker "
            "than computing it."
        ),
    ] = "measured"
    kv_ttl_seconds: Annotated[
        int,
        Field(
            ge=1,
            description="How long Redis keeps a KV block after it was written; a stored user's go together, so long after the "
            "first of them. Reading and further writes do not prolong it.",
        ),
    ] = 86_400
    redis_timeout_seconds: Annotated[
        float, Field(gt=0, le=60, description="How long a request waits for KV from Redis.")
    ] = 0.05
    warm_up_seconds: Annotated[
        float,
        Field(
            ge=0,
            le=600,
            description="How long the costs of passes are measured at start, at most; 0: no longer than must be.",
        ),
    ] = 5.0

    def batch_limits(self, layout: KvLayout) -> BatchLimits:
        """What may share a pass, and how many may wait."""
        return BatchLimits(
            requests=self.batch_requests,
            tokens=self.batch_tokens,
            delay_seconds=self.batch_delay_ms / 1e3,
            waiting=self.queue_passes,
            gathered_tokens=self.batch_kv_mb * 2**20 // layout.bytes_per_token,
        )


@dataclass(frozen=True)
class ServedModel:
    """A model that is ready to serve. cost_curve: what a pass costs. info: what GetModelInfo answers."""

    evaluator: TreeEvaluator
    cost_curve: CostCurve
    info: types_pb2.ModelInfo
    metrics: CollectorRegistry


def _layout(settings: ModelSettings, entry: ModelEntry, levels: int) -> KvLayout:
    """Blocks of an item each: then a user who comes back with one more item pays for that one and what is before the first."""
    block_tokens = settings.kv_block_tokens or entry.prompt.item_stride(levels)
    return KvLayout(entry.layers, entry.kv_heads, entry.head_dim, entry.kv_dtype, block_tokens=block_tokens)


def _in_redis(settings: ModelSettings) -> bool:
    return settings.kv_redis != "never"


@asynccontextmanager
async def served_model(settings: ModelSettings, role: Role) -> AsyncIterator[ServedModel]:
    """The bundle's model of a role, warmed up. Raises BundleError or CatalogueError when its parts do not fit together."""
    bundle = Bundle(settings.bundle)
    if settings.verify_bundle:
        bundle.verify()
    trie, entry = bundle.catalogue().trie, bundle.model(role)  # a model needs no item: those are let go of
    decoder = load_decoder(bundle, role, RuntimeOptions(provider=settings.provider, intra_op_threads=settings.threads))
    rule = bundle.manifest.scoring_rule
    layout = _layout(settings, entry, trie.levels)
    url, timeout = settings.redis_url.get_secret_value(), settings.redis_timeout_seconds
    client = connect(url, timeout_seconds=timeout, tls=settings.redis_tls) if url else None
    memory = MemoryKvCache(settings.kv_memory_mb * 2**20)
    store = None
    if client and _in_redis(settings):
        owner_blocks = _USER_PROMPTS * (entry.prompt.max_tokens(trie.levels) // layout.block_tokens)
        store = RedisKvStore(client, layout, settings.kv_ttl_seconds, timeout, owner_blocks=owner_blocks)
    cache = PrefixCache(layout, memory, store)
    cache.keeps_owned = client is not None  # without Redis nobody says when to forget a user
    metrics = ModelMetrics(KvTiers(cache, memory, store))
    evaluator = ObservedEvaluator(
        decoder,
        entry,
        trie,
        rule,
        layout,
        cache,
        metrics,
        limits=settings.batch_limits(layout),
        open_kv_bytes=settings.kv_open_mb * 2**20,
    )
    await evaluator.warm_up()
    cost_curve = await evaluator.cost_curve(settings.warm_up_seconds)
    if settings.kv_redis == "measured":
        cache.fetching.recompute_ns = cost_curve.saved
    listener = ForgetListener(client, cache) if client else None
    if listener:
        await listener.start()
        metrics.follow(listener)
    info = types_pb2.ModelInfo(
        model_version=bundle.manifest.model_version(role),
        catalogue_version=bundle.manifest.catalogue_version,
        bundle_name=bundle.manifest.name,
        scoring_rule=wire.to_scoring_rule(rule),
        architecture=entry.architecture,
        precision=entry.precision,
        parameters=entry.parameters,
        max_positions=entry.max_positions,
        max_nodes=settings.max_nodes,
        provider=settings.provider,
        cost_curve=wire.to_cost_curve(cost_curve),
    )
    metrics.serve(info)
    try:
        yield ServedModel(evaluator, cost_curve, info, metrics.registry)
    finally:
        if listener:
            await listener.close()
        await evaluator.close()
        if client:
            await client.aclose()
