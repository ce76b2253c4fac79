"""Valid item ids: every recommended id can also be sent in a request."""

from __future__ import annotations

MAX_ID_BYTES = 256  # also of user and tenant ids in requests; long enough for a URL or a UUID with a prefix
_SHOWN = 60  # characters of an id in a message: half a line


def shown(item: str) -> str:
    """Quote an id for a message, and truncate a very long one."""
    return repr(item) if len(item) <= _SHOWN else f"{item[:_SHOWN]!r}..."


def id_problem(item: str) -> str | None:
    """Return the reason why this is no valid item id, in words that follow the id or its field; None if it is valid."""
    if not item:
        return "is empty"
    try:
        encoded = item.encode()
    except UnicodeEncodeError:
        return "cannot be written as UTF-8"
    if len(encoded) > MAX_ID_BYTES:
        return f"has {len(encoded)} bytes, at most {MAX_ID_BYTES} are allowed"
    if item.endswith("\0"):
        return "ends in NUL"
    return None
