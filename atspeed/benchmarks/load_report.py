"""Page about `bench load`: load.md and its plots, from the result file."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes

from atspeed.benchmarks import markdown
from atspeed.benchmarks.load import COLUMNS, LIMIT_FACTOR, MODES, NAME, LoadRow, sustained
from atspeed.benchmarks.markdown import figures, origin, paragraphs, row_table
from atspeed.benchmarks.plots import draw, line
from atspeed.benchmarks.results import Result


def write(result: Result, folder: Path) -> Path:
    """Write the page and its plots. Returns the page's path."""
    rows = result.rows_of(NAME, LoadRow)
    for replicas in _replicas(rows):
        some = [row for row in rows if row.replicas == replicas]
        goodput = partial(_draw_goodput, some, result.header["bare"].get(str(replicas)))
        draw(folder / _plot(replicas), [goodput, partial(_draw_tail, some)])
    return markdown.write(folder / "load.md", _page(result.header, rows))


def _replicas(rows: Sequence[LoadRow]) -> list[int]:
    return list(dict.fromkeys(row.replicas for row in rows))


def _modes(rows: Sequence[LoadRow]) -> list[str]:
    return list(dict.fromkeys(row.mode for row in rows))


def _plot(replicas: int) -> str:
    return f"load-{replicas}.svg"


def _page(header: Mapping[str, Any], rows: Sequence[LoadRow]) -> Iterator[str]:
    mix = ", ".join(f"{kind} {share}" for kind, share in header["mix"].items())
    yield from paragraphs(
        "# Load",
        f"Poisson arrivals through the real services, K = {header['k']}, histories from {header['data']}, mix of users: {mix}. "
        f"A step lasts {header['seconds']:g} s after {header['settle_seconds']:g} s that do not count, and has users of its own. "
        "Latency counts from the moment at which a request was planned to leave; one that failed is infinitely late. "
        f"Goodput: replies per second within {LIMIT_FACTOR:g} times the unloaded median of target-only. In-process baseline: "
        "the best closed loop of target-only searches in one process, on the same threads, without gRPC, orchestrator and "
        "Redis. Throughput at saturation: the best closed loop of the services, with the same users; a fleet is sized by it.",
    )
    yield from origin(header, [("threads", f"{header['threads']} per target replica")])
    yield from figures(_figures(header, rows))
    for replicas in _replicas(rows):
        yield from paragraphs(f"## {replicas} target replica(s)", f"![goodput and p99]({_plot(replicas)})")
        yield from _steps([row for row in rows if row.replicas == replicas])


def _figures(header: Mapping[str, Any], rows: Sequence[LoadRow]) -> Iterator[tuple[str, str]]:
    for replicas in _replicas(rows):
        baseline = header["bare"][str(replicas)]["searches_per_second"]
        for mode in _modes(rows):
            best = sustained(rows, replicas, mode)
            name = "goodput at rates whose p99 is within the limit, and its share of the in-process baseline"
            yield (
                f"{replicas} replica(s), {mode}: {name}",
                f"{best:.1f} of {baseline:.1f} per second, {best / baseline:.0%}",
            )
        # Results of earlier versions have none.
        for mode, loop in header.get("saturated", {}).get(str(replicas), {}).items():
            rate, name = (
                loop["searches_per_second"],
                "throughput at saturation, and its share of the in-process baseline",
            )
            yield (
                f"{replicas} replica(s), {mode}: {name}",
                f"{rate:.1f} of {baseline:.1f} per second, {rate / baseline:.0%}, {loop['concurrency']} requests at once",
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
    yield from row_table(COLUMNS, rows)
    limits = ", ".join(f"{mode} {_unloaded(rows, mode):.1f} ms" for mode in _modes(rows))
    yield from paragraphs(f"Limit {rows[0].limit_ms:.1f} ms; unloaded p50: {limits}.")


def _unloaded(rows: Sequence[LoadRow], mode: str) -> float:
    return next(row.unloaded_p50_ms for row in rows if row.mode == mode)


def _draw_goodput(rows: Sequence[LoadRow], baseline: Mapping[str, Any] | None, axis: Axes) -> None:
    for mode in _modes(rows):
        some = [row for row in rows if row.mode == mode]
        line(axis, [row.offered_rps for row in some], [row.goodput_rps for row in some], label=mode)
    if baseline:
        axis.axhline(
            baseline["searches_per_second"], color="grey", linestyle="--", label="in-process baseline, closed loop"
        )
    axis.set_xlabel("offered 1/s")
    axis.set_ylabel("goodput 1/s")


def _draw_tail(rows: Sequence[LoadRow], axis: Axes) -> None:
    for mode in _modes(rows):
        finite = [(row.offered_rps, row.p99_ms) for row in rows if row.mode == mode and row.p99_ms is not None]
        line(axis, [rate for rate, _ in finite], [value for _, value in finite])
    axis.axhline(rows[0].limit_ms, color="grey", linestyle=":")
    axis.set_yscale("log")
    axis.set_xlabel("offered 1/s")
    axis.set_ylabel("p99 ms")
