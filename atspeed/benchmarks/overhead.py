"""What gRPC, orchestrator and Redis add to the time of the models, for a returning user.

The user's history is stored in Redis and was served before the last item came. Added is what the caller waits beyond the passes
of draft and target, as the model services measured these. Beside it stands the same target-only search in this process, on a
model of its own with the same threads and a prefix that is kept as well: what the services are compared with then is one
function call.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from rich import box
from rich.table import Table

from atspeed.benchmarks import markdown
from atspeed.benchmarks.errors import BenchmarkError
from atspeed.benchmarks.histories import History
from atspeed.benchmarks.in_process_baseline import BareRunner, bare_runner
from atspeed.benchmarks.markdown import figures, item_range, origin
from atspeed.benchmarks.markdown import table as markdown_table
from atspeed.benchmarks.results import Result
from atspeed.benchmarks.services import Running, progress_bar, services, undisturbed
from atspeed.client.recommender import RecommenderClient, recommend_request
from atspeed.engine.search.mode import Mode
from atspeed.v1 import recommendation_pb2 as pb

NAME = "overhead"
PAGE = "overhead.md"
MODES = (Mode.TARGET_ONLY, Mode.STRICT)
WIDTHS = (5, 10, 20)


@dataclass(frozen=True)
class Added:
    """One request, in milliseconds. parts: of what is added, by where."""

    caller_ms: float
    models_ms: float
    parts: Mapping[str, float]

    @property
    def added_ms(self) -> float:
        """What is not in the models' passes."""
        return self.caller_ms - self.models_ms

    @classmethod
    def of(cls, reply: pb.RecommendResponse, caller_ms: float) -> Added:
        """From a reply's stage times."""
        stages = reply.statistics.stage_times
        forward = stages.target_forward_ns + stages.draft_forward_ns
        return cls(
            caller_ms=caller_ms,
            models_ms=forward / 1e6,
            parts={
                "client": caller_ms - stages.total_ns / 1e6,
                "history": stages.history_ns / 1e6,
                "target": (stages.target_ns - stages.target_forward_ns) / 1e6,
                "draft": (stages.draft_ns - stages.draft_forward_ns) / 1e6,
                "selection": stages.selection_ns / 1e6,
            },
        )


