"""Costs of lists from result files of benchmarks, or by arithmetic for a device.

    bench load        the in-process baseline: plain beam search with shared passes, measured
    bench decode      times of the models for a list, one at a time, cold and warm prefixes mixed by the prefix hits
    research precision  the time of a pass by its tokens
    a cost curve      new_tokens [n], cached_tokens [c], forward_ms [n][c], as a model service measures it
    a device          atspeed/capacity/roofline.py

The passes of speculation come from `research acceptance`, `bench decode` or the agreement of a manifest.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from atspeed.benchmarks.results import Result
from atspeed.capacity.errors import CapacityError
from atspeed.capacity.model import Way
from atspeed.capacity.roofline import MOST_TOKENS, pass_seconds
from atspeed.engine.model.cost_curve import CostCurve
from atspeed.engine.model.device_pass import NEW_BUCKETS
from atspeed.training.inflation import ModelShape

PassTime = Callable[[int, float], float | None]
"""Milliseconds of a pass of so many trees of so many new tokens each; None where several trees do not share one."""

TREES = (1, 2, 4, 8, 16, 32, 64)
PLAIN, STRICT = "target-only", "strict"


@dataclass(frozen=True)
class Speculation:
    """The passes of lists with a plan.

    Attributes:
        plan: name of the plan size.
        passes: target passes of a list.
        nodes: nodes of all plans of a list.
        plans: calls of the draft for a list.
    """

    plan: str
    passes: float
    nodes: float
    plans: float


@dataclass(frozen=True)
class Question:
    """The lists to make.

    Attributes:
        levels: levels of the catalogue's trie.
        computed: prompt tokens of a list that no cache holds, at least 1.
        plan_ms: milliseconds of the draft's replica for a plan.
    """

    k: int
    levels: int
    computed: float
    prefix_hit: float
    plan_ms: float


def accepted_by_rows(result: Result, k: int) -> list[Speculation]:
    """Return the plans of `research acceptance` for lists of K in mode strict, of the file's first draft.

    Raises CapacityError that names the K of the file.
    """
    rows = [row for row in result.rows if row.get("mode") == STRICT and row.get("draft") != "none"]
    _check_k(rows, k)
    rows = [row for row in rows if row["k"] == k and row["draft"] == rows[0]["draft"]]
    found = list[Speculation]()
    for row in rows:
        passes, nodes = _number(row, "target_passes_mean", least=1.0), _number(row, "nodes_planned_mean", least=0.0)
        found.append(Speculation(str(row.get("budget", "")), passes, nodes, passes))
    return found


def accepted_by_agreement(metrics: Mapping[str, float], k: int, levels: int) -> list[Speculation]:
    """Return the plan of a manifest's agreement, or nothing: 40 nodes a level cover the levels that were accepted.

    Every level that was not accepted costs a pass. The agreement is of lists of 10, so that longer lists get no plan.
    """
    accepted = metrics.get("agreement.accepted")
    if accepted is None or k > 10 or not 0 < accepted <= levels - 1:
        return []
    return [Speculation("40 a level, by the manifest", levels - accepted, 40.0 * (levels - 1), 1.0)]


def curve_ways(time: PassTime, asked: Question, speculation: Sequence[Speculation]) -> list[Way]:
    """Return plain beam search and every plan, with the times of a curve or of a device."""

    def together(passes: Sequence[tuple[float, float]]) -> dict[int, float]:
        sums = dict[int, float]()
        for trees in TREES:
            times = [(number, time(trees, new)) for number, new in passes]
            if any(each is None for _, each in times):
                break
            sums[trees] = sum(number * (each or 0.0) for number, each in times)
        return sums

    levels = float(asked.levels - 1)
    ways = [Way(PLAIN, float(asked.levels), together([(1.0, asked.computed), (levels, float(asked.k))]))]
    for each in speculation:
        new = (asked.computed + each.nodes) / each.passes
        name = f"{STRICT}, plan {each.plan}"
        ways.append(Way(name, each.passes, together([(each.passes, new)]), each.plans * asked.plan_ms))
    return ways


def decode_ways(result: Result, asked: Question) -> list[Way]:
    """Return both modes with the models' times that `bench decode` measured, one list at a time."""
    rows = [row for row in result.rows if row.get("engine") == "atspeed" and row.get("mode") in (PLAIN, STRICT)]
    _check_k(rows, asked.k)
    ways = list[Way]()
    for mode in (PLAIN, STRICT):
        found = {row["prefix"]: row for row in rows if row["k"] == asked.k and row["mode"] == mode}
        if not {"cold", "warm"} <= set(found):
            continue
        shares = (("warm", asked.prefix_hit), ("cold", 1 - asked.prefix_hit))

        def mixed(
            read: Callable[[Mapping[str, Any]], float],
            found: Mapping[str, Mapping[str, Any]] = found,
            shares: Sequence[tuple[str, float]] = shares,
        ) -> float:
            return sum(share * read(found[prefix]) for prefix, share in shares)

        passes = mixed(lambda row: _number(row, "target_passes_mean", least=1.0))
        target = mixed(lambda row: _number(row["stages_ms"], "target_forward", least=1e-3))
        draft = mixed(lambda row: _number(row["stages_ms"], "draft_forward", least=0.0))
        ways.append(Way(mode, passes, {1: target}, draft))
    if not ways:
        raise CapacityError("the result of decode has no rows with a cold and a warm prefix")
    return ways


