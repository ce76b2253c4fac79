"""A page about `bench decode`: decode.md and its plots, written from the result file alone."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes

from atspeed.benchmarks import markdown
from atspeed.benchmarks.decode_rows import ENGINE, PERFECT, REFERENCE, DecodeRow, from_json
from atspeed.benchmarks.markdown import draw, figures, item_range, origin, table
from atspeed.benchmarks.results import Result
from atspeed.engine.search.mode import Mode

PAGE = "decode.md"
_TIME_PLOT, _SPEEDUP_PLOT = "decode-time.svg", "decode-speedup.svg"


def write(result: Result, folder: Path) -> Path:
    """Write the page and its plots; the page's path. Raises BenchmarkError when the result is another benchmark's."""
    rows = from_json(result)
    folder.mkdir(parents=True, exist_ok=True)
    for name, panel in ((_TIME_PLOT, _time), (_SPEEDUP_PLOT, _speedup)):
        panels: list[Callable[[Axes], None]] = [
            partial(panel, _beside(rows, prefix), prefix) for prefix in _prefixes(rows)
        ]
        draw(folder / name, panels)
    return markdown.write(folder / PAGE, _page(result.header, rows))


def _prefixes(rows: Sequence[DecodeRow]) -> list[str]:
    return sorted({row.prefix for row in rows if row.engine == ENGINE}, reverse=True)


def _widths(rows: Sequence[DecodeRow]) -> list[int]:
    return sorted({row.k for row in rows})


def _names(rows: Sequence[DecodeRow]) -> list[str]:
    return list(dict.fromkeys(row.name for row in rows))


def _beside(rows: Sequence[DecodeRow], prefix: str) -> list[DecodeRow]:
    """Our rows of a prefix, and the peers', which have none."""
    return [row for row in rows if row.engine != ENGINE or row.prefix == prefix]


def _find(rows: Sequence[DecodeRow], name: str, k: int) -> DecodeRow | None:
    return next((row for row in rows if (row.name, row.k) == (name, k)), None)


def _page(header: Mapping[str, Any], rows: Sequence[DecodeRow]) -> Iterator[str]:
    inflated = ", inflated" if header["bundle"].get("inflated_from") else ""
    yield from (f"# Time of a list: {header['bundle']['name']}{inflated}", "")
    yield (
        f"{header['users']} users with {item_range(header['items'])}, of {header['histories']}, drawn by seed "
        f"{header['seed']}; K beams for K items; one request at a time, all that is compared for one user before the next. "
        "Times are the caller's. *Warm*: the same request was served before the user's last item came. *Cold*: nothing of the "
        f"prompt is kept anywhere. Speed-ups are of medians over the same users, against {REFERENCE} with the same K and prefix. "
        f"Peers have no prefix cache, so that their one time stands in both tables; they answered {header['peer_users']} users."
    )
    yield ""
    peers = [(engine, about) for engine, about in header["peers"].items()]
    planner = ("planner", f"{header['planner']}, after {header['settle']} users that do not count")
    threads = f"{header['threads']} for each model; those of one request take turns"
    yield from origin(header, [("threads", threads), ("provider", header["provider"]), planner, *peers])
    yield from figures(_figures(rows))
    yield from (f"![median time]({_TIME_PLOT})", "", f"![speed-up]({_SPEEDUP_PLOT})", "")
    yield from _verdict(rows)
    for prefix in _prefixes(rows):
        yield from _prefix(_beside(rows, prefix), prefix)
        yield from _stages([row for row in rows if row.prefix == prefix and row.engine == ENGINE])
        yield from _limit([row for row in rows if row.prefix == prefix and row.engine == ENGINE])
    yield from _predictions([row for row in rows if row.prediction_error])


