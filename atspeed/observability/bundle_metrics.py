"""What every service measures of the bundles that it follows."""

from __future__ import annotations

from collections.abc import Sequence

from atspeed.observability.metrics import Read, ReadCounter, ReadGauge
from atspeed.rollout.bundle_watch import BundleWatch

SERVED = ReadGauge("atspeed_bundle_served", "1 while a bundle is served on this track: stable or canary.", ("track",))
CHANGES = ReadCounter(
    "atspeed_bundle_changes_total",
    "Bundles that a track's setting came to name while the service ran: taken up, or refused as they cannot be served.",
    ("track", "result"),
)
PENDING = ReadGauge(
    "atspeed_bundle_pending",
    "1 while another bundle than the one that is served is being loaded, or waits until the models serve it.",
    ("track",),
)
METRICS = (SERVED, CHANGES, PENDING)


def bundle_reads(watches: Sequence[BundleWatch]) -> dict[ReadCounter | ReadGauge, Read]:
    """Their numbers, as metrics."""
    return {
        SERVED: lambda: {(watch.track,): bool(watch.served) for watch in watches},
        CHANGES: lambda: {
            (watch.track, result): count
            for watch in watches
            for result, count in (("taken", watch.taken), ("refused", watch.refused))
        },
        PENDING: lambda: {(watch.track,): bool(watch.pending) for watch in watches},
    }