@dataclass(frozen=True)
class OverheadRow:
    """One mode and K; medians over users, except p99. added_share: of the caller's time.

    in_process_p50_ms: the search in this process; over_in_process_ms: how much longer the caller waits, median of differences.
    Both None but for target-only. parts_ms: the client's own gRPC; history from Redis; transport, queue and choice of children
    of target and draft; the loop in the orchestrator.
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


async def run(root: Path, histories: Sequence[History], widths: Sequence[int], running: Running) -> list[OverheadRow]:
    """Every user in every mode and width, one request at a time, each beside the same search in this process."""
    found: dict[tuple[Mode, int], list[Added]] = {(mode, k): [] for mode in MODES for k in widths}
    alone: dict[int, list[float]] = {k: [] for k in widths}
    async with services(root, running) as client, bare_runner(root, threads=running.threads or 1) as bare:
        await _warm_up(client, bare, histories[0], widths)
        with progress_bar() as progress:
            for number, history in enumerate(progress.track(histories, description="users")):
                for mode, k in found:
                    found[mode, k].append(await _returning(client, f"{number}-{mode}-{k}", history, mode, k))
                for k in widths:
                    alone[k].append(await _in_process(bare, f"{number}-{k}", history, k))
    return [row(mode, k, added, alone[k] if mode is Mode.TARGET_ONLY else None) for (mode, k), added in found.items()]


async def _warm_up(client: RecommenderClient, bare: BareRunner, history: History, widths: Sequence[int]) -> None:
    for mode in MODES:
        await _returning(client, f"first-{mode}", history, mode, widths[0])
    await _in_process(bare, "first", history, widths[0])


async def _returning(client: RecommenderClient, user: str, history: History, mode: Mode, k: int) -> Added:
    """A user who comes back with one new item."""
    request = recommend_request(user, k=k, beam_width=k, mode=mode, tenant="overhead")
    await client.record(user, history[:-1], tenant="overhead")
    await undisturbed(client, request)
    await client.record(user, history[-1:], tenant="overhead")
    begun = time.perf_counter()
    reply = await undisturbed(client, request)
    return Added.of(reply, 1e3 * (time.perf_counter() - begun))


async def _in_process(bare: BareRunner, tenant: str, history: History, k: int) -> float:
    """The same in this process, in milliseconds."""
    await bare.search(bare.prompt(history[:-1], tenant), k)
    prompt = bare.prompt(history, tenant)
    begun = time.perf_counter()
    await bare.search(prompt, k)
    return 1e3 * (time.perf_counter() - begun)


def row(mode: Mode, k: int, found: Sequence[Added], alone: Sequence[float] | None) -> OverheadRow:
    """One mode and K. alone: the times of the same users in this process."""
    added = [one.added_ms for one in found]
    over = [one.caller_ms - other for one, other in zip(found, alone, strict=True)] if alone is not None else None
    return OverheadRow(
        mode=str(mode),
        k=k,
        users=len(found),
        p50_ms=_median([one.caller_ms for one in found]),
        models_p50_ms=_median([one.models_ms for one in found]),
        added_p50_ms=_median(added),
        added_p99_ms=round(float(np.percentile(added, 99)), 3),
        added_share=_median([one.added_ms / one.caller_ms for one in found]),
        in_process_p50_ms=_median(alone) if alone is not None else None,
        over_in_process_ms=_median(over) if over is not None else None,
        parts_ms={part: _median([one.parts[part] for one in found]) for part in found[0].parts},
    )


def _median(values: Sequence[float]) -> float:
    return round(float(np.median(values)), 3)


def table(rows: Sequence[OverheadRow]) -> Table:
    """The rows, for people."""
    users = max((row.users for row in rows), default=0)
    title = f"Added to the models' time, returning users, {users} of them; ms"
    shown = Table(title=title, box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False)
    for name in ("mode", "K", "p50", "models", "added", "added\np99", "share", "in\nprocess", "over"):
        shown.add_column(name, justify="left" if name == "mode" else "right", no_wrap=True)
    for one in rows:
        shown.add_row(*_cells(one))
    return shown


def _cells(row: OverheadRow) -> tuple[str, ...]:
    times = (row.p50_ms, row.models_p50_ms, row.added_p50_ms, row.added_p99_ms)
    alone = ("" if value is None else f"{value:.1f}" for value in (row.in_process_p50_ms, row.over_in_process_ms))
    return (row.mode, str(row.k), *(f"{value:.1f}" for value in times), f"{row.added_share:.0%}", *alone)


def to_json(rows: Sequence[OverheadRow]) -> list[dict[str, Any]]:
    """The rows, for a result file."""
    return [asdict(one) for one in rows]


def header(running: Running, *, users: int, items: tuple[int, int | None], histories: str) -> dict[str, Any]:
    """What was asked for, beside where it comes from. items: the least and the most of a user."""
    asked = {"users": users, "items": items, "histories": histories}
    return {"benchmark": NAME, **asked, "threads": running.threads, "provider": running.provider}


def write(result: Result, folder: Path) -> Path:
    """Write the page; its path. Raises BenchmarkError when the result is another benchmark's."""
    if result.header.get("benchmark") != NAME:
        raise BenchmarkError("the result is not one of bench overhead")
    return markdown.write(folder / PAGE, _page(result.header, [OverheadRow(**one) for one in result.rows]))


def _page(header: Mapping[str, Any], rows: Sequence[OverheadRow]) -> Iterator[str]:
    yield from ("# What the services add to the models' time", "")
    yield (
        f"{header['users']} users with {item_range(header['items'])}, of {header['histories']}, who return with one new "
        "item; their histories are in Redis. One request at a time. In ms; medians where nothing else is said. *Models*: the "
        "passes of draft and target, as these measured them. *Added*: what the caller waits beyond. *In process*: the same "
        "target-only search as a function call; *over*: how much longer the caller of the services waits for it."
    )
    yield ""
    yield from origin(header, [("threads", f"{header['threads']} for each model"), ("provider", header["provider"])])
    yield from figures(_figures(rows))
    names = ("mode", "K", "caller", "models", "added", "added, p99", "share", "in process", "over")
    yield from markdown_table(names, map(_cells, rows))
    yield from (
        "Where it is added: transport, queue and the choice of children for target and draft; the loop; the caller's gRPC.",
        "",
    )
    parts = list(rows[0].parts_ms)
    yield from markdown_table(
        ("mode", "K", *parts),
        [(one.mode, str(one.k), *(f"{one.parts_ms[part]:.1f}" for part in parts)) for one in rows],
    )


def _figures(rows: Sequence[OverheadRow]) -> Iterator[tuple[str, str]]:
    for mode in dict.fromkeys(one.mode for one in rows):
        some = [one for one in rows if one.mode == mode]
        shares = (f"K = {one.k}: {one.added_p50_ms:.1f} ms, {one.added_share:.0%}" for one in some)
        yield f"{mode}: added to the models' time, p50, and its share of the caller's", "; ".join(shares)
        over = [f"K = {one.k}: {one.over_in_process_ms:.1f} ms" for one in some if one.over_in_process_ms is not None]
        if over:
            yield (
                f"{mode}: what the caller waits longer than for the same search as a function call, p50",
                "; ".join(over),
            )
