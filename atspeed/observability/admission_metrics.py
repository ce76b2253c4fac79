"""What every service measures of its admission: who is served, who waits, who was told to come back later."""

from __future__ import annotations

from atspeed.observability.metrics import Read, ReadCounter, ReadGauge
from atspeed.rpc.admission import Admission

PLACES = ReadGauge("atspeed_admission_slots", "Recommendations, plans or target streams that may be served at once.")
RUNNING = ReadGauge("atspeed_admission_running", "Those that are served.")
QUEUED = ReadGauge("atspeed_admission_queued", "Those that wait for a place.")
QUEUE = ReadGauge("atspeed_admission_queue_limit", "Those that may wait; more are refused at once.")
METRICS = (PLACES, RUNNING, QUEUED, QUEUE)


def admission_reads(admission: Admission) -> dict[ReadCounter | ReadGauge, Read]:
    """Its numbers, as metrics."""
    return {
        PLACES: lambda: admission.places,
        RUNNING: lambda: admission.running,
        QUEUED: lambda: admission.queued,
        QUEUE: lambda: admission.queue,
    }
