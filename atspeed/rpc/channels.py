"""Channels to other services: addresses, load balancing, health, retries.

An address is one of

    HOST:PORT                  one name or IP; every address that the name has is a replica
    IP:PORT,IP:PORT,...        several replicas
    dns:///HOST:PORT, ipv4:IP:PORT,..., ipv6:[IP]:PORT,..., unix:PATH   as gRPC spells it

Calls go round-robin over the replicas whose grpc.health.v1 state for the service is SERVING, or, on a channel `by_key`, to the
one of these that the call's key stands for: gRPC's ring hash (gRFC A42 and A76), which moves few keys when replicas come and go.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Sequence
from functools import partial
from typing import Annotated

import grpc
from pydantic import AfterValidator

from atspeed.configuration.settings import address as join
from atspeed.engine.host_names import ip_version, is_host
from atspeed.rpc.rotating_channel import RotatingChannel
from atspeed.security.tls import ClientTls, WatchedPems

KEY_HEADER = "x-atspeed-key"
"""Metadata that every call on a channel `by_key` has: calls of equal values go to the same replica."""

_LONGEST_SOCKET_PATH = 107  # sun_path, sockaddr_un(7)
# gRPC's C core reads `requestHashHeader` only where this is set (grpcio 1.85); without it, calls on a ring fail.
_RING_HASH_SWITCH = "GRPC_EXPERIMENTAL_RING_HASH_SET_REQUEST_HASH_KEY"


def target_uri(address: str) -> str:
    """The gRPC target of an address (module docstring). ValueError says what is wrong with it."""
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
"""Type of a setting that holds an address; its value is the gRPC target."""


def _host_name(text: str) -> str:
    if text and not is_host(text):
        raise ValueError("is no name of a host")
    return text


HostName = Annotated[str, AfterValidator(_host_name)]
"""Type of a setting that holds the name in a certificate, or nothing."""


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
    """A channel to the replicas of `service` (its full name) that serve `version`; any, where it is empty.

    Calls of the methods in `retried` that meet UNAVAILABLE are tried again, up to three times in all and within their
    deadline. A call that no server saw is always tried again. by_key: calls have KEY_HEADER and go where it says. tls: None for
    plain text; files that change are used as soon as a connection stands with them. token: gives what calls show as their bearer
    token. Raises TlsError.
    """
    os.environ.setdefault(_RING_HASH_SWITCH, "true")
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
    """The name of grpc.health.v1 under which a replica is SERVING one version of `service`."""
    return f"{service}/{version}" if version else service


def channel_options(
    service: str, retried: Sequence[str], max_message_bytes: int, version: str = "", *, by_key: bool = False
) -> list[tuple[str, str | int]]:
    """Channel arguments of a client. It pings its connections: a replica that vanished, or hangs, is noticed within 6 s."""
    return [
        ("grpc.enable_http_proxy", 0),  # a proxy for the outside world knows nothing of our services
        ("grpc.service_config", json.dumps(service_config(service, retried, version, by_key=by_key))),
        ("grpc.max_receive_message_length", max_message_bytes),
        ("grpc.max_send_message_length", max_message_bytes),
        ("grpc.keepalive_time_ms", 3_000),
        ("grpc.keepalive_timeout_ms", 3_000),
        # A peer whose kernel answers and whose process does not is closed by this one, a minute by default (grpcio 1.85).
        ("grpc.http2.ping_timeout_ms", 3_000),
        ("grpc.keepalive_permit_without_calls", 1),
        ("grpc.http2.max_pings_without_data", 0),
        ("grpc.initial_reconnect_backoff_ms", 200),
        # How long one attempt to connect may take, 20 s by default: so long would calls by key wait for a machine that is gone.
        ("grpc.min_reconnect_backoff_ms", 1_000),
        ("grpc.max_reconnect_backoff_ms", 1_000),
        ("grpc.dns_min_time_between_resolutions_ms", 2_000),
    ]


def service_config(
    service: str, retried: Sequence[str], version: str = "", *, by_key: bool = False
) -> dict[str, object]:
    """gRPC's service config: balancing, client-side health checking, retries of the named methods."""
    # The first policy that gRPC knows counts. A larger ring spreads keys more evenly; 4096 is the most that gRPC allows.
    ring = {"ring_hash_experimental": {"minRingSize": 4096, "maxRingSize": 4096, "requestHashHeader": KEY_HEADER}}
    config: dict[str, object] = {
        "loadBalancingConfig": [ring, {"round_robin": {}}] if by_key else [{"round_robin": {}}],
        "healthCheckConfig": {"serviceName": health_name(service, version)},
    }
    if retried:
        config["retryThrottling"] = _THROTTLING
        config["methodConfig"] = [{"name": [{"service": service, "method": method} for method in retried], **_RETRIES}]
    return config


_RETRIES = {
    "retryPolicy": {
        "maxAttempts": 3,
        "initialBackoff": "0.05s",
        "maxBackoff": "0.5s",
        "backoffMultiplier": 2,
        "retryableStatusCodes": ["UNAVAILABLE"],
    }
}

# Retries stop while more than about one call in ten fails: a service in trouble must not get three times the calls.
_THROTTLING = {"maxTokens": 100, "tokenRatio": 0.1}


def _endpoint(text: str) -> tuple[str, int]:
    host, _, port = text.rpartition(":")
    if host.startswith("[") and host.endswith("]"):
        host = host[1:-1] if ip_version(host[1:-1]) == 6 else ""
    elif ":" in host:
        host = ""  # an IPv6 address without brackets, or what is meant for another scheme
    if not (is_host(host) and port.isascii() and port.isdecimal() and 0 < int(port) < 65_536):
        raise ValueError(f"{text!r} is not HOST:PORT (IPv6 in brackets)")
    return host, int(port)


def _common_version(endpoints: Sequence[tuple[str, int]]) -> int:
    """4 or 6."""
    versions = {ip_version(host) for host, _ in endpoints}
    if len(versions - {None}) > 1:
        raise ValueError("IPv4 and IPv6 addresses cannot be mixed")
    if (version := versions.pop()) is None or versions:
        raise ValueError("several replicas need an IP:PORT each, or one name that resolves to all of them")
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
    if not path or (path != rest and not path.startswith("/")) or len(path.encode()) > _LONGEST_SOCKET_PATH:
        raise ValueError(f"a socket is unix:PATH or unix:///PATH, {_LONGEST_SOCKET_PATH} bytes at most")


_CHECKS: dict[str, Callable[[str], None]] = {
    "dns:": _check_dns,
    "ipv4:": partial(_check_ips, 4),
    "ipv6:": partial(_check_ips, 6),
    "unix:": _check_socket,
}
