"""Channels to other services: addresses, load balancing, health, retries.

An address is one of

    HOST:PORT                  one name or IP; every address that the name has is a replica
    IP:PORT,IP:PORT,...        several replicas
    dns:///HOST:PORT, ipv4:..., ipv6:..., unix:...   as gRPC spells it

Calls go round-robin over the replicas whose grpc.health.v1 state for the service is SERVING, or, on a channel `by_key`, to the
one of these that the call's key stands for: gRPC's ring hash (gRFC A42 and A76), which moves few keys when replicas come and go.
"""

from __future__ import annotations

import ipaddress
import json
import os
import re
from collections.abc import Callable, Sequence
from typing import Annotated

import grpc
from pydantic import AfterValidator

from atspeed.configuration.settings import address as join
from atspeed.rpc.rotating_channel import RotatingChannel
from atspeed.security.tls import ClientTls, WatchedPems

KEY_HEADER = "x-atspeed-key"
"""Metadata that every call on a channel `by_key` has: calls of equal values go to the same replica."""

_SCHEMES = ("dns:", "ipv4:", "ipv6:", "unix:")
_HOST_NAME = re.compile(r"[A-Za-z0-9_]([A-Za-z0-9._-]*[A-Za-z0-9_.])?")
# gRPC's C core reads `requestHashHeader` only where this is set (grpcio 1.85); without it, calls on a ring fail.
_RING_HASH_SWITCH = "GRPC_EXPERIMENTAL_RING_HASH_SET_REQUEST_HASH_KEY"


def target_uri(address: str) -> str:
    """The gRPC target of an address (module docstring). ValueError says what is wrong with it."""
    if address.startswith(_SCHEMES):
        _check_uri(address)
        return address
    endpoints = [_endpoint(part.strip()) for part in address.split(",")]
    if len(endpoints) == 1 and _ip_version(endpoints[0][0]) is None:
        host, port = endpoints[0]
        return f"dns:///{host}:{port}"
    versions = {_ip_version(host) for host, _ in endpoints}
    if None in versions:
        raise ValueError("several replicas need an IP:PORT each, or one name that resolves to all of them")
    if len(versions) > 1:
        raise ValueError("IPv4 and IPv6 addresses cannot be mixed")
    version = versions.pop()
    return f"ipv{version}:" + ",".join(join(host, port) for host, port in endpoints)


Target = Annotated[str, AfterValidator(target_uri)]
"""Type of a setting that holds an address; its value is the gRPC target."""


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
    host, colon, port = text.rpartition(":")
    if host.startswith("[") and host.endswith("]"):
        host = host[1:-1]
    named = _HOST_NAME.fullmatch(host) or _ip_version(host) is not None
    if not (colon and named and port.isascii() and port.isdecimal() and len(port) <= 5 and 0 < int(port) < 65_536):
        raise ValueError(f"{text!r} is not HOST:PORT")
    return host, int(port)


def _check_uri(uri: str) -> None:
    """Raise ValueError for what gRPC would take and never connect to."""
    scheme, _, rest = uri.partition(":")
    # After `//` comes an authority, up to the next slash: for dns the server to ask.
    place = rest.partition("//")[2].partition("/")[2] if rest.startswith("//") and scheme != "unix" else rest
    if not place or not uri.isprintable():
        raise ValueError(f"{uri!r} names no address")
    if scheme == "dns" and ":" in place:
        _endpoint(place)
    if scheme in {"ipv4", "ipv6"} and any(
        _ip_version(_endpoint(part)[0]) != int(scheme[-1]) for part in place.split(",")
    ):
        raise ValueError(f"{uri!r} must hold IP:PORT, IP:PORT, all of IP version {scheme[-1]}")


def _ip_version(host: str) -> int | None:
    try:
        return ipaddress.ip_address(host).version
    except ValueError:
        return None
