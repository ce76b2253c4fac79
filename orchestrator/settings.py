"""Settings of the orchestrator."""

from __future__ import annotations

from typing import ClassVar, Self

from pydantic import Field, FilePath, model_validator
from pydantic_settings import SettingsConfigDict

from atspeed.configuration.settings import Port, ServiceSettings
from atspeed.rpc.addresses import HostName, Target
from atspeed.security.tls import ClientTls, TlsFiles
from orchestrator.planning.planner import PlanLimits, PlannerKind


class OrchestratorSettings(ServiceSettings):
    """Settings of one orchestrator replica."""

    model_config = SettingsConfigDict(env_prefix="ATSPEED_ORCHESTRATOR_")
    service: ClassVar[str] = "orchestrator"
    essential: ClassVar[frozenset[str]] = ServiceSettings.essential | frozenset(
        ("target", "draft", "planner", "shadow_share", "canary_share")
    )

    port: Port = 50051
    max_running: int = Field(default=32, ge=1, le=100_000)
    """Number of recommendations served at once, alone or in batches."""
    target: Target
    """Address of the target replicas: NAME:PORT or IP:PORT,IP:PORT."""
    draft: Target | None = None
    """Address of the draft replicas. Not set: target-only beam search."""
    model_ca: FilePath | None = None
    """CA of the certificates of target and draft, PEM. Not set: calls to them are in plain text."""
    model_certificate: FilePath | None = None
    """Client certificate chain for calls to target and draft (mTLS), PEM."""
    model_key: FilePath | None = None
    """Private key of model_certificate, PEM."""
    target_name: HostName = ""
    """Name in the targets' certificates, if the address has several IPs instead of that name."""
    draft_name: HostName = ""
    """Name in the drafts' certificates, if the address has several IPs instead of that name."""
    model_token_file: FilePath | None = None
    """File with the bearer token for calls to target and draft."""
    max_message_bytes: int = Field(default=4_194_304, ge=65_536, le=1_073_741_824)
    """Largest message from or to a client, in bytes."""
    model_message_bytes: int = Field(default=33_554_432, ge=65_536, le=1_073_741_824)
    """Largest message from or to target and draft, in bytes. Equal to their max_message_bytes."""
    max_k: int = Field(default=100, ge=1, le=10_000)
    """Largest k of a request."""
    max_beam_width: int = Field(default=256, ge=1, le=4_096)
    """Largest beam width of a request, on any level."""
    max_history_items: int = Field(default=500, ge=1, le=100_000)
    """Most items of a history, in a request or stored. A stored history keeps its newest items. If several deployments share a
    Redis, the largest of their limits applies to stored histories.
    """
    max_candidate_items: int = Field(default=10_000, ge=1, le=10_000_000)
    """Most excluded item ids in a request, and most allowed ones."""
    max_batch: int = Field(default=256, ge=1, le=100_000)
    """Most requests in one RecommendBatch."""
    max_batch_events: int = Field(default=10_000, ge=1, le=1_000_000)
    """Most events of all requests in one RecordEventsBatch."""
    batch_concurrency: int = Field(default=8, ge=1, le=1024)
    """Number of requests of one batch that are served or queued at once."""
    request_timeout_seconds: float = Field(default=10.0, gt=0, le=3600)
    """Deadline of a request without one, in seconds."""
    draft_timeout_seconds: float = Field(default=0.5, gt=0, le=60)
    """Longest wait for a plan in seconds. The search then continues without it."""
    draft_timeout_factor: float = Field(default=4.0, ge=1, le=10_000)
    """Longest wait for a plan, as a multiple of the expected time of the target alone. At least 0.1 s, at most
    draft_timeout_seconds.
    """
    draft_backoff_seconds: float = Field(default=1.0, ge=0, le=600)
    """Time in seconds for which the draft is not called after three failures in a row: its circuit breaker is open."""
    # The pings that find a hanging replica take about three times target_pass_seconds. Until then every attempt may meet it, so
    # there is one attempt more.
    target_attempts: int = Field(default=4, ge=1, le=10)
    """Number of replicas that are tried for a pass."""
    target_pass_seconds: float = Field(default=3.0, gt=0, le=3600)
    """Longest wait for a pass in seconds. Another replica is then tried."""
    affinity_max_calls: int = Field(default=4, ge=0, le=1024)
    """Most simultaneous calls of one user that go to the replica with the user's KV in memory. Further calls go to any replica.
    0: all calls go round-robin.
    """
    planner: PlannerKind = PlannerKind.ADAPTIVE
    """adaptive: plans of the size with the least expected latency, or none. fixed: size by draft_nodes_per_beam."""
    draft_nodes_per_beam: float = Field(default=2.0, gt=0, le=64)
    """Nodes of a plan of fixed size for each beam of each level but the last. Relaxed sampling always has a fixed size."""
    draft_max_nodes: int = Field(default=240, ge=16, le=8_192)
    """Most nodes of a plan, for every beam width."""
    target_prefetch: bool = True
    """Evaluate nodes in advance that the target expects a search to need, from the probabilities in other requests. A level of
    prefetched nodes needs no pass of its own. Target-only requests never prefetch.
    """
    prefix_on_event: bool = False
    """After RecordEvents, let the target read the user's new prompt when this replica is idle. The next list finds its keys and
    values in the prefix cache.
    """
    draft_exploration_share: float = Field(default=0.01, ge=0, le=1)
    """Share of the time of requests that no plan would speed up, spent on plans to notice when one would."""
    canary_share: float = Field(default=0.0, ge=0, le=1)
    """Share of the users that canary_bundle serves. A larger share serves all users of a smaller one."""
    bundle_settle_seconds: float = Field(default=2.0, ge=0, le=3600)
    """Time in seconds between the first target that serves a new bundle and the switch to it, so that more targets serve it."""
    redis_timeout_seconds: float = Field(default=0.5, gt=0, le=60)
    """Longest wait for a history from Redis, in seconds."""
    shadow_share: float = Field(default=0.001, ge=0, le=1)
    """Share of the strict lists that the target computes again alone, for comparison."""
    shadow_concurrency: int = Field(default=1, ge=1, le=64)
    """Number of shadow checks at once. Further lists are not checked."""
    shadow_mismatches: int = Field(default=3, ge=0, le=10_000)
    """Number of differing lists within shadow_window_seconds that disables speculation until a restart. 0: never. Differences of
    a target that is not plan-invariant, such as a float16 one, count in the metric only.
    """
    shadow_window_seconds: float = Field(default=3_600.0, gt=0)
    """Time in seconds within which differing lists disable speculation."""

    @model_validator(mode="after")
    def _whole_models(self) -> Self:
        self._go_together("model_certificate", "model_key")
        for name in ("model_certificate", "target_name", "draft_name"):
            self._needs(name, "model_ca", self.model_ca is not None)
        self._needs("canary_share", "canary_bundle", self.canary_bundle is not None)
        return self

    @property
    def plan_limits(self) -> PlanLimits:
        """Return the settings of the planner."""
        return PlanLimits(
            kind=self.planner,
            nodes_per_beam=self.draft_nodes_per_beam,
            max_nodes=self.draft_max_nodes,
            explored_share=self.draft_exploration_share,
            patience=self.draft_timeout_factor,
        )

    def model_tls(self, server_name: str) -> ClientTls | None:
        """Return the TLS of calls to the models; None for plain text.

        server_name: name in the certificates; empty for the name in the address.
        """
        if self.model_ca is None:
            return None
        return ClientTls(TlsFiles(self.model_certificate, self.model_key, self.model_ca), server_name)
