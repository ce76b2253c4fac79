"""The settings of a service that runs a model."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from atspeed.configuration.settings import ServiceSettings
from atspeed.engine.kv.memory_cache import KvLayout
from atspeed.engine.model.batcher import BatchLimits


class ModelSettings(ServiceSettings):
    """The settings of a service that runs a model."""

    provider: Literal["cpu", "cuda"] = "cpu"
    """Where the model runs. cuda needs the extra `gpu`."""
    threads: int = Field(default=2, ge=1, le=256)
    """Threads of one pass, on the CPU."""
    verify_bundle: bool = True
    """Check every file of the bundle against its hash before serving; cached KV relies on them."""
    max_nodes: int = Field(default=16_384, ge=1, le=65_536)
    """Most trie nodes in one message."""
    batch_requests: int = Field(default=16, ge=1, le=256)
    """Most requests that share a pass. 1 never batches."""
    batch_tokens: int = Field(default=32, ge=1)
    """Most tokens in a shared pass, padding counted; one request's pass may have more. 32 suits a CPU, where larger passes gain
    little from company; a GPU takes some hundreds.
    """
    batch_delay_ms: float = Field(default=0.0, ge=0, le=60_000)
    """How long a pass that could start waits for company."""
    max_queued_passes: int = Field(default=256, ge=1)
    """Most passes that wait for their turn; more get RESOURCE_EXHAUSTED."""
    batch_kv_mb: int = Field(default=512, ge=0)
    """Memory for the KV of a shared pass, in MiB, which is copied side by side; passes that would need more do not share one.
    Kept for the next one. Each bundle that is served has as much.
    """
    kv_open_mb: int = Field(default=4096, ge=1)
    """Memory for the KV of open streams, in MiB; streams beyond it get RESOURCE_EXHAUSTED. An eighth of it is for streams that
    grow. Each bundle that is served has as much.
    """
    kv_block_tokens: int | None = Field(default=None, ge=1, le=1024)
    """Prompt tokens in one block of cached KV. Not set: as many as an item has in the bundle's prompts."""
    kv_memory_mb: int = Field(default=512, ge=0)
    """Memory for the KV of prompts, in MiB. 0 keeps none."""
    kv_redis: Literal["measured", "always", "never"] = "measured"
    """Whether the KV of prompts is in Redis too, where there is one. measured: where reading it is quicker than computing it."""
    kv_ttl_seconds: int = Field(default=86_400, ge=1, le=315_360_000)
    """How long Redis keeps a KV block after it was written; a stored user's go together, so long after the first of them. Reading
    and further writes do not prolong it.
    """
    redis_timeout_seconds: float = Field(default=0.05, gt=0, le=60)
    """How long a request waits for KV from Redis."""
    warm_up_seconds: float = Field(default=5.0, ge=0, le=600)
    """How long the costs of passes are measured at start, at most; 0: no longer than must be."""

    unhealthy_after: int = Field(default=5, ge=0)
    """So many passes that fail one after the other, by no fault of their requests, and this replica says NOT_SERVING until one
    works again. 0: never.
    """
    keep_version_seconds: float = Field(default=300.0, ge=0, le=86_400)
    """How long a model version that the bundle no longer has is still served after its last call."""

    def batch_limits(self, layout: KvLayout) -> BatchLimits:
        """What may share a pass, and how many may wait."""
        return BatchLimits(
            requests=self.batch_requests,
            tokens=self.batch_tokens,
            delay_seconds=self.batch_delay_ms / 1e3,
            waiting=self.max_queued_passes,
            gathered_tokens=self.batch_kv_mb * 2**20 // layout.bytes_per_token,
        )
