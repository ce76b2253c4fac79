"""The settings of a service that runs a model."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from engine.batcher import BatchLimits
from engine.kv_cache import KvLayout
from service_kit.settings import ServiceSettings


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
            "do not share one. Kept for the next one. Each bundle that is served has as much.",
        ),
    ] = 512
    kv_open_mb: Annotated[
        int,
        Field(
            ge=1,
            description="Memory for the KV of open streams, in MiB; streams beyond it get RESOURCE_EXHAUSTED. An eighth of it is "
            "for streams that grow. Each bundle that is served has as much.",
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

    unfit_after: Annotated[
        int,
        Field(
            ge=0,
            description="So many passes that fail one after the other, by no fault of their requests, and this replica says "
            "NOT_SERVING until one works again. 0: never.",
        ),
    ] = 5
    keep_version_seconds: Annotated[
        float,
        Field(
            ge=0,
            le=86_400,
            description="How long a model version that the bundle no longer has is still served after its last call.",
        ),
    ] = 300.0

    def batch_limits(self, layout: KvLayout) -> BatchLimits:
        """What may share a pass, and how many may wait."""
        return BatchLimits(
            requests=self.batch_requests,
            tokens=self.batch_tokens,
            delay_seconds=self.batch_delay_ms / 1e3,
            waiting=self.queue_passes,
            gathered_tokens=self.batch_kv_mb * 2**20 // layout.bytes_per_token,
        )
