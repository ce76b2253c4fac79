"""The orchestrator's settings."""

from __future__ import annotations

from typing import Annotated, ClassVar, Self

from pydantic import Field, FilePath, model_validator
from pydantic_settings import SettingsConfigDict

from orchestrator.planning.planner import PlanLimits, PlannerKind
from service_kit.channels import Target
from service_kit.settings import Port, ServiceSettings
from service_kit.tls import ClientTls, TlsFiles


class OrchestratorSettings(ServiceSettings):
    """An orchestrator replica."""

    model_config = SettingsConfigDict(env_prefix="ATSPEED_ORCHESTRATOR_")
    service: ClassVar[str] = "orchestrator"

    port: Port = 50051
    max_running: Annotated[
        int, Field(ge=1, le=100_000, description="Recommendations served at once, alone or in batches.")
    ] = 32
    target: Annotated[Target, Field(description="Where the target replicas are: NAME:PORT or IP:PORT,IP:PORT.")]
    draft: Annotated[
        Target | None, Field(description="Where the draft replicas are. Not set: target-only beam search.")
    ] = None
    model_ca: Annotated[
        FilePath | None,
        Field(description="CA of target's and draft's certificates, PEM. Not set: they are called in plain text."),
    ] = None
    model_certificate: Annotated[
        FilePath | None, Field(description="Certificate chain that target and draft are shown (mTLS), PEM.")
    ] = None
    model_key: Annotated[FilePath | None, Field(description="Its key.")] = None
    target_name: Annotated[
        str,
        Field(description="Name in the targets' certificates, where it is not the one in their address: several IPs."),
    ] = ""
    draft_name: Annotated[str, Field(description="Name in the drafts' certificates, likewise.")] = ""
    model_token_file: Annotated[
        FilePath | None, Field(description="File with the bearer token that target and draft are shown.")
    ] = None
    max_message_bytes: Annotated[
        int,
        Field(ge=65_536, le=1_073_741_824, description="Largest message, received from or sent to a client."),
    ] = 4_194_304
    model_message_bytes: Annotated[
        int,
        Field(
            ge=65_536,
            le=1_073_741_824,
            description="Largest message to or from target and draft: their max_message_bytes.",
        ),
    ] = 33_554_432
    max_k: Annotated[int, Field(ge=1, le=10_000, description="Largest k of a request.")] = 100
    max_beam_width: Annotated[int, Field(ge=1, le=4_096, description="Largest beam width of a request.")] = 256
    max_history_items: Annotated[
        int,
        Field(
            ge=1,
            le=100_000,
            description="Most items of a history, in a request or stored; a stored one keeps its newest.",
        ),
    ] = 500
    max_candidate_items: Annotated[
        int, Field(ge=1, le=10_000_000, description="Most excluded, and most allowed, item ids in a request.")
    ] = 10_000
    max_batch: Annotated[int, Field(ge=1, le=100_000, description="Most requests in one RecommendBatch.")] = 256
    batch_concurrency: Annotated[
        int, Field(ge=1, le=1024, description="Requests of one batch that are served, or wait for their turn, at once.")
    ] = 8
    request_timeout_seconds: Annotated[
        float, Field(gt=0, le=3600, description="Deadline of a request that brings none.")
    ] = 10.0
    draft_timeout_seconds: Annotated[
        float, Field(gt=0, le=60, description="How long a plan may take before the search goes on without it.")
    ] = 0.5
    draft_patience: Annotated[
        float,
        Field(
            ge=1,
            le=10_000,
            description="Most time for a plan, in times of what the target alone is expected to take: at least 0.1 s, "
            "at most draft_timeout_seconds.",
        ),
    ] = 4.0
    draft_backoff_seconds: Annotated[
        float,
        Field(ge=0, le=600, description="How long a draft is left alone that failed several requests in a row."),
    ] = 1.0
    target_attempts: Annotated[int, Field(ge=1, le=10, description="Replicas tried for a pass before giving up.")] = 3
    target_pass_seconds: Annotated[
        float, Field(gt=0, le=3600, description="How long a replica may take for a pass before another one is tried.")
    ] = 3.0
    affine_calls: Annotated[
        int,
        Field(
            ge=0,
            le=1024,
            description="Calls of one user at once that go to the replicas whose memory holds the user's KV; more go to any."
            " 0: all go round-robin.",
        ),
    ] = 4
    planner: Annotated[
        PlannerKind,
        Field(
            description="adaptive: plans of the size that is expected to pay, or none. fixed: by draft-nodes-per-beam."
        ),
    ] = PlannerKind.ADAPTIVE
    draft_nodes_per_beam: Annotated[
        float,
        Field(
            gt=0,
            le=64,
            description="Nodes of a plan of fixed size for each beam of each level but the last; relaxed sampling has no other.",
        ),
    ] = 2.0
    draft_max_nodes: Annotated[
        int, Field(ge=16, le=8_192, description="Most nodes of a plan, whatever the beam width.")
    ] = 240
    draft_explored_share: Annotated[
        float,
        Field(
            ge=0,
            le=1,
            description="Of the time of requests that no plan would speed up, what may go into plans, to notice when one would.",
        ),
    ] = 0.01
    canary_share: Annotated[
        float,
        Field(
            ge=0,
            le=1,
            description="Share of the users that canary_bundle serves, always the same ones: a larger share has all those of a "
            "smaller one.",
        ),
    ] = 0.0
    bundle_settle_seconds: Annotated[
        float,
        Field(
            ge=0,
            le=3600,
            description="How long requests stay on the old bundle after a first target serves the new one, so that more do.",
        ),
    ] = 2.0
    redis_timeout_seconds: Annotated[
        float, Field(gt=0, le=60, description="How long a request waits for a history from Redis.")
    ] = 0.5

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
            explored_share=self.draft_explored_share,
            patience=self.draft_patience,
        )

    def model_tls(self, server_name: str) -> ClientTls | None:
        """How the models are called; None for plain text. server_name: of the certificates, empty for the address's own."""
        if self.model_ca is None:
            return None
        return ClientTls(TlsFiles(self.model_certificate, self.model_key, self.model_ca), server_name)

    shadow_share: Annotated[
        float,
        Field(ge=0, le=1, description="Share of the strict lists that the target makes again alone, to compare them."),
    ] = 0.001
    shadow_concurrency: Annotated[
        int, Field(ge=1, le=64, description="Lists compared at once; what comes on top of them is not compared.")
    ] = 1
    shadow_mismatches: Annotated[
        int,
        Field(
            ge=0,
            le=10_000,
            description="So many lists that differ within shadow_window_seconds switch the draft off until a restart; "
            "0: never. Near-ties do not count, and float16, which rounds too coarsely for exact lists, only counts.",
        ),
    ] = 3
    shadow_window_seconds: Annotated[
        float, Field(gt=0, description="Time within which lists that differ switch the draft off.")
    ] = 3_600.0
