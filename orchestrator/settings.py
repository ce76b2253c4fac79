"""The orchestrator's settings."""

from __future__ import annotations

from typing import ClassVar, Self

from pydantic import Field, FilePath, model_validator
from pydantic_settings import SettingsConfigDict

from atspeed.configuration.settings import Port, ServiceSettings
from atspeed.rpc.channels import HostName, Target
from atspeed.security.tls import ClientTls, TlsFiles
from orchestrator.planning.planner import PlanLimits, PlannerKind


class OrchestratorSettings(ServiceSettings):
    """An orchestrator replica."""

    model_config = SettingsConfigDict(env_prefix="ATSPEED_ORCHESTRATOR_")
    service: ClassVar[str] = "orchestrator"

    port: Port = 50051
    max_running: int = Field(default=32, ge=1, le=100_000)
    """Recommendations served at once, alone or in batches."""
    target: Target
    """Where the target replicas are: NAME:PORT or IP:PORT,IP:PORT."""
    draft: Target | None = None
    """Where the draft replicas are. Not set: target-only beam search."""
    model_ca: FilePath | None = None
    """CA of target's and draft's certificates, PEM. Not set: they are called in plain text."""
    model_certificate: FilePath | None = None
    """Certificate chain that target and draft are shown (mTLS), PEM."""
    model_key: FilePath | None = None
    """Its key."""
    target_name: HostName = ""
    """Name in the targets' certificates, where it is not the one in their address: several IPs."""
    draft_name: HostName = ""
    """Name in the drafts' certificates, likewise."""
    model_token_file: FilePath | None = None
    """File with the bearer token that target and draft are shown."""
    max_message_bytes: int = Field(default=4_194_304, ge=65_536, le=1_073_741_824)
    """Largest message, received from or sent to a client."""
    model_message_bytes: int = Field(default=33_554_432, ge=65_536, le=1_073_741_824)
    """Largest message to or from target and draft: their max_message_bytes."""
    max_k: int = Field(default=100, ge=1, le=10_000)
    """Largest k of a request."""
    max_beam_width: int = Field(default=256, ge=1, le=4_096)
    """Largest beam width of a request."""
    max_history_items: int = Field(default=500, ge=1, le=100_000)
    """Most items of a history, in a request or stored; a stored one keeps its newest. Of deployments over one Redis the largest
    counts for what is kept.
    """
    max_candidate_items: int = Field(default=10_000, ge=1, le=10_000_000)
    """Most excluded, and most allowed, item ids in a request."""
    max_batch: int = Field(default=256, ge=1, le=100_000)
    """Most requests in one RecommendBatch."""
    batch_concurrency: int = Field(default=8, ge=1, le=1024)
    """Requests of one batch that are served, or wait for their turn, at once."""
    request_timeout_seconds: float = Field(default=10.0, gt=0, le=3600)
    """Deadline of a request that brings none."""
    draft_timeout_seconds: float = Field(default=0.5, gt=0, le=60)
    """How long a plan may take before the search goes on without it."""
    draft_timeout_factor: float = Field(default=4.0, ge=1, le=10_000)
    """Most time for a plan, in times of what the target alone is expected to take: at least 0.1 s, at most
    draft_timeout_seconds.
    """
    draft_backoff_seconds: float = Field(default=1.0, ge=0, le=600)
    """How long a draft is left alone that failed several requests in a row."""
    # One more than target_pass_seconds fit between a replica's hang and the pings that find it: in turn, all may meet that one.
    target_attempts: int = Field(default=4, ge=1, le=10)
    """Replicas tried for a pass before giving up."""
    target_pass_seconds: float = Field(default=3.0, gt=0, le=3600)
    """How long a replica may take for a pass before another one is tried."""
    affinity_max_calls: int = Field(default=4, ge=0, le=1024)
    """Calls of one user at once that go to the replicas whose memory holds the user's KV; more go to any. 0: all go
    round-robin.
    """
    planner: PlannerKind = PlannerKind.ADAPTIVE
    """adaptive: plans of the size that is expected to pay, or none. fixed: by draft-nodes-per-beam."""
    draft_nodes_per_beam: float = Field(default=2.0, gt=0, le=64)
    """Nodes of a plan of fixed size for each beam of each level but the last; relaxed sampling has no other."""
    draft_max_nodes: int = Field(default=240, ge=16, le=8_192)
    """Most nodes of a plan, whatever the beam width."""
    target_prefetch: bool = True
    """Whether the target may evaluate what it expects a search to come to, by what it said to others, in the passes that it makes
    by itself: a level that was foreseen needs no pass of its own. Target-only requests never do.
    """
    draft_exploration_share: float = Field(default=0.01, ge=0, le=1)
    """Of the time of requests that no plan would speed up, what may go into plans, to notice when one would."""
    canary_share: float = Field(default=0.0, ge=0, le=1)
    """Share of the users that canary_bundle serves, always the same ones: a larger share has all those of a smaller one."""
    bundle_settle_seconds: float = Field(default=2.0, ge=0, le=3600)
    """How long requests stay on the old bundle after a first target serves the new one, so that more do."""
    redis_timeout_seconds: float = Field(default=0.5, gt=0, le=60)
    """How long a request waits for a history from Redis."""
    shadow_share: float = Field(default=0.001, ge=0, le=1)
    """Share of the strict lists that the target makes again alone, to compare them."""
    shadow_concurrency: int = Field(default=1, ge=1, le=64)
    """Lists compared at once; what comes on top of them is not compared."""
    shadow_mismatches: int = Field(default=3, ge=0, le=10_000)
    """So many lists that differ within shadow_window_seconds switch the draft off until a restart; 0: never. Near-ties do not
    count, and float16, which rounds too coarsely for exact lists, only counts.
    """
    shadow_window_seconds: float = Field(default=3_600.0, gt=0)
    """Time within which lists that differ switch the draft off."""

    @model_validator(mode="after")
    def _whole_models(self) -> Self:
        self._go_together("model_certificate", "model_key")
        for name in ("model_certificate", "target_name", "draft_name"):
            self._needs(name, "model_ca", self.model_ca is not None)
        self._needs("canary_share", "canary_bundle", self.canary_bundle is not None)
        return self

    @property
    def plan_limits(self) -> PlanLimits:
        """How plans are made, and how large."""
        return PlanLimits(
            kind=self.planner,
            nodes_per_beam=self.draft_nodes_per_beam,
            max_nodes=self.draft_max_nodes,
            explored_share=self.draft_exploration_share,
            patience=self.draft_timeout_factor,
        )

    def model_tls(self, server_name: str) -> ClientTls | None:
        """How the models are called; None for plain text. server_name: of the certificates, empty for the address's own."""
        if self.model_ca is None:
            return None
        return ClientTls(TlsFiles(self.model_certificate, self.model_key, self.model_ca), server_name)
