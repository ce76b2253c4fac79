"""What `bench decode` found: a row for each way to get a list, worked out from all its answers, for people and result files."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from enum import StrEnum
from typing import Any

import numpy as np
from rich import box
from rich.console import Group
from rich.table import Table

from atspeed.benchmarks.errors import BenchmarkError
from atspeed.benchmarks.results import Result
from atspeed.benchmarks.services import mean
from atspeed.engine.search.list_comparison import RankedList, Verdict, compare
from atspeed.engine.search.mode import Mode

NAME = "decode"
ENGINE = "atspeed"
HUGGING_FACE = "transformers"
REFERENCE = "target-only"
PERFECT = "perfect-plan"
STAGES = ("history", "draft", "draft_forward", "target", "target_forward", "selection", "total")


class Prefix(StrEnum):
    """What the services know of a prompt."""

    COLD = "cold"
    WARM = "warm"


@dataclass(frozen=True)
class Way:
    """One way to get K items. engine, mode: as in the result; mode of a peer says what its search is."""

    engine: str
    mode: str
    k: int
    prefix: Prefix


@dataclass(frozen=True)
class Answer:
    """One measured list. stages_ms: where our time went, by the services' own clocks. ranked: None where nothing compares.

    expected_passes: 0 where no plan was weighed. predicted_ms: of the models' passes, by model; empty where nobody predicted.
    """

    milliseconds: float
    ranked: RankedList | None
    target_passes: int
    draft_passes: int = 0
    nodes_drafted: int = 0
    prompt_tokens: int = 0
    cached_tokens: int = 0
    expected_passes: float = 0.0
    stages_ms: Mapping[str, float] = field(default_factory=dict)
    predicted_ms: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class DecodeRow:
    """One way over its users. Speed-ups are of medians over the same users, against the same K and prefix (peers: cold).

    identical, near_ties, different: lists against the reference's; None where there is nothing to compare. stages_ms: medians.
    expected_passes_mean: of the requests whose plans were weighed, None without. prediction_error: by model, the median of
    |predicted / measured - 1| of its time in a request.
    """

    engine: str
    mode: str
    k: int
    prefix: str
    users: int
    p50_ms: float
    p99_ms: float
    target_passes_mean: float
    draft_passes_mean: float
    nodes_drafted_mean: float
    prompt_tokens_mean: float
    cached_tokens_mean: float
    speedup_vs_target_only: float | None
    speedup_vs_hf: float | None
    identical: int | None
    near_ties: int | None
    different: int | None
    stages_ms: Mapping[str, float]
    expected_passes_mean: float | None
    prediction_error: Mapping[str, float]

    @property
    def name(self) -> str:
        """The mode, or the other engine."""
        return self.mode if self.engine == ENGINE else self.engine

    @property
    def promises_identity(self) -> bool:
        """Whether lists that differ beyond near-ties are an error."""
        return self.mode not in {Mode.TOLERANCE, Mode.RELAXED_SAMPLING}


Answers = dict[Way, list[Answer]]


def table(rows: Sequence[DecodeRow]) -> Group:
    """The rows, for people: a table for each prefix."""
    measured = [prefix for prefix in Prefix if any(row.prefix == prefix for row in rows)]
    return Group(*(_table_of(prefix, [row for row in rows if row.prefix == prefix]) for prefix in measured))


def _table_of(prefix: Prefix, rows: Sequence[DecodeRow]) -> Table:
    users = max((row.users for row in rows), default=0)
    title = f"{prefix} prefix, {users} users"
    shown = Table(title=title, box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False)
    shown.add_column("", overflow="fold")
    for name in ("K", "p50\nms", "p99\nms", "target\npasses", "times\ntarget\nonly", "times\nHF", "same", "differ"):
        shown.add_column(name, justify="right", no_wrap=True)
    for row in sorted(rows, key=lambda row: row.k):
        numbers = (f"{row.p50_ms:.1f}", f"{row.p99_ms:.1f}", f"{row.target_passes_mean:.2f}")
        ratios = ("" if value is None else f"{value:.2f}" for value in (row.speedup_vs_target_only, row.speedup_vs_hf))
        counts = ("" if value is None else str(value) for value in (row.identical, row.different))
        shown.add_row(row.name, str(row.k), *numbers, *ratios, *counts)
    return shown


def to_json(rows: Sequence[DecodeRow]) -> list[dict[str, Any]]:
    """The rows, for a result file."""
    return [asdict(row) for row in rows]


def from_json(result: Result) -> list[DecodeRow]:
    """The rows of a result file. Raises BenchmarkError when it is another benchmark's."""
    if result.header.get("benchmark") != NAME:
        raise BenchmarkError("the result is not one of bench decode")
    return [DecodeRow(**row) for row in result.rows]


