"""Addresses of callers: of the connection, or as trusted proxies forward them.

Everyone can send the header `x-forwarded-for`, so it is read only on a connection of a trusted proxy. Each proxy appends the
address of its own peer. The caller is the last address that is not a trusted proxy.
"""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Iterable, Sequence
from typing import Final
from urllib.parse import unquote

FORWARDED_HEADER: Final = "x-forwarded-for"
Network = ipaddress.IPv4Network | ipaddress.IPv6Network
Address = ipaddress.IPv4Address | ipaddress.IPv6Address

_SOCKET: Final = re.compile(r"ipv[46]:(?:\[(?P<six>[^\]]*)\]|(?P<four>[^:]*)):\d+")


def networks(text: str) -> tuple[Network, ...]:
    """Return the networks of a list such as `10.0.0.0/8,fd00::1`. Raises ValueError."""
    return tuple(ipaddress.ip_network(part.strip()) for part in text.split(",")) if text else ()


class Peers:
    """The callers of a server behind some trusted proxies. trusted: networks of the proxies."""

    def __init__(self, trusted: Sequence[Network] = ()) -> None:
        self._trusted = trusted

    def describe(self, connection: str, metadata: Iterable[tuple[str, str | bytes]]) -> dict[str, str]:
        """Return the fields of a log line: `peer`, and for a forwarded call `proxy`.

        Args:
            connection: the other end of the connection as gRPC spells it, such as `ipv4:10.0.0.1:5000`.
            metadata: metadata of the call.
        """
        connection = unquote(connection)
        found = _SOCKET.fullmatch(connection)
        direct = connection.partition(":")[2] if found else connection
        address = _address(found["six"] or found["four"]) if found else None
        if address is None or not self._trusts(address):
            return {"peer": direct}
        forwarded = ",".join(str(value) for key, value in metadata if key == FORWARDED_HEADER)
        caller = self._caller(forwarded)
        return {"peer": direct} if caller is None else {"peer": str(caller), "proxy": direct}

    def _caller(self, forwarded: str) -> Address | None:
        """Return the last address that is not a trusted proxy, or the first proxy; None if the last part is no address."""
        caller = None
        for part in reversed(forwarded.split(",")):
            if (address := _address(part.strip())) is None:
                break
            caller = address
            if not self._trusts(address):
                break
        return caller

    def _trusts(self, address: Address) -> bool:
        return any(address in network for network in self._trusted)


def _address(text: str) -> Address | None:
    """Return an IP address, an IPv4 address in IPv6 as IPv4; None for another text, such as one with a zone."""
    try:
        address = ipaddress.ip_address(text)
    except ValueError:
        return None
    if isinstance(address, ipaddress.IPv6Address):
        return None if address.scope_id else address.ipv4_mapped or address
    return address
