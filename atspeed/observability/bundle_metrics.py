"""Metrics of hot reload, for every service."""

from __future__ import annotations

from collections.abc import Sequence

from atspeed.observability.metrics import Read, ReadCounter, ReadGauge
from atspeed.rollout.bundle_watch import BundleWatch

SERVED = ReadGauge(
    "atspeed_bundle_served", "1 while a bundle is served on this track: stable or canary.", ("track",), essential=True
)
CHANGES = ReadCounter(
    "atspeed_bundle_changes_total",
    "Bundle changes since the start, by result: taken (activated) or refused (the bundle cannot be served).",
    ("track", "result"),
    essential=True,
)
PENDING = ReadGauge(
    "atspeed_bundle_pending",
    "1 while another bundle is being loaded, or waits until the models serve it.",
    ("track",),
)
UNREACHABLE = ReadCounter(
    "atspeed_bundle_store_failures_total",
    "Checks of a bundle's URL at which the store could not be reached, or refused. The served bundle stays.",
    ("track",),
)
REACHED = ReadGauge(
    "atspeed_bundle_store_reached",
    "0 while the store of a bundle's URL cannot be reached; a service that starts then serves its cached bundle.",
    ("track",),
    essential=True,
)
METRICS = (SERVED, CHANGES, PENDING, UNREACHABLE, REACHED)


def bundle_reads(watches: Sequence[BundleWatch]) -> dict[ReadCounter | ReadGauge, Read]:
    """Return the readings of bundle watches."""
    return {
        SERVED: lambda: {(watch.track,): watch.served is not None for watch in watches},
        CHANGES: lambda: {
            (watch.track, result): count
            for watch in watches
            for result, count in (("taken", watch.activated), ("refused", watch.rejected))
        },
        PENDING: lambda: {(watch.track,): watch.pending is not None for watch in watches},
        UNREACHABLE: lambda: {(watch.track,): watch.unreachable for watch in watches},
        REACHED: lambda: {(watch.track,): watch.reached for watch in watches},
    }
