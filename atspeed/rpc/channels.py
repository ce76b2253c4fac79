"""Channels to other services: addresses, load balancing, health, retries.

An address is one of

    HOST:PORT                  one name or IP; every address that the name has is a replica
    IP:PORT,IP:PORT,...        several replicas
    dns:///HOST:PORT, ipv4:IP:PORT,..., ipv6:[IP]:PORT,..., unix:PATH   as gRPC spells it

Calls go round-robin over the replicas whose grpc.health.v1 state for the service is SERVING. On a channel `by_key`, gRPC's ring
hash (gRFC A42 and A76) chooses one of these replicas by the call's key. It moves few keys when replicas come and go.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from functools import partial
from typing import Annotated

import grpc
from pydantic import AfterValidator

from atspeed.configuration.settings import address as join
from atspeed.engine.host_names import ip_version, is_host
from atspeed.rpc import grpc_workarounds
from atspeed.rpc.rotating_channel import RotatingChannel
from atspeed.security.tls import ClientTls, WatchedPems

KEY_HEADER = "x-atspeed-key"
"""Metadata key of every call on a channel `by_key`. Calls with equal values go to the same replica."""

_MAX_SOCKET_PATH = 107  # bytes of sun_path without the final zero, sockaddr_un(7)


def target_uri(address: str) -> str:
    """Return the gRPC target of an address (see the module). Raises ValueError with the mistake."""
    for scheme, check in _CHECKS.items():
        if address.startswith(scheme):
            check(address.removeprefix(scheme))
            return address
    endpoints = [_endpoint(part.strip()) for part in address.split(",")]
    if len(endpoints) == 1 and ip_version(endpoints[0][0]) is None:
        host, port = endpoints[0]
        return f"dns:///{host}:{port}"
    return f"ipv{_common_version(endpoints)}:" + ",".join(join(host, port) for host, port in endpoints)


Target = Annotated[str, AfterValidator(target_uri)]
"""Type of a setting with an address. Its value is the gRPC target."""


def _host_name(text: str) -> str:
    if text and not is_host(text):
        raise ValueError("is not a valid host name")
    return text


HostName = Annotated[str, AfterValidator(_host_name)]
"""Type of a setting with the name in a certificate, or the empty string."""


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


def _endpoint(text: str) -> tuple[str, int]:
    host, _, port = text.rpartition(":")
    if host.startswith("[") and host.endswith("]"):
        host = host[1:-1] if ip_version(host[1:-1]) == 6 else ""
    elif ":" in host:
        host = ""  # an IPv6 address without brackets, or an unknown scheme
    if not (is_host(host) and port.isascii() and port.isdecimal() and len(port) <= 5 and 0 < int(port) < 65_536):
        raise ValueError(f"{text!r} is not HOST:PORT (IPv6 in brackets)")
    return host, int(port)


def _common_version(endpoints: Sequence[tuple[str, int]]) -> int:
    """Return the IP version of all endpoints: 4 or 6."""
    versions = {ip_version(host) for host, _ in endpoints}
    if len(versions - {None}) > 1:
        raise ValueError("IPv4 and IPv6 addresses cannot be mixed")
    if (version := versions.pop()) is None or versions:
        raise ValueError("several replicas need one IP:PORT each, or one host name that resolves to all of them")
    return version


def _check_dns(rest: str) -> None:
    server, name = "", rest
    if rest.startswith("//"):
        server, _, name = rest.removeprefix("//").partition("/")
    _endpoint(name)
    if server:
        _common_version([_endpoint(server)])


def _check_ips(version: int, rest: str) -> None:
    if _common_version([_endpoint(part) for part in rest.split(",")]) != version:
        raise ValueError(f"ipv{version}: takes IPv{version} addresses, IP:PORT each")


def _check_socket(rest: str) -> None:
    path = rest.removeprefix("//")
    relative = path != rest and not path.startswith("/")
    if not path or relative or not path.isprintable() or len(path.encode()) > _MAX_SOCKET_PATH:
        raise ValueError(f"names no address: a socket is unix:PATH or unix:///PATH, at most {_MAX_SOCKET_PATH} bytes")


_CHECKS: dict[str, Callable[[str], None]] = {
    "dns:": _check_dns,
    "ipv4:": partial(_check_ips, 4),
    "ipv6:": partial(_check_ips, 6),
    "unix:": _check_socket,
}
