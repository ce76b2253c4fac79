"""Syntax checks of host names and IP addresses, without a look-up."""

from __future__ import annotations

import ipaddress


def is_host(text: str) -> bool:
    """Return whether a text is an IP address or could be a host name."""
    if ":" in text or text.replace(".", "").isdecimal():
        return ip_version(text) is not None
    try:
        encoded = text.encode("idna")
    except UnicodeError:
        return False
    return bool(encoded) and text[0] not in ".-" and all(letter.isalnum() or letter in ".-_" for letter in text)


def is_loopback(text: str) -> bool:
    """Return whether a host is this machine by its text: localhost, or a loopback address."""
    try:
        return ipaddress.ip_address(text).is_loopback
    except ValueError:
        return text == "localhost"


def ip_version(text: str) -> int | None:
    """Return 4 or 6; None for a text that is no IP address."""
    try:
        return ipaddress.ip_address(text).version
    except ValueError:
        return None


def host_port(host: str, port: int) -> str:
    """Return `host:port`, with brackets around an IPv6 host."""
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
