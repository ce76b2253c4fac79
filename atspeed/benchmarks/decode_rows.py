"""Rows of `bench decode`: one for each engine, mode, K and prefix."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from enum import StrEnum

import numpy as np
from rich.console import Group

from atspeed.benchmarks.near_ties import Verdict, compare
from atspeed.benchmarks.results import Columns, terminal_table
from atspeed.benchmarks.services import mean
from atspeed.engine.search.list_comparison import RankedList
from atspeed.engine.search.mode import Guarantee, Mode

NAME = "decode"
ENGINE = "atspeed"
HUGGING_FACE = "transformers"
REFERENCE = "target-only"
ORACLE_PLAN = "perfect-plan"
STAGES = ("history", "draft", "draft_forward", "target", "target_forward", "selection", "total")


class Prefix(StrEnum):
    """State of the prompt's KV in the services: absent or cached."""

    COLD = "cold"
    WARM = "warm"


@dataclass(frozen=True)
class Variant:
    """One way to get K items. mode: for another engine, the name of its search."""

    engine: str
    mode: str
    k: int
    prefix: Prefix


@dataclass(frozen=True)
class ListSample:
    """One measured list.

    Attributes:
        ranked: the list; None where it is not compared.
        expected_passes: target passes that the planner expected; 0 where it weighed no plan.
        stages_ms: time by stage, by the services' clocks; empty for other engines.
        predicted_ms: predicted time of the passes, by model; empty without a prediction.
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


Samples = dict[Variant, list[ListSample]]


@dataclass(frozen=True)
class DecodeRow:
    """One variant over its users.

    Attributes:
        speedup_vs_target_only, speedup_vs_hf: of medians over the same users, with the same K and prefix (other engines: cold).
        identical, near_ties, different: lists compared with the reference's; None where there is none.
        stages_ms: medians by stage.
        expected_passes_mean: over the requests whose plans were weighed; None without such a request.
        prediction_error: by model, the median over requests of |predicted / measured - 1| of its time.
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
        """Mode, or the name of the other engine."""
        return self.mode if self.engine == ENGINE else self.engine

    @property
    def promises_identity(self) -> bool:
        """True if lists that differ beyond near-ties are an error."""
        approximate = {mode for mode in Mode if mode.properties.guarantee is not Guarantee.EXACT}
        return self.mode not in approximate  # other engines' variants are no modes, and compared like target-only


def _optional(value: float | None, spelling: str) -> str:
    return "" if value is None else format(value, spelling)


COLUMNS: Columns[DecodeRow] = (
    ("", lambda row: row.name),
    ("K", lambda row: str(row.k)),
    ("p50 ms", lambda row: f"{row.p50_ms:.1f}"),
    ("p99 ms", lambda row: f"{row.p99_ms:.1f}"),
    ("target passes", lambda row: f"{row.target_passes_mean:.2f}"),
    ("times target only", lambda row: _optional(row.speedup_vs_target_only, ".2f")),
    ("times HF", lambda row: _optional(row.speedup_vs_hf, ".2f")),
    ("same", lambda row: _optional(row.identical, "d")),
    ("differ", lambda row: _optional(row.different, "d")),
)


def table(rows: Sequence[DecodeRow]) -> Group:
    """Return a table for each prefix."""
    by_prefix = {prefix: [row for row in rows if row.prefix == prefix] for prefix in Prefix}
    return Group(
        *(
            terminal_table(f"{prefix} prefix, {max(row.users for row in some)} users", COLUMNS, by_k(some))
            for prefix, some in by_prefix.items()
            if some
        )
    )


def by_k(rows: Sequence[DecodeRow]) -> list[DecodeRow]:
    """Return the rows by ascending K."""
    return sorted(rows, key=lambda row: row.k)


def summary(samples: Samples) -> list[DecodeRow]:
    """Return a row for each measured variant. samples: by user, in the same order for all; other engines have the first users."""
    return [_row(variant, found, samples) for variant, found in samples.items() if found]


def _row(variant: Variant, found: Sequence[ListSample], samples: Samples) -> DecodeRow:
    times = [one.milliseconds for one in found]
    verdicts = _verdicts(variant, found, samples)
    expected = [one.expected_passes for one in found if one.expected_passes]
    counts = [None if verdicts is None else verdicts.count(verdict) for verdict in Verdict]
    return DecodeRow(
        **asdict(variant),
        users=len(found),
        p50_ms=_percentile(times, 50),
        p99_ms=_percentile(times, 99),
        target_passes_mean=mean([one.target_passes for one in found]),
        draft_passes_mean=mean([one.draft_passes for one in found]),
        nodes_drafted_mean=mean([one.nodes_drafted for one in found]),
        prompt_tokens_mean=mean([one.prompt_tokens for one in found]),
        cached_tokens_mean=mean([one.cached_tokens for one in found]),
        speedup_vs_target_only=_speedup(found, samples.get(_target_only(variant, variant.prefix))),
        speedup_vs_hf=_speedup(found, _hugging_face(variant.k, samples)),
        identical=counts[0],
        near_ties=counts[1],
        different=counts[2],
        stages_ms={
            name: _percentile([one.stages_ms[name] for one in found], 50)
            for name in (STAGES if found[0].stages_ms else ())
        },
        expected_passes_mean=mean(expected) if expected else None,
        prediction_error=_prediction_error(found),
    )


def _prediction_error(found: Sequence[ListSample]) -> dict[str, float]:
    """Return the prediction error by model, over the requests for which its time was predicted."""
    errors = {
        model: [
            abs(one.predicted_ms[model] / one.stages_ms[f"{model}_forward"] - 1)
            for one in found
            if model in one.predicted_ms and one.stages_ms[f"{model}_forward"]
        ]
        for model in ("target", "draft")
    }
    return {model: _percentile(some, 50) for model, some in errors.items() if some}


def _target_only(variant: Variant, prefix: Prefix) -> Variant:
    return Variant(ENGINE, str(Mode.TARGET_ONLY), variant.k, prefix)


def _hugging_face(k: int, samples: Samples) -> Sequence[ListSample] | None:
    return next(
        (found for variant, found in samples.items() if variant.engine == HUGGING_FACE and variant.k == k), None
    )


def _speedup(found: Sequence[ListSample], reference: Sequence[ListSample] | None) -> float | None:
    """Return the speed-up of medians over the users that both have, which are the first ones."""
    both = min(len(found), len(reference or ()))
    if not both or reference is None:
        return None
    ours, theirs = ([one.milliseconds for one in some[:both]] for some in (found, reference))
    return round(float(np.median(theirs) / np.median(ours)), 3)


def _verdicts(variant: Variant, found: Sequence[ListSample], samples: Samples) -> list[Verdict] | None:
    """Compare each list with the reference's; None where the mode has no reference, or the reference was not measured."""
    exact_sample = Variant(ENGINE, variant.mode, variant.k, Prefix.COLD)
    reference = samples.get(exact_sample if variant.mode == Mode.EXACT_SAMPLING else _target_only(variant, Prefix.COLD))
    if reference is None or reference is found or variant.mode == Mode.RELAXED_SAMPLING:
        return None
    pairs = [
        (one.ranked, other.ranked)
        for one, other in zip(found, reference, strict=False)  # peers answered the first users only
        if one.ranked is not None and other.ranked is not None
    ]
    return [compare(one, other) for one, other in pairs] or None


def _percentile(values: Sequence[float], share: float) -> float:
    return round(float(np.percentile(values, share)), 3)
