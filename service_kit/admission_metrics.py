"""What every service measures of its admission: who is served, who waits, who was told to come back later."""

from __future__ import annotations

from service_kit.admission import Admission
from service_kit.metrics import Read, ReadCounter, ReadGauge

PLACES = ReadGauge("atspeed_places", "Recommendations, plans or target streams that may be served at once.")
RUNNING = ReadGauge("atspeed_running", "Those that are served.")
QUEUED = ReadGauge("atspeed_queued", "Those that wait for a place.")
QUEUE = ReadGauge("atspeed_queue_places", "Those that may wait; more are refused at once.")
METRICS = (PLACES, RUNNING, QUEUED, QUEUE)


def admission_reads(admission: Admission) -> dict[ReadCounter | ReadGauge, Read]:
    """Its numbers, as metrics."""
    return {
        PLACES: lambda: admission.places,
        RUNNING: lambda: admission.running,
        QUEUED: lambda: admission.queued,
        QUEUE: lambda: admission.queue,
    }
