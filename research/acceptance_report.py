"""Page about `research acceptance`: acceptance.md and its plots.

Drafts that are named GROUP/SEED share a line: the mean over the seeds with its spread.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

from matplotlib.figure import Figure

from atspeed.benchmarks import markdown
from atspeed.benchmarks.markdown import origin, paragraphs, row_table, table
from atspeed.benchmarks.plots import line, plotting, save
from atspeed.benchmarks.results import Columns, Result
from research.acceptance import NAME, NDCG_AT, AcceptanceRow
from research.acceptance_search import NO_DRAFT

_LOSSY = {"tolerance", "relaxed-sampling"}
_Measure = Callable[[AcceptanceRow], float]


@dataclass(frozen=True)
class _Plot:
    """Kind of plot, drawn for each mode: a panel for each K, budgets on its x axis, a line for each group of drafts."""

    name: str
    label: str
    measure: _Measure


_PLOTS = (
    _Plot("target-passes", "mean target passes", lambda row: row.target_passes_mean),
    _Plot("one-pass-share", "share of requests in one pass", lambda row: row.one_pass_share),
)


@dataclass(frozen=True)
class _Sweep:
    """Rows of one mode with a draft, by group of drafts, K and budget, in the order of the result."""

    mode: str
    rows: Sequence[AcceptanceRow]

    @property
    def groups(self) -> list[str]:
        return list(dict.fromkeys(map(_group, self.rows)))

    @property
    def widths(self) -> list[int]:
        return list(dict.fromkeys(row.k for row in self.rows))

    @property
    def budgets(self) -> list[str]:
        return list(dict.fromkeys(row.budget for row in self.rows))

    def cell(self, group: str, k: int, budget: str) -> list[AcceptanceRow]:
        """Return one row for each of the group's seeds."""
        return [row for row in self.rows if (_group(row), row.k, row.budget) == (group, k, budget)]


def write(result: Result, folder: Path) -> Path:
    """Write the page and its plots. Returns the page's path."""
    rows = result.rows_of(NAME, AcceptanceRow)
    sweeps = [
        _Sweep(mode, [row for row in rows if row.mode == mode and row.draft != NO_DRAFT]) for mode in _modes(rows)
    ]
    for sweep in sweeps:
        for plot in _PLOTS:
            _draw(sweep, plot, folder / _file(sweep, plot))
    return markdown.write(folder / "acceptance.md", _page(result.header, rows, sweeps))


def _modes(rows: Iterable[AcceptanceRow]) -> list[str]:
    return list(dict.fromkeys(row.mode for row in rows if row.draft != NO_DRAFT))


def _group(row: AcceptanceRow) -> str:
    return row.draft.partition("/")[0]


def _file(sweep: _Sweep, plot: _Plot) -> str:
    return f"{plot.name}-{sweep.mode}.svg"


def _page(header: Mapping[str, Any], rows: Sequence[AcceptanceRow], sweeps: Sequence[_Sweep]) -> Iterator[str]:
    several = len(header["drafts"]) > len({name.partition("/")[0] for name in header["drafts"]})
    subject = "drafts of one target, several seeds each" if several else "speculative beam search"
    yield from paragraphs(
        f"# Target passes of {subject}",
        f"{header['users']} users of {header['data']}, drawn by seed {header['seed']}: the history before the test items. "
        "A search without a draft takes one pass of the target per code; a pass is saved at each level whose beams the plan "
        "foresaw. ± is half of a 95 % interval over users.",
    )
    yield from _origin(header)
    yield from _target_alone(rows)
    for sweep in sweeps:
        yield from _mode(sweep, header)


def _origin(header: Mapping[str, Any]) -> Iterator[str]:
    processes = f"{header['workers']} with {header['threads']} thread(s) each, {header['wall_seconds']:.0f} s"
    plans = "; ".join(f"{label}: {meaning}" for label, meaning in header["budgets"].items())
    yield from origin(header, [("plans", plans), ("processes", processes)])
    drafts = [
        (name, f"{about['parameters']:,}", about["architecture"], f"{about['bundle']} {about['version']}")
        for name, about in header["drafts"].items()
    ]
    yield from table(("draft", "parameters", "architecture", "bundle"), drafts)


_TARGET_ALONE: Columns[AcceptanceRow] = (
    ("mode", lambda row: row.mode),
    ("K", lambda row: str(row.k)),
    ("target passes", lambda row: f"{row.target_passes_mean:.2f}"),
    (f"Recall@{NDCG_AT}", lambda row: f"{row.recall[_cutoff(row)]:.4f}"),
    (f"NDCG@{NDCG_AT}", lambda row: f"{row.ndcg[_cutoff(row)]:.4f}"),
)


def _target_alone(rows: Sequence[AcceptanceRow]) -> Iterator[str]:
    yield from paragraphs("## Without a draft")
    yield from row_table(_TARGET_ALONE, [row for row in rows if row.draft == NO_DRAFT])
    yield from paragraphs(f"Of lists shorter than {NDCG_AT}, Recall and NDCG are of the whole list.")


def _cutoff(row: AcceptanceRow) -> str:
    return str(min(row.k, NDCG_AT))


