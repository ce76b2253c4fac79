"""Addresses of a service.

HOST:PORT                  one name or IP; every address that the name has is a replica
IP:PORT,IP:PORT,...        several replicas
dns:///HOST:PORT, ipv4:IP:PORT,..., ipv6:[IP]:PORT,..., unix:PATH   as gRPC spells it
"""

from __future__ import annotations

import ipaddress

_SCHEMES = ("ipv4:", "ipv6:", "unix:")
_MAX_SOCKET_PATH = 107  # bytes of sun_path without the final zero, sockaddr_un(7)


def target(address: str) -> str:
    """Return the gRPC target of an address. Raises ValueError with the mistake."""
    if address.startswith("dns:"):
        _check_dns(address.removeprefix("dns:"))
        return address
    if address.startswith("unix:"):
        _check_socket(address.removeprefix("unix:"))
        return address
    scheme = next((one for one in _SCHEMES if address.startswith(one)), "")
    endpoints = [_endpoint(part.strip()) for part in address.removeprefix(scheme).split(",")]
    if len(endpoints) == 1 and endpoints[0][2] is None and not scheme:
        return "dns:///{}:{}".format(*endpoints[0])
    versions = {version for _, _, version in endpoints}
    if len(versions) > 1 or None in versions or scheme not in {"", f"ipv{endpoints[0][2]}:"}:
        raise ValueError("several replicas need one IP:PORT each, all of IPv4 or all of IPv6")
    joined = (f"[{host}]:{port}" if version == 6 else f"{host}:{port}" for host, port, version in endpoints)
    return f"ipv{versions.pop()}:" + ",".join(joined)


def _check_dns(rest: str) -> None:
    server, name = "", rest
    if rest.startswith("//"):
        server, _, name = rest.removeprefix("//").partition("/")
    _endpoint(name)
    if server and _endpoint(server)[2] is None:
        raise ValueError(f"{server!r} is not the IP:PORT of a DNS server")


def _check_socket(rest: str) -> None:
    path = rest.removeprefix("//")
    relative = path != rest and not path.startswith("/")
    if not path or relative or not path.isprintable() or len(path.encode()) > _MAX_SOCKET_PATH:
        raise ValueError(f"names no address: a socket is unix:PATH or unix:///PATH, at most {_MAX_SOCKET_PATH} bytes")


def _endpoint(text: str) -> tuple[str, int, int | None]:
    """Return host, port and IP version of HOST:PORT; None for a name."""
    host, _, port = text.rpartition(":")
    bracketed = host.startswith("[") and host.endswith("]")
    version = _version(host[1:-1] if bracketed else host)
    named = version is None and not bracketed and _is_name(host)
    valid_port = port.isascii() and port.isdecimal() and len(port) <= 5 and 0 < int(port) < 65_536
    if not valid_port or not (named or version == (6 if bracketed else 4)):
        raise ValueError(f"{text!r} is not HOST:PORT (IPv6 in brackets)")
    return host.strip("[]"), int(port), version


def _is_name(host: str) -> bool:
    try:
        encoded = host.encode("idna")
    except UnicodeError:
        return False
    numbers = host.replace(".", "").isdecimal()
    letters = all(letter.isalnum() or letter in ".-_" for letter in host)
    return bool(encoded) and not numbers and letters and host[0] not in ".-"


def _version(host: str) -> int | None:
    try:
        return ipaddress.ip_address(host).version
    except ValueError:
        return None