def _figures(rows: Sequence[DecodeRow]) -> Iterator[tuple[str, str]]:
    """The figures that a reader comes for, of strict lists, whatever they are."""
    for prefix in _prefixes(rows):
        beside = _beside(rows, prefix)
        strict = sorted((row for row in beside if row.mode == Mode.STRICT), key=lambda row: row.k)
        for other, ratio in (
            (REFERENCE, lambda row: row.speedup_vs_target_only),
            ("Hugging Face `generate`", lambda row: row.speedup_vs_hf),
            ("onnxruntime-genai without the trie", partial(_over_genai, rows)),
        ):
            known = [f"K = {row.k}: {ratio(row):.2f}x" for row in strict if ratio(row)]
            if known:
                yield f"strict against {other}, {prefix} prefix, p50", "; ".join(known)
    slowest = min(
        (row for row in rows if row.mode == Mode.STRICT and row.speedup_vs_target_only),
        key=lambda row: row.speedup_vs_target_only or 0.0,
        default=None,
    )
    if slowest:
        where = f"{slowest.speedup_vs_target_only:.2f}x, at K = {slowest.k}, {slowest.prefix}"
        yield f"strict against {REFERENCE}, the least of these", where
    for model in ("target", "draft"):
        errors = [row.prediction_error[model] for row in rows if model in row.prediction_error]
        if errors:
            yield (
                f"predicted against measured time in the {model}, |ratio - 1|, of medians by mode, K and prefix",
                f"median {np.median(errors):.0%}, largest {max(errors):.0%}",
            )


def _over_genai(rows: Sequence[DecodeRow], row: DecodeRow) -> float | None:
    """Over the users that both the peers and we answered; by way of Hugging Face, whose users these are."""
    peer = _find(rows, "onnxruntime-genai", row.k)
    if peer is None or not peer.speedup_vs_hf or not row.speedup_vs_hf:
        return None
    return row.speedup_vs_hf / peer.speedup_vs_hf


def _verdict(rows: Sequence[DecodeRow]) -> Iterator[str]:
    yield from ("## Lists", "")
    lines = []
    for name in _names(rows):
        compared = [row for row in rows if row.name == name and row.identical is not None]
        if compared:
            counts = (
                sum(getattr(row, count) or 0 for row in compared) for count in ("identical", "near_ties", "different")
            )
            lines.append((name, *(f"{count:,}" for count in counts)))
    yield from table(
        ("against cold target-only, or the cold exact sample", "identical", "near-ties", "different"), lines
    )


def _prefix(rows: Sequence[DecodeRow], prefix: str) -> Iterator[str]:
    ours = next(row for row in rows if row.engine == ENGINE)
    yield from (f"## {prefix.capitalize()} prefix", "")
    yield (
        f"{ours.prompt_tokens_mean:.0f} prompt tokens in the mean, {ours.cached_tokens_mean:.0f} of them kept. "
        "Median and 99th percentile in ms, speed-up over target-only, target passes."
    )
    yield ""
    widths = _widths(rows)
    lines = [(name, *(_cell(_find(rows, name, k)) for k in widths)) for name in _names(rows)]
    yield from table(("", *(f"K = {k}" for k in widths)), lines)
    if any(row.speedup_vs_hf for row in rows):
        yield from ("Speed-up over Hugging Face `generate`:", "")
        own = [name for name in _names(rows) if name in {row.mode for row in rows if row.engine == ENGINE}]
        lines = [(name, *(_ratio(_find(rows, name, k)) for k in widths)) for name in own]
        yield from table(("", *(f"K = {k}" for k in widths)), lines)


def _cell(row: DecodeRow | None) -> str:
    if row is None:
        return ""
    times = f"{row.p50_ms:.1f} / {row.p99_ms:.1f}"
    speedup = "" if row.speedup_vs_target_only is None else f", **{row.speedup_vs_target_only:.2f}x**"
    return f"{times}{speedup}, {row.target_passes_mean:.2f}"


def _ratio(row: DecodeRow | None) -> str:
    return "" if row is None or row.speedup_vs_hf is None else f"{row.speedup_vs_hf:.1f}x"


