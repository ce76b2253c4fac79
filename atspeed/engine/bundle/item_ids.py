"""Item ids: what can be one, wherever it comes in, so that whatever is recommended can be named in a request."""

from __future__ import annotations

# Of users and tenants too, at the service's edge.
MAX_ID_BYTES = 256
_SHOWN = 60


def shown(item: str) -> str:
    """An id for a message: quoted, and cut where it is very long."""
    return repr(item) if len(item) <= _SHOWN else f"{item[:_SHOWN]!r}..."


def id_problem(item: str) -> str | None:
    """Why this cannot be an item id, in words that follow the id or the name of its field; None when it can."""
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
