"""Histories in Redis, for tests that need items and not their events."""

from __future__ import annotations

from collections.abc import Iterable

from orchestrator.events import StoredEvent
from orchestrator.history import HistoryStore


async def append(histories: HistoryStore, user_id: str, items: Iterable[str], *, tenant: str = "") -> int:
    """Record items as they come, without times and keys; the length of the history."""
    return (await histories.record(user_id, [StoredEvent(item) for item in items], tenant=tenant)).length