def load_ways(result: Result, k: int) -> list[Way]:
    """Return plain beam search at the throughput of a load result's in-process baseline."""
    if result.header.get("k") != k:
        raise CapacityError(f"k: the load result is of lists of {result.header.get('k')}, not of {k}")
    passes = [_number(row, "target_passes_mean", least=1.0) for row in result.rows if row.get("mode") == PLAIN]
    if not passes:
        raise CapacityError(f"the result of load has no rows of {PLAIN}")
    return [Way(PLAIN, max(passes), {1: baseline_ms(result)})]


def baseline_ms(result: Result) -> float:
    """Return the milliseconds of a list in the load result's in-process baseline of one replica's threads."""
    try:
        rate = float(result.header["bare"]["1"]["searches_per_second"])
    except (KeyError, TypeError, ValueError) as error:
        raise CapacityError("bare: the load result has no in-process baseline of one replica") from error
    if not 0 < rate < float("inf"):
        raise CapacityError("bare.1.searches_per_second: must be above 0")
    return 1e3 / rate


def curve_of(content: Mapping[str, Any]) -> CostCurve:
    """Return the cost curve of a JSON object. Raises CapacityError that names the field."""
    names = ("new_tokens", "cached_tokens", "forward_ms")
    if missing := [name for name in names if name not in content]:
        raise CapacityError(f"{missing[0]}: missing; a cost curve has new_tokens, cached_tokens and forward_ms")
    try:
        new, cached = (np.asarray(content[name], dtype=np.int64) for name in names[:2])
        forward = np.asarray(content["forward_ms"], dtype=np.float64) * 1e6
        return CostCurve(new, cached, forward.reshape(len(new), len(cached)))
    except (TypeError, ValueError, OverflowError) as error:
        raise CapacityError(f"not a cost curve: {error}") from error


def precision_curve(result: Result, precision: str) -> CostCurve:
    """Return the curve of `research precision` for a number format."""
    rows = {row.get("precision"): row for row in result.rows}
    if precision not in rows:
        raise CapacityError(
            f"precision: the result has {', '.join(map(str, rows))}, the bundle's target is {precision}"
        )
    try:
        passes = sorted((int(tokens), float(ms)) for tokens, ms in rows[precision]["pass_ms"].items())
        times = np.asarray([[ms * 1e6] for _, ms in passes])
        return CostCurve.smoothed([tokens for tokens, _ in passes], [0], times)
    except (KeyError, AttributeError, TypeError, ValueError) as error:
        raise CapacityError(f"pass_ms: not the time of a pass by its tokens: {error}") from error


def host_time(curve: CostCurve, cached: float) -> PassTime:
    """Return the times of passes on a CPU. Passes of one list only: larger ones gain little there."""

    def time(trees: int, new: float) -> float | None:
        return float(curve.predict(max(1.0, new), cached)) / 1e6 if trees == 1 else None

    return time


def device_time(shape: ModelShape, kernels: tuple[int, int], prompt: float) -> PassTime:
    """Return predicted times of passes on a GPU. Lists share a pass up to the tokens of the largest CUDA graph."""

    def time(trees: int, new: float) -> float | None:
        tokens = max(1, round(new))
        padded = next((size for size in NEW_BUCKETS if size >= tokens), None)
        if trees > 1 and (padded is None or trees * padded > MOST_TOKENS):
            return None
        graph = padded is not None
        return 1e3 * pass_seconds(shape, kernels, round(prompt), tokens, trees=trees, graph=graph)

    return time


def _check_k(rows: Sequence[Mapping[str, Any]], k: int) -> None:
    known = sorted({row["k"] for row in rows if "k" in row})
    if k not in known:
        raise CapacityError(f"k: the result file has lists of {', '.join(map(str, known)) or 'no length'}, not of {k}")


def _number(row: Mapping[str, Any], name: str, *, least: float) -> float:
    value = row.get(name)
    if not isinstance(value, (int, float)) or not least <= value < float("inf"):
        raise CapacityError(f"{name}: {value!r} in the result file is not a number of at least {least:g}")
    return float(value)