def _stages(rows: Sequence[DecodeRow]) -> Iterator[str]:
    """Where our time goes. Draft and target: the orchestrator's wait, and of it the time in the model."""
    yield from (
        "### Where the time goes",
        "",
        "Medians in ms: draft and target are what the orchestrator waits for them.",
        "",
    )
    names = ("history", "draft", "draft_forward", "target", "target_forward", "selection", "total")
    titles = ("mode", "K", *(name.replace("_forward", ", in the model") for name in names), "for the caller", "nodes")
    yield from table(
        titles,
        [
            (
                row.mode,
                str(row.k),
                *(f"{row.stages_ms[name]:.1f}" for name in names),
                f"{row.p50_ms:.1f}",
                f"{row.nodes_drafted_mean:.0f}",
            )
            for row in sorted(rows, key=lambda row: row.k)
        ],
    )


def _limit(rows: Sequence[DecodeRow]) -> Iterator[str]:
    """How much there was to win, and how much of it was won."""
    lines = []
    for k in _widths(rows):
        alone, strict, best = (_find(rows, name, k) for name in (REFERENCE, Mode.STRICT, PERFECT))
        if alone and strict and best:
            lines.append((str(k), *_beside_limit(alone, strict, best)))
    if not lines:
        return
    yield from ("### How close to the limit", "")
    yield (
        "A *perfect plan* holds exactly the nodes that the search needs, known from a target-only search made just before, and "
        "costs no time: one pass of the target, no draft. No draft can do better than that. Medians in ms; speed-ups over "
        f"{REFERENCE}; of the time that the perfect plan saves, the share that strict saves; below 0 % where strict is slower."
    )
    yield ""
    names = (
        "K",
        REFERENCE,
        "strict",
        "perfect plan",
        "speed-up of strict",
        "of the perfect plan",
        "share of the saving",
    )
    yield from table(names, lines)


def _beside_limit(alone: DecodeRow, strict: DecodeRow, best: DecodeRow) -> tuple[str, ...]:
    times = (f"{row.p50_ms:.1f}" for row in (alone, strict, best))
    ratios = (f"{alone.p50_ms / row.p50_ms:.2f}x" for row in (strict, best))
    saved, possible = alone.p50_ms - strict.p50_ms, alone.p50_ms - best.p50_ms
    return (*times, *ratios, f"{saved / possible:.0%}" if possible > 0 else "nothing to save")


def _predictions(rows: Sequence[DecodeRow]) -> Iterator[str]:
    """How well the planner knew what it was in for."""
    if not rows:
        return
    yield from ("## Predicted and measured", "")
    yield "Medians over requests of |predicted / measured - 1|, of the time in each model; target passes expected and taken."
    yield ""
    yield from table(
        ("mode", "K", "prefix", "target", "draft", "passes expected", "taken"),
        [
            (
                row.mode,
                str(row.k),
                row.prefix,
                *(_share(row.prediction_error.get(model)) for model in ("target", "draft")),
                "" if row.expected_passes_mean is None else f"{row.expected_passes_mean:.2f}",
                f"{row.target_passes_mean:.2f}",
            )
            for row in sorted(rows, key=lambda row: (row.k, row.mode))
        ],
    )


def _share(value: float | None) -> str:
    return "" if value is None else f"{value:.0%}"


def _time(rows: Sequence[DecodeRow], prefix: str, axes: Axes) -> None:
    for index, name in enumerate(_names(rows)):
        found = [row for row in rows if row.name == name]
        axes.plot(
            [row.k for row in found],
            [row.p50_ms for row in found],
            marker="o",
            markersize=3,
            color=f"C{index}",
            label=name,
        )
    axes.set(title=f"{prefix} prefix", xlabel="K", ylabel="median ms", xscale="log", yscale="log")
    axes.set_xticks(_widths(rows), [str(k) for k in _widths(rows)], minor=False)


def _speedup(rows: Sequence[DecodeRow], prefix: str, axes: Axes) -> None:
    for index, name in enumerate(_names(rows)):
        found = [row for row in rows if row.name == name and row.engine == ENGINE and row.speedup_vs_target_only]
        if found:
            ratios = [row.speedup_vs_target_only or 0.0 for row in found]
            axes.plot([row.k for row in found], ratios, marker="o", markersize=3, color=f"C{index}", label=name)
    axes.set(title=f"{prefix} prefix", xlabel="K", ylabel="speed-up over target-only", xscale="log")
    axes.set_xticks(_widths(rows), [str(k) for k in _widths(rows)], minor=False)