def summary(answers: Answers) -> list[DecodeRow]:
    """A row for each way that was gone. answers: by user, in the same order for all ways; peers have the first users'."""
    return [_row(way, found, answers) for way, found in answers.items() if found]


def _row(way: Way, found: Sequence[Answer], answers: Answers) -> DecodeRow:
    times = [answer.milliseconds for answer in found]
    verdicts = _verdicts(way, found, answers)
    expected = [answer.expected_passes for answer in found if answer.expected_passes]
    counts = [None if verdicts is None else verdicts.count(verdict) for verdict in Verdict]
    return DecodeRow(
        **asdict(way),
        users=len(found),
        p50_ms=_percentile(times, 50),
        p99_ms=_percentile(times, 99),
        target_passes_mean=mean([answer.target_passes for answer in found]),
        draft_passes_mean=mean([answer.draft_passes for answer in found]),
        nodes_drafted_mean=mean([answer.nodes_drafted for answer in found]),
        prompt_tokens_mean=mean([answer.prompt_tokens for answer in found]),
        cached_tokens_mean=mean([answer.cached_tokens for answer in found]),
        speedup_vs_target_only=_speedup(found, answers.get(_target_only(way, way.prefix))),
        speedup_vs_hf=_speedup(found, _hugging_face(way.k, answers)),
        identical=counts[0],
        near_ties=counts[1],
        different=counts[2],
        stages_ms={
            name: _percentile([answer.stages_ms[name] for answer in found], 50)
            for name in (STAGES if found[0].stages_ms else ())
        },
        expected_passes_mean=mean(expected) if expected else None,
        prediction_error=_prediction_error(found),
    )


def _prediction_error(found: Sequence[Answer]) -> dict[str, float]:
    """By model, over the requests for which its time was predicted."""
    errors = {
        model: [
            abs(answer.predicted_ms[model] / answer.stages_ms[f"{model}_forward"] - 1)
            for answer in found
            if model in answer.predicted_ms and answer.stages_ms[f"{model}_forward"]
        ]
        for model in ("target", "draft")
    }
    return {model: _percentile(some, 50) for model, some in errors.items() if some}


def _target_only(way: Way, prefix: Prefix) -> Way:
    return Way(ENGINE, str(Mode.TARGET_ONLY), way.k, prefix)


def _hugging_face(k: int, answers: Answers) -> Sequence[Answer] | None:
    return next((found for way, found in answers.items() if way.engine == HUGGING_FACE and way.k == k), None)


def _speedup(found: Sequence[Answer], reference: Sequence[Answer] | None) -> float | None:
    """Of medians, over the users that both have: the first ones."""
    both = min(len(found), len(reference or ()))
    if not both or reference is None:
        return None
    ours, theirs = ([answer.milliseconds for answer in some[:both]] for some in (found, reference))
    return round(float(np.median(theirs) / np.median(ours)), 3)


def _verdicts(way: Way, found: Sequence[Answer], answers: Answers) -> list[Verdict] | None:
    """Each list against the reference's; None where the mode makes lists of its own, or the reference was not asked."""
    exact_sample = Way(ENGINE, way.mode, way.k, Prefix.COLD)
    reference = answers.get(exact_sample if way.mode == Mode.EXACT_SAMPLING else _target_only(way, Prefix.COLD))
    if reference is None or reference is found or way.mode == Mode.RELAXED_SAMPLING:
        return None
    pairs = [
        (one.ranked, other.ranked)
        for one, other in zip(found, reference, strict=False)  # peers answered the first users only
        if one.ranked is not None and other.ranked is not None
    ]
    return [compare(one, other) for one, other in pairs] or None


def _percentile(values: Sequence[float], share: float) -> float:
    return round(float(np.percentile(values, share)), 3)
