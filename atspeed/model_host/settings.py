"""Settings of a service that runs a model."""

from __future__ import annotations

import math
from typing import ClassVar, Literal

from pydantic import Field

from atspeed.configuration.settings import ServiceSettings
from atspeed.engine.kv.memory_cache import KvLayout
from atspeed.engine.model.batcher import BatchLimits


class ModelSettings(ServiceSettings):
    """Settings of a service that runs a model."""

    essential: ClassVar[frozenset[str]] = ServiceSettings.essential | {
        "provider",
        "threads",
        "kv_memory_mb",
        "kv_redis",
    }

    provider: Literal["cpu", "cuda"] = "cpu"
    """Device of the model. cuda needs the extra `gpu`."""
    threads: int = Field(default=2, ge=1, le=256)
    """CPU threads of one pass."""
    verify_bundle: bool = True
    """Check every file of the bundle against its hash before it is served. Cached KV relies on these hashes."""
    max_nodes: int = Field(default=16_384, ge=1, le=65_536)
    """Maximum number of trie nodes in one message."""
    batch_requests: int | None = Field(default=None, ge=1, le=256)
    """Maximum number of co-batched requests. 1 turns batching off. The default is 16, and 64 in pages."""
    batch_tokens: int | None = Field(default=None, ge=1)
    """Maximum number of tokens in a shared pass, with padding. A pass of one request may have more. The default is 32, as larger
    batches gain little on a CPU, and 512 in pages.
    """
    batch_delay_ms: float = Field(default=0.0, ge=0, le=60_000)
    """Time that a pass waits for others to share it."""
    max_queued_passes: int = Field(default=256, ge=1)
    """Maximum number of waiting passes. Further ones get RESOURCE_EXHAUSTED."""
    batch_kv_mb: int = Field(default=512, ge=0)
    """Memory for the KV of one shared pass, in MiB. Passes that need more together do not share one. It is reserved once for each
    served bundle. In pages, one layer at a time takes so much of the device for the length of a pass.
    """
    kv_open_mb: int = Field(default=4096, ge=1)
    """Memory for the KV of open streams, in MiB. Further streams get RESOURCE_EXHAUSTED. An eighth is kept for open streams that
    grow. Each served bundle has as much. In pages, kv_device_mb takes its place.
    """
    kv_paged: Literal["auto", "always", "never"] = "auto"
    """KV in pages of a pool on the model's device, which requests share. It needs bundles with a device graph. auto: on a GPU."""
    kv_device_mb: int | None = Field(default=None, ge=1)
    """Memory of the device for the pool of pages, in MiB, for each served model. It holds the KV of open streams, and in the rest
    cached prefixes. Streams beyond it get RESOURCE_EXHAUSTED. The default is half of what is free beside the weights, and 4096 on
    a CPU.
    """
    kv_block_tokens: int | None = Field(default=None, ge=1, le=1024)
    """Prompt tokens in one block of cached KV. The default is the length of an item in the bundle's prompts."""
    kv_memory_mb: int = Field(default=512, ge=0)
    """Memory for the prefix cache, in MiB. 0 turns the memory tier off."""
    kv_redis: Literal["measured", "always", "never"] = "measured"
    """Use of Redis as a tier of the prefix cache. measured: only where reading KV is faster than computing it."""
    kv_ttl_seconds: int = Field(default=86_400, ge=1, le=315_360_000)
    """Lifetime of a KV block in Redis after it was written. All blocks of a stored user expire together, counted from the first
    one. Reads and further writes do not extend it.
    """
    redis_timeout_seconds: float = Field(default=0.05, gt=0, le=60)
    """Maximum time that a request waits for KV from Redis."""
    warm_up_seconds: float = Field(default=5.0, ge=0, le=600)
    """Maximum time of the cost curve's measurement at the start. 0: the shortest possible one."""

    unhealthy_after: int = Field(default=5, ge=0)
    """Failed passes in a row after which a model is unhealthy and NOT_SERVING until a probe succeeds. Failures that a request
    causes itself do not count. 0: never.
    """
    keep_version_seconds: float = Field(default=300.0, ge=0, le=86_400)
    """Time after its last call for which a replaced model version is still served."""

    def batch_limits(self, layout: KvLayout) -> BatchLimits:
        """Return the limits of batching.

        In pages a batch gathers the KV of one layer at a time, on the device, so trees of any lengths share a pass.
        """
        gathered = layout.bytes_per_token // layout.layers if self.paged else layout.bytes_per_token
        return BatchLimits(
            requests=self.most_trees,
            tokens=self.batch_tokens or (512 if self.paged else 32),
            delay_seconds=self.batch_delay_ms / 1e3,
            waiting=self.max_queued_passes,
            cached_padding=math.inf if self.paged else BatchLimits.cached_padding,
            gathered_tokens=self.batch_kv_mb * 2**20 // gathered,
        )

    @property
    def most_trees(self) -> int:
        """Return the most trees of a pass."""
        return self.batch_requests or (64 if self.paged else 16)

    @property
    def paged(self) -> bool:
        """Return whether KV is in pages on the model's device."""
        return self.kv_paged == "always" or (self.kv_paged == "auto" and self.provider != "cpu")
