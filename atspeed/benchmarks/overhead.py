"""Overhead of the services and of the library over the models' time.

The user returns: the history is in Redis, and a request was served before the last item came. Overhead is the caller's time
less the passes of draft and target, as the model services measured these. The same target-only search is measured in this
process too, with the same threads and a cached prefix. It compares the services with one function call.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from atspeed.benchmarks import markdown
from atspeed.benchmarks.histories import History
from atspeed.benchmarks.in_process_baseline import InProcessBaseline, in_process_baseline
from atspeed.benchmarks.markdown import figures, item_range, origin, paragraphs, row_table
from atspeed.benchmarks.results import Columns, Result
from atspeed.benchmarks.services import ServiceOptions, healthy_reply, progress_bar, services
from atspeed.engine.search.mode import Mode
from atspeed.local.recommender import Recommender, RecommenderOptions
from atspeed_client import AsyncClient, Recommendation, RecommendRequest

NAME = "overhead"
MODES = (Mode.TARGET_ONLY, Mode.STRICT)
WIDTHS = (5, 10, 20)


@dataclass(frozen=True)
class RequestOverhead:
    """Times of one request in milliseconds. parts: the overhead by place."""

    caller_ms: float
    models_ms: float
    parts: Mapping[str, float]

    @property
    def added_ms(self) -> float:
        """Time outside of the models' passes."""
        return self.caller_ms - self.models_ms

    @classmethod
    def of(cls, reply: Recommendation, caller_ms: float) -> RequestOverhead:
        """Read a reply's stage times."""
        stages = reply.statistics.stage_times
        forward = stages.target_forward_ms + stages.draft_forward_ms
        return cls(
            caller_ms=caller_ms,
            models_ms=forward,
            parts={
                "client": caller_ms - stages.total_ms,
                "history": stages.history_ms,
                "target": stages.target_ms - stages.target_forward_ms,
                "draft": stages.draft_ms - stages.draft_forward_ms,
                "selection": stages.selection_ms,
            },
        )


@dataclass(frozen=True)
class OverheadRow:
    """One mode and K. Times are medians over users, except p99.

    Attributes:
        added_share: overhead over the caller's time.
        in_process_p50_ms: the search in this process; None but for target-only.
        over_in_process_ms: how much longer the caller waits, the median of differences; None but for target-only.
        library_p50_ms: the library's list; None where it was not measured.
        library_added_ms: the library's time outside of the models' passes; None where it was not measured.
        parts_ms: the client's own gRPC; the history from Redis; transport, queue and choice of children of target and draft;
            the loop in the orchestrator.
    """

    mode: str
    k: int
    users: int
    p50_ms: float
    models_p50_ms: float
    added_p50_ms: float
    added_p99_ms: float
    added_share: float
    in_process_p50_ms: float | None
    over_in_process_ms: float | None
    parts_ms: Mapping[str, float]
    library_p50_ms: float | None = None
    library_added_ms: float | None = None


def _ms(value: float | None) -> str:
    return "" if value is None else f"{value:.1f}"


def _ms_or_none(values: Sequence[float]) -> float | None:
    return _median(values) if values else None


COLUMNS: Columns[OverheadRow] = (
    ("mode", lambda row: row.mode),
    ("K", lambda row: str(row.k)),
    ("caller", lambda row: _ms(row.p50_ms)),
    ("models", lambda row: _ms(row.models_p50_ms)),
    ("added", lambda row: _ms(row.added_p50_ms)),
    ("added, p99", lambda row: _ms(row.added_p99_ms)),
    ("share", lambda row: f"{row.added_share:.0%}"),
    ("in process", lambda row: _ms(row.in_process_p50_ms)),
    ("over", lambda row: _ms(row.over_in_process_ms)),
    ("library", lambda row: _ms(row.library_p50_ms)),
    ("library added", lambda row: _ms(row.library_added_ms)),
)


async def run(
    root: Path, histories: Sequence[History], widths: Sequence[int], options: ServiceOptions
) -> list[OverheadRow]:
    """Measure every user in every mode and width, one request at a time: services, library, and a search in this process."""
    measured: dict[tuple[Mode, int], list[RequestOverhead]] = {(mode, k): [] for mode in MODES for k in widths}
    of_library: dict[tuple[Mode, int], list[RequestOverhead]] = {(mode, k): [] for mode in MODES for k in widths}
    in_process: dict[int, list[float]] = {k: [] for k in widths}
    async with AsyncExitStack() as stack:
        client = await stack.enter_async_context(services(root, options))
        baseline = await stack.enter_async_context(in_process_baseline(root, threads=options.threads or 1))
        library = stack.enter_context(Recommender(root, RecommenderOptions(threads=options.threads or 1)))
        for mode in MODES:  # warm-up
            await _returning(client, f"first-{mode}", histories[0], mode, widths[0])
            _from_library(library, f"first-{mode}", histories[0], mode, widths[0])
        await _in_process(baseline, "first", histories[0], widths[0])
        progress = stack.enter_context(progress_bar())
        for number, history in enumerate(progress.track(histories, description="users")):
            for mode, k in measured:
                measured[mode, k].append(await _returning(client, f"{number}-{mode}-{k}", history, mode, k))
                of_library[mode, k].append(_from_library(library, f"{number}-{mode}-{k}", history, mode, k))
            for k in widths:
                in_process[k].append(await _in_process(baseline, f"{number}-{k}", history, k))
    return [
        summarise(mode, k, found, in_process[k] if mode is Mode.TARGET_ONLY else None, of_library[mode, k])
        for (mode, k), found in measured.items()
    ]


