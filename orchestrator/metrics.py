"""What the orchestrator measures: its lists, what they took, shadow checks, and the state of what it asks."""

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
from orchestrator.recommend import UNANSWERED
from orchestrator.recommendation import Recommendation
from orchestrator.serving.track_router import TrackRouter
from orchestrator.speculation_breaker import SWITCHED_OFF

LISTS = CounterOf(
    "atspeed_recommendations_total",
    "Lists that were asked for, alone or in a batch, by mode and gRPC status.",
    ("track", "mode", "code"),
)
STAGE_SECONDS = HistogramOf(
    "atspeed_stage_seconds",
    "Time of a list by stage: history, draft and target (the waits for these), selection, total; draft_forward and "
    "target_forward are what the models themselves took.",
    ("track", "mode", "stage"),
)
PASSES = HistogramOf("atspeed_target_passes", "Target passes of a list.", ("track", "mode"), WHOLE)
ACCEPTED = HistogramOf("atspeed_accepted_levels", "Levels of a list that needed no target pass.", ("mode",), WHOLE)
NODES = CounterOf(
    "atspeed_nodes_total",
    "Nodes by what became of them: drafted (evaluated because a plan held them), used (of these, beams), foreseen (evaluated "
    "by the target before it was asked), prefetched_used (of these, beams), recovered (beams that no plan held and nobody "
    "foresaw), forced (beams that were their parent's only child).",
    ("mode", "kind"),
)
ASKED = HistogramOf(
    "atspeed_plan_nodes_requested",
    "Nodes that the planner asked the draft for; 0 where no plan would pay.",
    ("mode",),
    (0, *SIZES),
)
PREDICTION = HistogramOf(
    "atspeed_pass_prediction_ratio",
    "Time that the models' passes of a list took, over what was predicted for them; 1 is right.",
    ("model",),
    (0.25, 0.5, 0.7, 0.8, 0.85, 0.9, 0.95, 1, 1.05, 1.1, 1.15, 1.2, 1.3, 1.5, 2, 4),
)
RETRIES = CounterOf("atspeed_target_retries_total", "Streams that broke and were taken up on another replica.")
DEGRADED = CounterOf(
    "atspeed_degraded_total", "Lists that did without something, by what and why.", ("track", "reason")
)
SHORT = CounterOf("atspeed_short_lists_total", "Lists with fewer items than asked for.")
SHADOW = ReadCounter(
    "atspeed_shadow_checks_total",
    "Strict lists that came up for a shadow check: identical, near-tie or different; failed, where the target gave no "
    "second list; dropped, where another check was running.",
    ("track", "outcome"),
)
SHADOW_GAP = ReadGauge(
    "atspeed_shadow_largest_gap", "Largest difference of two scores at one place in a shadow check.", ("track",)
)
SPECULATION = ReadGauge(
    "atspeed_speculation_enabled", "1 while the draft is asked, 0 after shadow checks switched it off.", ("track",)
)
RESTING = ReadGauge("atspeed_draft_circuit_open", "1 while the draft is left alone after a failure.", ("track",))
CANARY_SHARE = ReadGauge(
    "atspeed_canary_share", "Share of the users that the canary serves now; 0 while there is none that a target serves."
)
METRICS = (
    *(LISTS, STAGE_SECONDS, PASSES, ACCEPTED, NODES, ASKED, PREDICTION, RETRIES, DEGRADED, SHORT),
    *(SHADOW, SHADOW_GAP, SPECULATION, RESTING, CANARY_SHARE),
)

_REASONS = {
    SWITCHED_OFF: "speculation_off",
    UNANSWERED: "plan_unanswered",
    "draft: left alone after a recent failure": "draft_resting",
    "draft: invalid answer": "draft_invalid",
    "draft: UNAVAILABLE": "draft_unavailable",
    "draft: DEADLINE_EXCEEDED": "draft_late",
    "draft: RESOURCE_EXHAUSTED": "draft_busy",
    "draft: FAILED_PRECONDITION": "draft_version",
    "draft: INTERNAL": "draft_failed",
}
_NARROWED = "beam_width"
"""Label values of what `degraded` says; all else is `other`, so that no text can make a series."""


class OrchestratorMetrics:
    """The metrics of one orchestrator process."""

    def __init__(self, admission: Admission, lanes: TrackRouter, watches: Sequence[BundleWatch]) -> None:
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
        for track, reason in product(Track, (*_REASONS.values(), _NARROWED, "other")):
            self._degraded.labels(track, reason)  # a series that begins with its first 1 shows no increase
        for reads in (admission_reads(admission), bundle_reads(watches), _lane_reads(lanes)):
            self.registry.register(Readings(reads))

    @contextmanager
    def asked(self, track: Track, mode: Mode, deadline: Deadline) -> Iterator[None]:
        """Around the making of a list: how it ended. gRPC cancels what is late, as it does what nobody wants any more."""
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

    def made(self, track: Track, recommendation: Recommendation) -> None:
        """A list was made: what it took."""
        mode, memo = recommendation.order.mode, recommendation.memo
        self._passes.labels(track, mode).observe(memo.passes)
        self._accepted.labels(mode).observe(recommendation.accepted_levels)
        for kind, nodes in asdict(recommendation.nodes).items():
            self._nodes.labels(mode, kind).inc(nodes)
        for stage, nanoseconds in _stages(recommendation).items():
            self._seconds.labels(track, mode, stage).observe(nanoseconds / 1e9)
        self._asked.labels(mode).observe(recommendation.planning.nodes_asked)
        self._predicted("target", recommendation.target.cost, recommendation.planning.target_predicted_ns)
        self._predicted("draft", recommendation.draft.cost, recommendation.planning.draft_predicted_ns)
        self._retries.inc(recommendation.target.retries)
        self._short.inc(bool(recommendation.fewer_than_k_reason))
        for reason in recommendation.degraded:
            self._degraded.labels(track, _reason(reason)).inc()

    def _predicted(self, model: str, cost: PassStats, predicted_ns: float | None) -> None:
        if predicted_ns:
            self._prediction.labels(model).observe(cost.forward_ns / predicted_ns)


def _lane_reads(lanes: TrackRouter) -> dict[ReadCounter | ReadGauge, Read]:
    """What belongs to each track."""
    each = {track: lanes[track] for track in Track}
    return {
        SHADOW: lambda: {
            (track, name): lane.shadow.outcomes[name] for track, lane in each.items() for name in lane.shadow.OUTCOMES
        },
        SHADOW_GAP: lambda: {(track,): lane.shadow.largest_gap for track, lane in each.items()},
        SPECULATION: lambda: {(track,): lane.speculation_breaker.on for track, lane in each.items()},
        RESTING: lambda: {(track,): lane.snapshots.draft_rests for track, lane in each.items()},
        CANARY_SHARE: lambda: lanes.share,
    }


def _reason(text: str) -> str:
    """The label value of what a list says that it did without."""
    return _NARROWED if text.startswith("beam width: ") else _REASONS.get(text, "other")


def _stages(recommendation: Recommendation) -> dict[str, int]:
    """Nanoseconds of each stage."""
    times, target, draft = recommendation.times, recommendation.target, recommendation.draft
    return {
        "history": times.history_ns,
        "draft": draft.wait_ns,
        "target": target.wait_ns,
        "selection": times.selection_ns,
        "total": times.total_ns,
        "draft_forward": draft.cost.forward_ns,
        "target_forward": target.cost.forward_ns,
    }