def _mode(sweep: _Sweep, header: Mapping[str, Any]) -> Iterator[str]:
    yield from paragraphs(f"## {sweep.mode}", _verdict(sweep, header))
    yield from paragraphs(*(f"![{plot.label}]({_file(sweep, plot)})" for plot in _PLOTS))
    for title, spelled in (
        ("Target passes", _passes),
        ("Requests in one pass", lambda rows: _spread([row.one_pass_share for row in rows], "{:.1%}")),
        ("Nodes planned / used", _nodes),
        ("First miss, by level", _misses),
        *([(f"Lists, Recall@{NDCG_AT} and NDCG@{NDCG_AT}", _lists)] if sweep.mode in _LOSSY else []),
    ):
        yield from paragraphs(f"### {title}")
        yield from _by_budget(sweep, spelled)


def _verdict(sweep: _Sweep, header: Mapping[str, Any]) -> str:
    same, ties, differ = (
        sum(getattr(row, name) for row in sweep.rows) for name in ("identical", "near_ties", "different")
    )
    counts = f"Of {same + ties + differ:,} lists {same:,} are those of the target alone, {ties:,} but for near-ties"
    if sweep.mode == "tolerance":
        return f"{counts}. Tolerance {header['tolerance']}."
    if sweep.mode == "relaxed-sampling":
        return (
            f"{counts}. Temperature {header['temperature']}, a seed per user. The rule is lossy, so its lists are compared "
            "with exact samples by the same seeds: the difference in NDCG is over the same users, with a 95 % bootstrap "
            "interval. Sampled lists are ranked by the target's score before they are measured."
        )
    if sweep.mode == "exact-sampling":
        return f"{counts}; {differ:,} differ. Temperature {header['temperature']}, a seed per user."
    return f"{counts}; {differ:,} differ."


def _by_budget(sweep: _Sweep, spelled: Callable[[Sequence[AcceptanceRow]], str]) -> Iterator[str]:
    """Yield a table with a line for each K and group, and a column for each budget."""
    lines = [
        (str(k), group, *(spelled(sweep.cell(group, k, budget)) for budget in sweep.budgets))
        for k in sweep.widths
        for group in sweep.groups
    ]
    yield from table(("K", "draft", *sweep.budgets), lines)


def _passes(rows: Sequence[AcceptanceRow]) -> str:
    if len(rows) == 1:
        return f"{rows[0].target_passes_mean:.3f} ±{rows[0].target_passes_ci95:.3f}"
    return _spread([row.target_passes_mean for row in rows], "{:.3f}")


def _nodes(rows: Sequence[AcceptanceRow]) -> str:
    return f"{fmean(row.nodes_planned_mean for row in rows):.0f} / {fmean(row.nodes_used_mean for row in rows):.0f}"


def _misses(rows: Sequence[AcceptanceRow]) -> str:
    levels = [level for level in rows[0].miss_level if level != "none"]
    return ", ".join(f"{level}: {fmean(row.miss_level[level] for row in rows):.0%}" for level in levels)


def _lists(rows: Sequence[AcceptanceRow]) -> str:
    unchanged = fmean(row.identical / row.users for row in rows)
    recall = fmean(row.recall[_cutoff(row)] for row in rows)
    ndcg = fmean(row.ndcg[_cutoff(row)] for row in rows)
    text = f"{unchanged:.0%} unchanged, {recall:.4f}, {ndcg:.4f}"
    if rows[0].mode == "tolerance":
        return f"{text}, slack {fmean(row.largest_slack_mean for row in rows):.3f}"
    found = [row.ndcg_difference for row in rows if row.ndcg_difference]
    return f"{text} ({'; '.join(f'{at.value:+.4f} [{at.low:+.4f}, {at.high:+.4f}]' for at in found)})"


def _spread(values: Sequence[float], spelling: str) -> str:
    """Return one value, or the mean of several with the smallest, the largest and the standard deviation."""
    if len(values) == 1:
        return spelling.format(values[0])
    mean, low, high, deviation = map(spelling.format, (fmean(values), min(values), max(values), stdev(values)))
    return f"{mean} ({low} – {high}, sd {deviation})"


def _draw(sweep: _Sweep, plot: _Plot, path: Path) -> None:
    """Draw the plot. The band around a line is from the smallest to the largest of its seeds."""
    with plotting():
        figure = Figure(figsize=(2.4 * len(sweep.widths) + 0.8, 2.8), layout="constrained")
        panels = figure.subplots(1, len(sweep.widths), sharey=True, squeeze=False)[0]
        places = range(len(sweep.budgets))
        for k, panel in zip(sweep.widths, panels, strict=True):
            for index, group in enumerate(sweep.groups):
                values = [list(map(plot.measure, sweep.cell(group, k, budget))) for budget in sweep.budgets]
                colour = f"C{index % 10}"
                line(panel, places, [fmean(some) for some in values], color=colour, label=group)
                low, high = [min(some) for some in values], [max(some) for some in values]
                panel.fill_between(places, low, high, color=colour, alpha=0.2, linewidth=0)
            panel.set_title(f"K = {k}")
            panel.set_xticks(list(places), sweep.budgets)
            panel.set_xlabel("plan")
            panel.grid(visible=True, alpha=0.3)
        panels[0].set_ylabel(plot.label)
        figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=4)
        save(figure, path)
