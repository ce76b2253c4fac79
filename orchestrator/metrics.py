"""Metrics of the orchestrator: lists, their cost, shadow checks, release tracks."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from itertools import product

from prometheus_client import CollectorRegistry

from atspeed.concurrency.deadline import Deadline
from atspeed.engine.model.pass_stats import PassStats
from atspeed.engine.search.mode import Mode
from atspeed.errors import ServiceError
from atspeed.observability.admission_metrics import admission_reads
from atspeed.observability.bundle_metrics import bundle_reads
from atspeed.observability.metrics import SIZES, WHOLE, CounterOf, HistogramOf, Read, ReadCounter, ReadGauge, Readings
from atspeed.rollout.bundle_watch import BundleWatch
from atspeed.rollout.release_track import Track
from atspeed.rpc.admission import Admission
from orchestrator.degraded_reason import DegradedReason
from orchestrator.recommendation import Diagnostics, Recommendation
from orchestrator.serving.event_prefixes import EventPrefixes
from orchestrator.serving.track_router import TrackRouter

LISTS = CounterOf(
    "atspeed_recommendations_total",
    "Requested lists, alone or in a batch, by mode and gRPC status.",
    ("track", "mode", "code"),
    essential=True,
)
STAGE_SECONDS = HistogramOf(
    "atspeed_stage_seconds",
    "Time of a list by stage: history, draft and target (waits for their calls), selection, total. draft_forward and "
    "target_forward are the times in the models.",
    ("track", "mode", "stage"),
    essential=True,
)
PASSES = HistogramOf("atspeed_target_passes", "Target passes of a list.", ("track", "mode"), WHOLE, essential=True)
ACCEPTED = HistogramOf(
    "atspeed_accepted_levels", "Levels of a list that needed no target pass of their own.", ("mode",), WHOLE
)
NODES = CounterOf(
    "atspeed_nodes_total",
    "Nodes of the searches by kind: drafted (evaluated because a plan held them), used (drafted nodes that became beams), "
    "prefetched (evaluated by the target in advance), prefetched_used (prefetched nodes that became beams), recovered (beams "
    "that no plan held and that were not prefetched), forced (beams that were their parent's only child).",
    ("mode", "kind"),
)
ASKED = HistogramOf(
    "atspeed_plan_nodes_requested",
    "Nodes that the planner asked the draft for. 0: no plan was expected to pay.",
    ("mode",),
    (0, *SIZES),
)
PREDICTION = HistogramOf(
    "atspeed_pass_prediction_ratio",
    "Measured time of a list's passes, divided by the predicted time.",
    ("model",),
    (0.25, 0.5, 0.7, 0.8, 0.85, 0.9, 0.95, 1, 1.05, 1.1, 1.15, 1.2, 1.3, 1.5, 2, 4),
)
RETRIES = CounterOf("atspeed_target_retries_total", "Calls to the target that were made again.")
DEGRADED = CounterOf(
    "atspeed_degraded_total",
    "Lists that were made without one component or with fewer beams, by reason (the contract's DegradedReason).",
    ("track", "reason"),
    essential=True,
)
SHORT = CounterOf("atspeed_short_lists_total", "Lists with fewer than k items.")
SHADOW = ReadCounter(
    "atspeed_shadow_checks_total",
    "Shadow checks of strict lists by outcome: identical (bit for bit), different, failed (the target made no second "
    "list), dropped (too many checks or requests at once).",
    ("track", "outcome"),
    essential=True,
)
SHADOW_GAP = ReadGauge(
    "atspeed_shadow_largest_gap", "Largest score difference at one rank in a shadow check.", ("track",)
)
SPECULATION = ReadGauge(
    "atspeed_speculation_enabled",
    "1 while requests may speculate, 0 after shadow checks disabled speculation.",
    ("track",),
    essential=True,
)
DRAFT_CIRCUIT = ReadGauge("atspeed_draft_circuit_open", "1 while the draft is not called after failures.", ("track",))
CANARY_SHARE = ReadGauge(
    "atspeed_canary_share",
    "Share of the users that the canary serves now. 0: no target serves a canary.",
    essential=True,
)
EVENT_PREFIXES = ReadCounter(
    "atspeed_event_prefixes_total",
    "Prompts that the target read after events, by outcome: made, and of these hit (the user's next list came before another "
    "event) or wasted (another event or the user's erasure came first); cancelled (by a request; it waits again), failed, "
    "dropped (too many waited).",
    ("outcome",),
)
METRICS = (
    *(LISTS, STAGE_SECONDS, PASSES, ACCEPTED, NODES, ASKED, PREDICTION, RETRIES, DEGRADED, SHORT),
    *(SHADOW, SHADOW_GAP, SPECULATION, DRAFT_CIRCUIT, CANARY_SHARE, EVENT_PREFIXES),
)


class OrchestratorMetrics:
    """Metrics of one orchestrator process."""

    def __init__(
        self, admission: Admission, router: TrackRouter, watches: Sequence[BundleWatch], prefixes: EventPrefixes
    ) -> None:
        self.registry = CollectorRegistry()
        self._lists = LISTS.build(self.registry)
        self._seconds = STAGE_SECONDS.build(self.registry)
        self._passes = PASSES.build(self.registry)
        self._accepted = ACCEPTED.build(self.registry)
        self._asked = ASKED.build(self.registry)
        self._prediction = PREDICTION.build(self.registry)
        self._nodes = NODES.build(self.registry)
        self._retries = RETRIES.build(self.registry)
        self._degraded = DEGRADED.build(self.registry)
        self._short = SHORT.build(self.registry)
        for track, reason in product(Track, DegradedReason):
            self._degraded.labels(
                track, reason
            )  # a series that appears with its first 1 shows no increase in Prometheus
        for reads in (admission_reads(admission), bundle_reads(watches), _track_reads(router), _prefix_reads(prefixes)):
            self.registry.register(Readings(reads))

    @contextmanager
    def count_request(self, track: Track, mode: Mode, deadline: Deadline) -> Iterator[None]:
        """Count a list by the status that it ends with. gRPC cancels late calls as it cancels abandoned ones."""
        code = "OK"
        try:
            yield
        except ServiceError as error:
            code = error.code
            raise
        except asyncio.CancelledError:
            code = "DEADLINE_EXCEEDED" if deadline.passed else "CANCELLED"
            raise
        except Exception:
            code = "INTERNAL"
            raise
        finally:
            self._lists.labels(track, mode, code).inc()

    def record(self, track: Track, recommendation: Recommendation) -> None:
        """Record the cost of a finished list."""
        mode, diagnostics = recommendation.params.mode, recommendation.diagnostics
        planning = diagnostics.planning
        self._passes.labels(track, mode).observe(diagnostics.memo.passes)
        self._accepted.labels(mode).observe(diagnostics.accepted_levels)
        for kind, nodes in asdict(diagnostics.nodes).items():
            self._nodes.labels(mode, kind).inc(nodes)
        for stage, nanoseconds in _stages(diagnostics).items():
            self._seconds.labels(track, mode, stage).observe(nanoseconds / 1e9)
        self._asked.labels(mode).observe(planning.nodes_asked)
        self._observe_prediction("target", diagnostics.target.cost, planning.target_predicted_ns)
        self._observe_prediction("draft", diagnostics.draft.cost, planning.draft_predicted_ns)
        self._retries.inc(diagnostics.target.retries)
        self._short.inc(bool(recommendation.fewer_than_k))
        for reason in recommendation.degraded_reasons:
            self._degraded.labels(track, reason).inc()

    def _observe_prediction(self, model: str, cost: PassStats, predicted_ns: float | None) -> None:
        if predicted_ns:
            self._prediction.labels(model).observe(cost.forward_ns / predicted_ns)


def _prefix_reads(prefixes: EventPrefixes) -> dict[ReadCounter | ReadGauge, Read]:
    return {EVENT_PREFIXES: lambda: {(name,): prefixes.outcomes[name] for name in prefixes.OUTCOMES}}


def _track_reads(router: TrackRouter) -> dict[ReadCounter | ReadGauge, Read]:
    """Return the readings of each track."""
    states = {track: router[track] for track in Track}
    return {
        SHADOW: lambda: {
            (track, name): state.shadow.outcomes[name]
            for track, state in states.items()
            for name in state.shadow.OUTCOMES
        },
        SHADOW_GAP: lambda: {(track,): state.shadow.largest_gap for track, state in states.items()},
        SPECULATION: lambda: {(track,): state.speculation_breaker.enabled for track, state in states.items()},
        DRAFT_CIRCUIT: lambda: {(track,): state.snapshots.draft_circuit_open for track, state in states.items()},
        CANARY_SHARE: lambda: router.share,
    }


def _stages(diagnostics: Diagnostics) -> dict[str, int]:
    """Return the nanoseconds of each stage."""
    times, target, draft = diagnostics.times, diagnostics.target, diagnostics.draft
    return {
        "history": times.history_ns,
        "draft": draft.wait_ns,
        "target": target.wait_ns,
        "selection": times.selection_ns,
        "total": times.total_ns,
        "draft_forward": draft.cost.forward_ns,
        "target_forward": target.cost.forward_ns,
    }
