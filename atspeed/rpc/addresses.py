"""Addresses of services, as settings and options spell them.

An address is one of

    HOST:PORT                  one name or IP; every address that the name has is a replica
    IP:PORT,IP:PORT,...        several replicas
    dns:///HOST:PORT, ipv4:IP:PORT,..., ipv6:[IP]:PORT,..., unix:PATH   as gRPC spells it
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Annotated

from pydantic import AfterValidator

from atspeed.engine.host_names import host_port, ip_version, is_host

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
    return f"ipv{_common_version(endpoints)}:" + ",".join(host_port(host, port) for host, port in endpoints)


Target = Annotated[str, AfterValidator(target_uri)]
"""Type of a setting with an address. Its value is the gRPC target."""


def _host_name(text: str) -> str:
    if text and not is_host(text):
        raise ValueError("is not a valid host name")
    return text


HostName = Annotated[str, AfterValidator(_host_name)]
"""Type of a setting with the name in a certificate, or the empty string."""


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
