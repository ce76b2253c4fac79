"""Page about `bench decode`: decode.md and its plots, from the result file."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes

from atspeed.benchmarks import markdown
from atspeed.benchmarks.decode_rows import ENGINE, NAME, ORACLE_PLAN, REFERENCE, STAGES, DecodeRow, by_k
from atspeed.benchmarks.markdown import figures, item_range, origin, paragraphs, row_table, table
from atspeed.benchmarks.plots import draw, line
from atspeed.benchmarks.results import Columns, Result
from atspeed.engine.search.mode import Mode

_TIME_PLOT, _SPEEDUP_PLOT = "decode-time.svg", "decode-speedup.svg"


def write(result: Result, folder: Path) -> Path:
    """Write the page and its plots. Returns the page's path."""
    rows = result.rows_of(NAME, DecodeRow)
    for name, panel in ((_TIME_PLOT, _draw_times), (_SPEEDUP_PLOT, _draw_speedups)):
        draw(folder / name, [partial(panel, _of_prefix(rows, prefix), prefix) for prefix in _prefixes(rows)])
    return markdown.write(folder / "decode.md", _page(result.header, rows))


def _prefixes(rows: Sequence[DecodeRow]) -> list[str]:
    return sorted({row.prefix for row in rows if row.engine == ENGINE}, reverse=True)


def _widths(rows: Sequence[DecodeRow]) -> list[int]:
    return sorted({row.k for row in rows})


def _names(rows: Sequence[DecodeRow]) -> list[str]:
    return list(dict.fromkeys(row.name for row in rows))


def _of_prefix(rows: Sequence[DecodeRow], prefix: str) -> list[DecodeRow]:
    """Return our rows of a prefix and all rows of other engines, which have no prefix cache."""
    return [row for row in rows if row.engine != ENGINE or row.prefix == prefix]


def _find(rows: Sequence[DecodeRow], name: str, k: int) -> DecodeRow | None:
    return next((row for row in rows if (row.name, row.k) == (name, k)), None)


def _page(header: Mapping[str, Any], rows: Sequence[DecodeRow]) -> Iterator[str]:
    inflated = ", inflated" if header["bundle"].get("inflated_from") else ""
    yield from paragraphs(
        f"# Time of a list: {header['bundle']['name']}{inflated}",
        f"{header['users']} users with {item_range(header['items'])}, of {header['histories']}, drawn by seed "
        f"{header['seed']}; K beams for K items; one request at a time, all that is compared for one user before the next. "
        "Times are the caller's. *Warm*: the same request was served before the user's last item came. *Cold*: nothing of the "
        f"prompt is kept anywhere. Speed-ups are of medians over the same users, against {REFERENCE} with the same K and prefix. "
        f"Peers have no prefix cache, so that their one time stands in both tables; they answered {header['peer_users']} users.",
    )
    planner = ("planner", f"{header['planner']}, after {header['settle']} users that do not count")
    threads = f"{header['threads']} for each model; those of one request take turns"
    yield from origin(
        header, [("threads", threads), ("provider", header["provider"]), planner, *header["peers"].items()]
    )
    yield from figures(_figures(rows))
    yield from paragraphs(f"![median time]({_TIME_PLOT})", f"![speed-up]({_SPEEDUP_PLOT})")
    yield from _comparison(rows)
    for prefix in _prefixes(rows):
        yield from _prefix(_of_prefix(rows, prefix), prefix)
        own = [row for row in rows if row.prefix == prefix and row.engine == ENGINE]
        yield from _stages(own)
        yield from _limit(own)
    yield from _predictions([row for row in rows if row.prediction_error])


def _figures(rows: Sequence[DecodeRow]) -> Iterator[tuple[str, str]]:
    """Yield the figures of strict lists that readers look for first."""
    for prefix in _prefixes(rows):
        strict = by_k([row for row in _of_prefix(rows, prefix) if row.mode == Mode.STRICT])
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
    """Return the speed-up over genai, through that over Hugging Face: all three then count the same users."""
    peer = _find(rows, "onnxruntime-genai", row.k)
    if peer is None or not peer.speedup_vs_hf or not row.speedup_vs_hf:
        return None
    return row.speedup_vs_hf / peer.speedup_vs_hf


def _comparison(rows: Sequence[DecodeRow]) -> Iterator[str]:
    yield from paragraphs("## Lists")
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
    own = [row for row in rows if row.engine == ENGINE]
    yield from paragraphs(
        f"## {prefix.capitalize()} prefix",
        f"{own[0].prompt_tokens_mean:.0f} prompt tokens in the mean, {own[0].cached_tokens_mean:.0f} of them kept. "
        "Median and 99th percentile in ms, speed-up over target-only, target passes.",
    )
    yield from _by_width(rows, _names(rows), _cell)
    if any(row.speedup_vs_hf for row in rows):
        yield from paragraphs("Speed-up over Hugging Face `generate`:")
        yield from _by_width(
            rows, _names(own), lambda row: "" if row.speedup_vs_hf is None else f"{row.speedup_vs_hf:.1f}x"
        )


