"""Channels to other services: load balancing, health, retries.

Calls go round-robin over the replicas whose grpc.health.v1 state for the service is SERVING. On a channel `by_key`, gRPC's ring
hash (gRFC A42 and A76) chooses one of these replicas by the call's key. It moves few keys when replicas come and go.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence

import grpc

from atspeed.rpc import grpc_workarounds
from atspeed.rpc.rotating_channel import RotatingChannel
from atspeed.security.tls import ClientTls, WatchedPems

KEY_HEADER = "x-atspeed-key"
"""Metadata key of every call on a channel `by_key`. Calls with equal values go to the same replica."""


def open_channel(
    target: str,
    service: str,
    *,
    version: str = "",
    retried: Sequence[str] = (),
    max_message_bytes: int = 33_554_432,
    by_key: bool = False,
    tls: ClientTls | None = None,
    token: Callable[[], str] | None = None,
) -> grpc.aio.Channel:
    """Open a channel to the replicas of a service. Raises TlsError.

    A call that no server saw is always tried again.

    Args:
        service: full name of the service.
        version: only replicas that serve this version get calls; empty for any replica.
        retried: methods whose calls are tried again after UNAVAILABLE, up to three attempts within the deadline.
        by_key: every call carries KEY_HEADER, whose value chooses the replica.
        tls: None for plain text. Changed files are used after a new connection has been made with them.
        token: returns the bearer token of the next call.
    """
    grpc_workarounds.enable_ring_hash_header()
    options = channel_options(service, retried, max_message_bytes, version, by_key=by_key) + (
        tls.options if tls else []
    )

    def open_with(credentials: grpc.ChannelCredentials | None) -> grpc.aio.Channel:
        if credentials is None:
            return grpc.aio.insecure_channel(target, options=options)
        return grpc.aio.secure_channel(target, credentials, options=options)

    if tls is None and token is None:
        return open_with(None)
    return RotatingChannel(open_with, WatchedPems(tls.files) if tls else None, token)


def health_name(service: str, version: str) -> str:
    """Return the name in grpc.health.v1 of one version of `service`."""
    return f"{service}/{version}" if version else service


def channel_options(
    service: str, retried: Sequence[str], max_message_bytes: int, version: str = "", *, by_key: bool = False
) -> list[tuple[str, str | int]]:
    """Return a client's channel arguments. Pings notice a replica that vanished or hangs within 6 s."""
    return [
        ("grpc.enable_http_proxy", 0),  # a proxy for the internet cannot reach our services
        ("grpc.service_config", json.dumps(service_config(service, retried, version, by_key=by_key))),
        ("grpc.max_receive_message_length", max_message_bytes),
        ("grpc.max_send_message_length", max_message_bytes),
        ("grpc.keepalive_time_ms", 3_000),
        ("grpc.keepalive_timeout_ms", 3_000),
        # Closes a connection whose peer's kernel answers while its process hangs; a minute by default (grpcio 1.85).
        ("grpc.http2.ping_timeout_ms", 3_000),
        ("grpc.keepalive_permit_without_calls", 1),
        ("grpc.http2.max_pings_without_data", 0),
        ("grpc.initial_reconnect_backoff_ms", 200),
        # The limit of one connection attempt, 20 s by default. Calls by key wait that long for a machine that is gone.
        ("grpc.min_reconnect_backoff_ms", 1_000),
        ("grpc.max_reconnect_backoff_ms", 1_000),
        ("grpc.dns_min_time_between_resolutions_ms", 2_000),
    ]


def service_config(
    service: str, retried: Sequence[str], version: str = "", *, by_key: bool = False
) -> dict[str, object]:
    """Return gRPC's service config: load balancing, client-side health checks, retries."""
    # gRPC takes the first policy that it knows. A larger ring spreads keys more evenly; 4096 is gRPC's limit.
    ring = {"ring_hash_experimental": {"minRingSize": 4096, "maxRingSize": 4096, "requestHashHeader": KEY_HEADER}}
    config: dict[str, object] = {
        "loadBalancingConfig": [ring, {"round_robin": {}}] if by_key else [{"round_robin": {}}],
        "healthCheckConfig": {"serviceName": health_name(service, version)},
    }
    if retried:
        config["retryThrottling"] = _THROTTLING
        config["methodConfig"] = [{"name": [{"service": service, "method": method} for method in retried], **_RETRIES}]
    return config


# Three attempts meet three replicas round-robin. The backoff stays far below a request's deadline of 10 s.
_RETRIES = {
    "retryPolicy": {
        "maxAttempts": 3,
        "initialBackoff": "0.05s",
        "maxBackoff": "0.5s",
        "backoffMultiplier": 2,
        "retryableStatusCodes": ["UNAVAILABLE"],
    }
}

# Retries stop while more than about one call in ten fails, so that a failing service does not get three times the calls.
_THROTTLING = {"maxTokens": 100, "tokenRatio": 0.1}
