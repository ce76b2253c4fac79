"""A page about `bench load`: load.md and its plots, written from the result file alone."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes

from atspeed.benchmarks import markdown
from atspeed.benchmarks.load import LIMIT_FACTOR, MODES, LoadRow, errors, from_json, ms, sustained
from atspeed.benchmarks.markdown import draw, figures, origin, table
from atspeed.benchmarks.results import Result

PAGE = "load.md"


def write(result: Result, folder: Path) -> Path:
    """Write the page and its plots; the page's path. Raises BenchmarkError when the result is another benchmark's."""
    rows = from_json(result)
    folder.mkdir(parents=True, exist_ok=True)
    for replicas in _replicas(rows):
        some = [row for row in rows if row.replicas == replicas]
        panels: list[Callable[[Axes], None]] = [
            partial(_goodput, some, result.header["bare"].get(str(replicas))),
            partial(_tail, some),
        ]
        draw(folder / _plot(replicas), panels)
    return markdown.write(folder / PAGE, _page(result.header, rows))


def _replicas(rows: Sequence[LoadRow]) -> list[int]:
    return list(dict.fromkeys(row.replicas for row in rows))


def _modes(rows: Sequence[LoadRow]) -> list[str]:
    return list(dict.fromkeys(row.mode for row in rows))


def _plot(replicas: int) -> str:
    return f"load-{replicas}.svg"


def _page(header: Mapping[str, Any], rows: Sequence[LoadRow]) -> Iterator[str]:
    mix = ", ".join(f"{kind} {share}" for kind, share in header["mix"].items())
    yield from ("# Load", "")
    yield (
        f"Poisson arrivals through the real services, K = {header['k']}, histories from {header['data']}, mix of users: {mix}. "
        f"A step lasts {header['seconds']:g} s after {header['settle_seconds']:g} s that do not count, and has users of its own. "
        "Latency counts from the moment at which a request was planned to leave; one that failed is infinitely late. "
        f"Goodput: replies per second within {LIMIT_FACTOR:g} times the unloaded median of target-only. Bare: the best closed "
        "loop of target-only searches in one process, on the same threads, without gRPC, orchestrator and Redis."
    )
    yield ""
    yield from origin(header, [("threads", f"{header['threads']} per target replica")])
    yield from figures(_figures(header, rows))
    for replicas in _replicas(rows):
        yield from (f"## {replicas} target replica(s)", "", f"![goodput and p99]({_plot(replicas)})", "")
        yield from _steps([row for row in rows if row.replicas == replicas])


def _figures(header: Mapping[str, Any], rows: Sequence[LoadRow]) -> Iterator[tuple[str, str]]:
    for replicas in _replicas(rows):
        bare = header["bare"][str(replicas)]["searches_per_second"]
        for mode in _modes(rows):
            best = sustained(rows, replicas, mode)
            yield (
                f"{replicas} replica(s), {mode}: goodput at rates whose p99 is within the limit, and its share of bare's",
                f"{best:.1f} of {bare:.1f} per second, {best / bare:.0%}",
            )
        some = [row for row in rows if row.replicas == replicas]
        on, off = ({row.offered_rps: row.goodput_rps for row in some if row.mode == mode} for mode in MODES[::-1])
        ratios = {rate: on[rate] / off[rate] for rate in on if off.get(rate)}
        if ratios:
            least = min(ratios, key=lambda rate: ratios[rate])
            yield (
                f"{replicas} replica(s): goodput with speculation over that without at the same rate, the least",
                f"{ratios[least]:.2f}, at {least:.1f} per second",
            )


def _steps(rows: Sequence[LoadRow]) -> Iterator[str]:
    names = (
        "offered 1/s",
        "mode",
        "achieved 1/s",
        "goodput 1/s",
        "p50 ms",
        "p95 ms",
        "p99 ms",
        "p50 new / returning / refreshing",
    )
    kv = ("errors", "degraded", "KV from memory", "KV from Redis")
    more = (*kv, "target passes", "requests per pass", "generator late, p99 ms", "generator's core")
    yield from table((*names, *more), [_cells(row) for row in rows])
    limits = ", ".join(f"{mode} {_unloaded(rows, mode):.1f} ms" for mode in _modes(rows))
    yield from (f"Limit {rows[0].limit_ms:.1f} ms; unloaded p50: {limits}.", "")


def _unloaded(rows: Sequence[LoadRow], mode: str) -> float:
    return next(row.unloaded_p50_ms for row in rows if row.mode == mode)


def _cells(row: LoadRow) -> tuple[str, ...]:
    return (
        f"{row.offered_rps:.1f}",
        row.mode,
        f"{row.achieved_rps:.1f}",
        f"{row.goodput_rps:.1f}",
        *map(ms, (row.p50_ms, row.p95_ms, row.p99_ms)),
        " / ".join(map(ms, row.p50_ms_by_kind.values())),
        errors(row),
        *(f"{share:.0%}" for share in (row.degraded_share, row.memory_hit_share, row.redis_hit_share)),
        f"{row.target_passes_mean:.2f}",
        "–" if row.batch_requests_mean is None else f"{row.batch_requests_mean:.2f}",
        f"{row.left_late_p99_ms:.1f}",
        f"{row.generator_cpu_share:.0%}",
    )


def _goodput(rows: Sequence[LoadRow], bare: Mapping[str, Any] | None, axis: Axes) -> None:
    for mode in _modes(rows):
        some = [row for row in rows if row.mode == mode]
        axis.plot(
            [row.offered_rps for row in some], [row.goodput_rps for row in some], marker="o", markersize=3, label=mode
        )
    if bare:
        axis.axhline(bare["searches_per_second"], color="grey", linestyle="--", label="bare, closed loop")
    axis.set_xlabel("offered 1/s")
    axis.set_ylabel("goodput 1/s")


def _tail(rows: Sequence[LoadRow], axis: Axes) -> None:
    for mode in _modes(rows):
        finite = [(row.offered_rps, row.p99_ms) for row in rows if row.mode == mode and row.p99_ms is not None]
        axis.plot([rate for rate, _ in finite], [value for _, value in finite], marker="o", markersize=3)
    axis.axhline(rows[0].limit_ms, color="grey", linestyle=":")
    axis.set_yscale("log")
    axis.set_xlabel("offered 1/s")
    axis.set_ylabel("p99 ms")
