"""Names of hosts in addresses, as far as they can be checked without asking anyone."""

from __future__ import annotations

import ipaddress


def is_host(text: str) -> bool:
    """Whether a text is an IP address or could be a host's name."""
    if ":" in text or text.replace(".", "").isdecimal():
        return ip_version(text) is not None
    try:
        encoded = text.encode("idna")
    except UnicodeError:
        return False
    return bool(encoded) and all(letter.isalnum() or letter in ".-_" for letter in text)


def ip_version(text: str) -> int | None:
    """4 or 6; None for what is no IP address."""
    try:
        return ipaddress.ip_address(text).version
    except ValueError:
        return None
