"""Time of a list over HTTP/JSON beside gRPC, with and without Envoy.

Each user's list is asked for in every way, one after the other in a rotating order, with the same prefix in the cache. So the
search is the same, and the difference is the way there: Envoy, JSON and HTTP/1.1.
"""

from __future__ import annotations

import http.client
import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from atspeed.benchmarks import markdown
from atspeed.benchmarks.histories import History
from atspeed.benchmarks.markdown import figures, item_range, origin, paragraphs, row_table
from atspeed.benchmarks.results import BenchmarkError, Columns, Result
from atspeed.benchmarks.services import PATIENCE_SECONDS, ServiceOptions, progress_bar
from atspeed.engine.bundle.manifest import read_manifest
from atspeed.local.edge import LocalEdge
from atspeed.local.stack import LocalStack
from atspeed_client import Client, RecommendRequest

NAME = "http"
GRPC, ENVOY, JSON = "gRPC", "gRPC through Envoy", "HTTP/JSON"
WIDTHS = (10, 20, 50)

Way = Callable[[History, int], Sequence[str]]
"""Asks for the K items of a history. Returns their ids."""


@dataclass(frozen=True)
class WayRow:
    """One way and K. Times in milliseconds; ratio: the median over users of this way's time over gRPC's."""

    way: str
    k: int
    users: int
    p50_ms: float
    p99_ms: float
    ratio: float


COLUMNS: Columns[WayRow] = (
    ("way", lambda row: row.way),
    ("K", lambda row: str(row.k)),
    ("p50", lambda row: f"{row.p50_ms:.1f}"),
    ("p99", lambda row: f"{row.p99_ms:.1f}"),
    ("times gRPC's", lambda row: f"{row.ratio:.2f}"),
)


def run(root: Path, histories: Sequence[History], widths: Sequence[int], options: ServiceOptions) -> list[WayRow]:
    """Measure every user and width in every way. Raises BenchmarkError if the ways get different lists."""
    with ExitStack() as running:
        drafts = 1 if read_manifest(root).draft else 0
        stack = running.enter_context(LocalStack(root, drafts=drafts, flags=options.flags))
        edge = running.enter_context(LocalEdge([stack.address], stack.log_folder / "edge.log"))
        ways = {
            GRPC: _grpc(running, stack.address),
            ENVOY: _grpc(running, f"127.0.0.1:{edge.port}"),
            JSON: _json(running, edge.port),
        }
        for way in ways.values():  # warm-up
            way(histories[0], widths[0])
        with progress_bar() as progress:
            users = [
                {k: _times(ways, history, k, number) for k in widths}
                for number, history in enumerate(progress.track(histories, description="users"))
            ]
    return [summarise(way, k, [user[k] for user in users]) for k in widths for way in ways]


def _times(ways: Mapping[str, Way], history: History, k: int, number: int) -> dict[str, float]:
    """Return the milliseconds of each way. The first call only fills the cache."""
    expected = ways[GRPC](history, k)
    names, times = list(ways), {}
    first = number % len(names)
    for name in names[first:] + names[:first]:
        begun = time.perf_counter()
        listed = ways[name](history, k)
        times[name] = 1e3 * (time.perf_counter() - begun)
        if listed != expected:
            raise BenchmarkError(f"{name}: another list than over gRPC")
    return times


def _grpc(running: ExitStack, address: str) -> Way:
    client = running.enter_context(Client(address, timeout_seconds=PATIENCE_SECONDS, retries=0))

    def ask(history: History, k: int) -> list[str]:
        reply = client.send(RecommendRequest(history=list(history), k=k, beam_width=k))
        return [item.item_id for item in reply.items]

    return ask


def _json(running: ExitStack, port: int) -> Way:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=PATIENCE_SECONDS)
    running.callback(connection.close)

    def ask(history: History, k: int) -> list[str]:
        body = json.dumps({"history": {"item_ids": list(history)}, "k": k, "beam_width": k})
        connection.request("POST", "/v1/recommendations", body, {"content-type": "application/json"})
        reply = connection.getresponse()
        value = json.loads(reply.read())
        if reply.status != http.client.OK:
            raise BenchmarkError(f"HTTP {reply.status}: {value['message']}")
        return [item["item_id"] for item in value["items"]]

    return ask


def summarise(way: str, k: int, users: Sequence[Mapping[str, float]]) -> WayRow:
    """Return the row of one way and K, from the milliseconds of every way for each user."""
    times = [user[way] for user in users]
    ratios = [user[way] / user[GRPC] for user in users]
    p50, p99 = np.percentile(times, [50, 99])
    return WayRow(way, k, len(users), round(float(p50), 3), round(float(p99), 3), round(float(np.median(ratios)), 3))


def header(options: ServiceOptions, *, users: int, items: tuple[int, int | None], histories: str) -> dict[str, Any]:
    """Return the header's fields. items: the least and the most of a user."""
    asked = {"users": users, "items": items, "histories": histories}
    return {"benchmark": NAME, **asked, "threads": options.threads, "provider": options.provider}


def write(result: Result, folder: Path) -> Path:
    """Write the page of a result file. Returns its path."""
    return markdown.write(folder / "http.md", _page(result.header, result.rows_of(NAME, WayRow)))


def _page(header: Mapping[str, Any], rows: Sequence[WayRow]) -> Iterator[str]:
    yield from paragraphs(
        "# A list over HTTP/JSON beside gRPC",
        f"{header['users']} users with {item_range(header['items'])}, of {header['histories']}; the history is in the request, "
        "and its prefix is in the cache. One request at a time, in ms. Every user's list is asked for in every way, one after "
        "the other in a rotating order; *times gRPC's* is the median of the users' ratios.",
    )
    yield from origin(header, [("threads", f"{header['threads']} for each model"), ("provider", header["provider"])])
    ratios = "; ".join(f"K = {row.k}: {row.ratio:.2f}" for row in rows if row.way == JSON)
    yield from figures([("HTTP/JSON: latency over gRPC's, p50 of the users' ratios", ratios)])
    yield from row_table(COLUMNS, rows)
