"""Events per second: one call per event beside calls of many users' events.

Each row has users of its own, so that no row meets histories of another one. Events have keys and times, as a replayed stream
has. Recommendations do not run meanwhile.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import numpy as np

from atspeed.benchmarks.results import BenchmarkError, Columns
from atspeed.benchmarks.services import ServiceOptions, progress_bar, services
from atspeed_client import AsyncClient, CallError, Event, UserEvents

NAME = "events"
TENANT = "bench-events"
_START = datetime(2024, 1, 1, tzinfo=UTC)


@dataclass(frozen=True)
class EventsConfig:
    """Configuration of the measurement. batch: events of one call. concurrency: calls at once."""

    events: int = 10_000
    users: int = 1_000
    batch: int = 1_000
    concurrency: int = 8
    seed: int = 1


@dataclass(frozen=True)
class EventsRow:
    """One way to record. seconds: of all events together."""

    way: str
    events: int
    calls: int
    at_once: int
    seconds: float
    per_second: float


COLUMNS: Columns[EventsRow] = (
    ("", lambda row: row.way),
    ("events", lambda row: f"{row.events:,}"),
    ("calls", lambda row: f"{row.calls:,}"),
    ("at once", lambda row: str(row.at_once)),
    ("seconds", lambda row: f"{row.seconds:.2f}"),
    ("events/s", lambda row: f"{row.per_second:,.0f}"),
)


async def run(root: Path, config: EventsConfig, options: ServiceOptions) -> list[EventsRow]:
    """Record the events in each way. Raises BenchmarkError if the service did not store all of them."""
    ways = (
        ("one event per call", 1, 1),
        ("one event per call", 1, config.concurrency),
        (f"{config.batch} events per call", config.batch, 1),
        (f"{config.batch} events per call", config.batch, config.concurrency),
    )
    rows = []
    async with services(root, options) as client:
        with progress_bar() as bar:
            for number, (way, size, at_once) in enumerate(bar.track(ways, description="ways")):
                batches = _batches(config, number, size)
                begun = time.perf_counter()
                await _send(client, batches, at_once)
                seconds = time.perf_counter() - begun
                await _check(client, config, number)
                rate = round(config.events / seconds, 1)
                rows.append(EventsRow(way, config.events, len(batches), at_once, round(seconds, 3), rate))
    return rows


def header(config: EventsConfig, options: ServiceOptions) -> dict[str, Any]:
    """Return the header's fields."""
    return {"benchmark": NAME, "question": asdict(config), "provider": options.provider}


def _drawn(config: EventsConfig) -> list[int]:
    users: list[int] = np.random.default_rng(config.seed).integers(config.users, size=config.events).tolist()
    return users


def _batches(config: EventsConfig, way: int, size: int) -> list[list[UserEvents]]:
    events = [
        UserEvents(
            f"{way}-{user}",
            [Event(f"item-{number}", _START + timedelta(seconds=number), event_id=f"e{number}")],
            TENANT,
        )
        for number, user in enumerate(_drawn(config))
    ]
    return [events[start : start + size] for start in range(0, len(events), size)]


async def _send(client: AsyncClient, batches: Sequence[Sequence[UserEvents]], at_once: int) -> None:
    waiting = iter(batches)

    async def worker(mine: Iterable[Sequence[UserEvents]]) -> None:
        for batch in mine:
            if len(batch) == 1:
                await client.record(batch[0].user_id, batch[0].events, tenant=TENANT, timeout_seconds=60)
                continue
            for result in await client.record_batch(batch, timeout_seconds=60):
                if isinstance(result, CallError):
                    raise BenchmarkError(f"an event was not stored: {result}")

    await asyncio.gather(*(worker(waiting) for _ in range(at_once)))


async def _check(client: AsyncClient, config: EventsConfig, way: int) -> None:
    """Compare the first user's history with the events that were sent."""
    first = _drawn(config)[0]
    sent = [f"item-{number}" for number, user in enumerate(_drawn(config)) if user == first]
    stored = await client.history(f"{way}-{first}", tenant=TENANT)
    found = [event.item_id for event in stored.events]
    if found != sent[-len(found) :] or not found:
        raise BenchmarkError(
            f"a history has {len(found)} events, which are not the newest of the {len(sent)} that were sent"
        )