async def _returning(client: AsyncClient, user: str, history: History, mode: Mode, k: int) -> RequestOverhead:
    """Measure the request of a user who returns with one new item."""
    request = RecommendRequest(user, k=k, beam_width=k, mode=mode, tenant="overhead")
    await client.record(user, history[:-1], tenant="overhead")
    await healthy_reply(client, request)
    await client.record(user, history[-1:], tenant="overhead")
    begun = time.perf_counter()
    reply = await healthy_reply(client, request)
    return RequestOverhead.of(reply, 1e3 * (time.perf_counter() - begun))


def _from_library(library: Recommender, tenant: str, history: History, mode: Mode, k: int) -> RequestOverhead:
    """Measure the same request of the library. tenant: keeps the caches of equal prompts apart."""
    before, after = (
        RecommendRequest(history=known, k=k, beam_width=k, mode=mode, tenant=tenant)
        for known in (history[:-1], history)
    )
    library.send(before)
    begun = time.perf_counter()
    reply = library.send(after)
    return RequestOverhead.of(reply, 1e3 * (time.perf_counter() - begun))


async def _in_process(baseline: InProcessBaseline, tenant: str, history: History, k: int) -> float:
    """Measure the same request in this process, in milliseconds."""
    await baseline.search(baseline.prompt(history[:-1], tenant), k)
    prompt = baseline.prompt(history, tenant)
    begun = time.perf_counter()
    await baseline.search(prompt, k)
    return 1e3 * (time.perf_counter() - begun)


def summarise(
    mode: Mode,
    k: int,
    found: Sequence[RequestOverhead],
    in_process: Sequence[float] | None,
    library: Sequence[RequestOverhead] = (),
) -> OverheadRow:
    """Return the row of one mode and K.

    Args:
        mode: the mode.
        k: K.
        found: the users' times from the services.
        in_process: the times of the same users in this process.
        library: the times of the same users from the library.
    """
    added = [one.added_ms for one in found]
    over = None
    if in_process is not None:
        over = [one.caller_ms - other for one, other in zip(found, in_process, strict=True)]
    return OverheadRow(
        mode=str(mode),
        k=k,
        users=len(found),
        p50_ms=_median([one.caller_ms for one in found]),
        models_p50_ms=_median([one.models_ms for one in found]),
        added_p50_ms=_median(added),
        added_p99_ms=round(float(np.percentile(added, 99)), 3),
        added_share=_median([one.added_ms / one.caller_ms for one in found]),
        in_process_p50_ms=_median(in_process) if in_process is not None else None,
        over_in_process_ms=_median(over) if over is not None else None,
        parts_ms={part: _median([one.parts[part] for one in found]) for part in found[0].parts},
        library_p50_ms=_ms_or_none([one.caller_ms for one in library]),
        library_added_ms=_ms_or_none([one.added_ms for one in library]),
    )


def _median(values: Sequence[float]) -> float:
    return round(float(np.median(values)), 3)


def header(options: ServiceOptions, *, users: int, items: tuple[int, int | None], histories: str) -> dict[str, Any]:
    """Return the header's fields. items: the least and the most of a user."""
    asked = {"users": users, "items": items, "histories": histories}
    return {"benchmark": NAME, **asked, "threads": options.threads, "provider": options.provider}


def write(result: Result, folder: Path) -> Path:
    """Write the page of a result file. Returns its path."""
    return markdown.write(folder / "overhead.md", _page(result.header, result.rows_of(NAME, OverheadRow)))


def _page(header: Mapping[str, Any], rows: Sequence[OverheadRow]) -> Iterator[str]:
    yield from paragraphs(
        "# Overhead of the services over the models' time",
        f"{header['users']} users with {item_range(header['items'])}, of {header['histories']}, who return with one new "
        "item; their histories are in Redis. One request at a time. In ms; medians where nothing else is said. *Models*: the "
        "passes of draft and target, as these measured them. *Added*: the rest of the caller's latency. *In process*: the same "
        "target-only search as a function call; *over*: the caller's latency over it. *Library*: the same list from "
        "`atspeed.local.Recommender`; *library added*: its time outside of the passes.",
    )
    yield from origin(header, [("threads", f"{header['threads']} for each model"), ("provider", header["provider"])])
    yield from figures(_figures(rows))
    yield from row_table(COLUMNS, rows)
    yield from paragraphs(
        "Overhead by place: transport, queue and selection of children for target and draft; the loop; the caller's gRPC."
    )
    parts = list(rows[0].parts_ms)
    yield from markdown.table(
        ("mode", "K", *parts), [(row.mode, str(row.k), *(_ms(row.parts_ms[part]) for part in parts)) for row in rows]
    )


def _figures(rows: Sequence[OverheadRow]) -> Iterator[tuple[str, str]]:
    for mode in dict.fromkeys(row.mode for row in rows):
        some = [row for row in rows if row.mode == mode]
        shares = (f"K = {row.k}: {row.added_p50_ms:.1f} ms, {row.added_share:.0%}" for row in some)
        yield f"{mode}: added to the models' time, p50, and its share of the caller's", "; ".join(shares)
        over = [f"K = {row.k}: {row.over_in_process_ms:.1f} ms" for row in some if row.over_in_process_ms is not None]
        if over:
            name = f"{mode}: caller's latency over that of the same search as a function call, p50"
            yield name, "; ".join(over)
        added = [f"K = {row.k}: {row.library_added_ms:.1f} ms" for row in some if row.library_added_ms is not None]
        if added:
            yield f"{mode}: added by the library to the models' time, p50", "; ".join(added)
