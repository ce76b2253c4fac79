"""What every service measures of the bundle that it follows."""

from __future__ import annotations

from service_kit.bundle_watch import BundleWatch
from service_kit.metrics import Read, ReadCounter, ReadGauge

CHANGES = ReadCounter(
    "atspeed_bundle_changes_total",
    "Bundles that the bundle setting came to name while the service ran: taken up, or refused as they cannot be served.",
    ("result",),
)
PENDING = ReadGauge(
    "atspeed_bundle_pending",
    "1 while another bundle than the one that is served is being loaded, or waits until the models serve it.",
)
METRICS = (CHANGES, PENDING)


def bundle_reads(watch: BundleWatch) -> dict[ReadCounter | ReadGauge, Read]:
    """Its numbers, as metrics."""
    return {
        CHANGES: lambda: {("taken",): watch.taken, ("refused",): watch.refused},
        PENDING: lambda: float(bool(watch.pending)),
    }
