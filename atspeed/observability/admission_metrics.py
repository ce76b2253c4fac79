"""Metrics of admission control, for every service."""

from __future__ import annotations

from atspeed.observability.metrics import Read, ReadCounter, ReadGauge
from atspeed.rpc.admission import Admission

SLOTS = ReadGauge("atspeed_admission_slots", "Recommendations, plans or target streams that may run at once.")
RUNNING = ReadGauge("atspeed_admission_running", "Recommendations, plans or target streams that run.", essential=True)
QUEUED = ReadGauge(
    "atspeed_admission_queued", "Recommendations, plans or target streams that wait for a slot.", essential=True
)
QUEUE_LIMIT = ReadGauge(
    "atspeed_admission_queue_limit", "Recommendations, plans or target streams that may wait; more are refused."
)
METRICS = (SLOTS, RUNNING, QUEUED, QUEUE_LIMIT)


def admission_reads(admission: Admission) -> dict[ReadCounter | ReadGauge, Read]:
    """Return the readings of an admission."""
    return {
        SLOTS: lambda: admission.slots,
        RUNNING: lambda: admission.running,
        QUEUED: lambda: admission.queued,
        QUEUE_LIMIT: lambda: admission.queue_limit,
    }