def _by_width(rows: Sequence[DecodeRow], names: Sequence[str], spell: Callable[[DecodeRow], str]) -> Iterator[str]:
    """Yield a table with a line for each mode or engine and a column for each K."""
    found = {(row.name, row.k): spell(row) for row in rows}
    widths = _widths(rows)
    lines = [(name, *(found.get((name, k), "") for k in widths)) for name in names]
    return table(("", *(f"K = {k}" for k in widths)), lines)


def _cell(row: DecodeRow) -> str:
    speedup = "" if row.speedup_vs_target_only is None else f", **{row.speedup_vs_target_only:.2f}x**"
    return f"{row.p50_ms:.1f} / {row.p99_ms:.1f}{speedup}, {row.target_passes_mean:.2f}"


def _stages(rows: Sequence[DecodeRow]) -> Iterator[str]:
    """Yield the section on stage times. Draft and target: the orchestrator's wait, and of it the time in the model."""
    yield from paragraphs(
        "### Where the time goes", "Medians in ms: draft and target are what the orchestrator waits for them."
    )
    titles = ("mode", "K", *(name.replace("_forward", ", in the model") for name in STAGES), "for the caller", "nodes")
    lines = [
        (
            row.mode,
            str(row.k),
            *(f"{row.stages_ms[name]:.1f}" for name in STAGES),
            f"{row.p50_ms:.1f}",
            f"{row.nodes_drafted_mean:.0f}",
        )
        for row in by_k(rows)
    ]
    yield from table(titles, lines)


def _limit(rows: Sequence[DecodeRow]) -> Iterator[str]:
    """Yield the section that compares strict with oracle plans."""
    lines = []
    for k in _widths(rows):
        alone, strict, best = (_find(rows, name, k) for name in (REFERENCE, Mode.STRICT, ORACLE_PLAN))
        if alone and strict and best:
            lines.append((str(k), *_limit_cells(alone, strict, best)))
    if not lines:
        return
    yield from paragraphs(
        "### How close to the limit",
        "A *perfect plan* holds exactly the nodes that the search needs, known from a target-only search made just before, and "
        "costs no time: one pass of the target, no draft. No draft can do better than that. Medians in ms; speed-ups over "
        f"{REFERENCE}; of the time that the perfect plan saves, the share that strict saves; below 0 % where strict is slower.",
    )
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


def _limit_cells(alone: DecodeRow, strict: DecodeRow, best: DecodeRow) -> tuple[str, ...]:
    times = (f"{row.p50_ms:.1f}" for row in (alone, strict, best))
    ratios = (f"{alone.p50_ms / row.p50_ms:.2f}x" for row in (strict, best))
    saved, possible = alone.p50_ms - strict.p50_ms, alone.p50_ms - best.p50_ms
    return (*times, *ratios, f"{saved / possible:.0%}" if possible > 0 else "nothing to save")


_PREDICTIONS: Columns[DecodeRow] = (
    ("mode", lambda row: row.mode),
    ("K", lambda row: str(row.k)),
    ("prefix", lambda row: row.prefix),
    ("target", lambda row: _share(row.prediction_error.get("target"))),
    ("draft", lambda row: _share(row.prediction_error.get("draft"))),
    ("passes expected", lambda row: "" if row.expected_passes_mean is None else f"{row.expected_passes_mean:.2f}"),
    ("taken", lambda row: f"{row.target_passes_mean:.2f}"),
)


def _predictions(rows: Sequence[DecodeRow]) -> Iterator[str]:
    """Yield the section on the planner's predictions."""
    if rows:
        yield from paragraphs(
            "## Predicted and measured",
            "Medians over requests of |predicted / measured - 1|, of the time in each model; target passes expected and taken.",
        )
        yield from row_table(_PREDICTIONS, sorted(rows, key=lambda row: (row.k, row.mode)))


def _share(value: float | None) -> str:
    return "" if value is None else f"{value:.0%}"


def _draw_times(rows: Sequence[DecodeRow], prefix: str, axis: Axes) -> None:
    for index, name in enumerate(_names(rows)):
        found = [row for row in rows if row.name == name]
        line(axis, [row.k for row in found], [row.p50_ms for row in found], color=f"C{index}", label=name)
    axis.set(title=f"{prefix} prefix", xlabel="K", ylabel="median ms", xscale="log", yscale="log")
    axis.set_xticks(_widths(rows), [str(k) for k in _widths(rows)], minor=False)


def _draw_speedups(rows: Sequence[DecodeRow], prefix: str, axis: Axes) -> None:
    for index, name in enumerate(_names(rows)):
        found = [row for row in rows if row.name == name and row.engine == ENGINE and row.speedup_vs_target_only]
        if found:
            ratios = [row.speedup_vs_target_only or 0.0 for row in found]
            line(axis, [row.k for row in found], ratios, color=f"C{index}", label=name)
    axis.set(title=f"{prefix} prefix", xlabel="K", ylabel="speed-up over target-only", xscale="log")
    axis.set_xticks(_widths(rows), [str(k) for k in _widths(rows)], minor=False)
