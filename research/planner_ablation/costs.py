"""Recorded times of passes and calls, from docs/benchmarks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from atspeed.benchmarks.results import Result
from atspeed.engine.model.cost_curve import CostCurve

PRECISIONS = ("float32", "int8")
"""Number formats of the target. The draft is float32."""
_MS = 1e6


@dataclass(frozen=True)
class Costs:
    """Times of both models. Those of calls are without their passes.

    Attributes:
        target: cost curve of the target.
        draft: cost curve of the draft.
        target_call_ns: overhead of a call to the target.
        target_selection_ns: overhead of each of its passes.
        draft_call_ns: overhead of a call to the draft.
        prompt_tokens: length of a prompt.
        new_tokens: tokens of it that a warm prefix lacks.
    """

    target: CostCurve
    draft: CostCurve
    target_call_ns: int
    target_selection_ns: int
    draft_call_ns: int
    prompt_tokens: int
    new_tokens: int

    @classmethod
    def recorded(cls, benchmarks: Path, precision: str) -> Costs:
        """Return the times with a target of this number format. Raises BenchmarkError for a file that cannot be read."""
        passes = {row["precision"]: row["pass_ms"] for row in Result.read(benchmarks / "precision.json").rows}
        sizes = [int(size) for size in passes[precision]]
        target, reference = (np.array(list(passes[name].values())) for name in (precision, PRECISIONS[0]))
        rows = Result.read(benchmarks / "decode.json").rows
        rows = [row for row in rows if row["k"] == 1 and row["engine"] == "atspeed"]
        call_ms, selection_ms = _target_overhead(rows)
        plans = [row for row in rows if row["mode"] == "strict" and row["draft_passes_mean"]]
        draft = np.array([[_stage(row, "draft_forward"), _stage(row, "draft")] for row in plans]).mean(axis=0)
        # A pass of the draft at K = 1. Its time per token is not recorded: that of the target, relative to a pass of one token.
        first_ms = draft[0] / np.mean([row["draft_passes_mean"] for row in plans])
        warm = next(row for row in rows if row["prefix"] == "warm")
        return cls(
            target=CostCurve.smoothed(sizes, [0], target[:, None] * _MS),
            draft=CostCurve.smoothed(sizes, [0], reference[:, None] * (_MS * first_ms / reference[0])),
            target_call_ns=int(call_ms * _MS),
            target_selection_ns=int(selection_ms * _MS),
            draft_call_ns=int((draft[1] - draft[0]) * _MS),
            prompt_tokens=round(warm["prompt_tokens_mean"]),
            new_tokens=round(warm["prompt_tokens_mean"] - warm["cached_tokens_mean"]),
        )


def _target_overhead(rows: Sequence[Mapping[str, Any]]) -> tuple[float, float]:
    """Return the overhead of a target call and of each pass in ms: the line through the rows of both modes."""
    rows = [row for row in rows if row["mode"] in {"target-only", "strict"}]
    passes = [row["target_passes_mean"] for row in rows]
    slope, call = np.polyfit(passes, [_stage(row, "target") - _stage(row, "target_forward") for row in rows], 1)
    return float(call), float(slope)


def _stage(row: Mapping[str, Any], name: str) -> float:
    return float(row["stages_ms"][name])
