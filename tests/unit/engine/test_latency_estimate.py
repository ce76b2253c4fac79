"""Expected latency: the worked example of the adaptive sizer, line by line."""

from __future__ import annotations

import numpy as np
import pytest

from atspeed.engine.arrays import Float64, Int64
from atspeed.engine.search.beam_widths import BeamWidths
from atspeed.engine.speculation.acceptance_model import WorkloadKey
from atspeed.engine.speculation.latency_estimate import (
    BaselinePasses,
    ExpectedLatency,
    PlanCoverage,
    RemainingWorkRatio,
)
from orchestrator.planning import adaptive_sizer
from tests.catalogues import random_catalogue

WIDTH, COMPUTED_TOKENS = 10, 5


def pass_ms(tokens: Int64) -> Float64:
    return np.asarray(8 + 0.31 * tokens)


def example_rows() -> list[list[float]]:
    """Return the numbers of each line of the example's table: margin, nodes, S_1 to S_3 and three times."""
    lines = [line.replace("ms", "").split("(")[0].split() for line in (adaptive_sizer.__doc__ or "").splitlines()]
    return [[float(cell) for cell in line] for line in lines if len(line) == 8 and line[0] != "margin"]


def test_expected_latency_of_the_worked_example_is_as_documented() -> None:
    margin, nodes, *missed, first_pass_ms, later_ms, total_ms = np.array(example_rows()).T
    assert (np.diff(margin) < 0).all()
    trie = random_catalogue(500, (12, 10, 8, 8), seed=0).trie
    baseline = BaselinePasses.of(trie, BeamWidths.of(WIDTH), pass_ms)
    estimate = ExpectedLatency.below(
        start=0,
        missing=1,
        baseline=baseline,
        ratios=RemainingWorkRatio(),
        workload=WorkloadKey.of("strict", BeamWidths.of(WIDTH)),
        first_pass_ns=lambda planned: pass_ms(COMPUTED_TOKENS + planned),
    )
    assert baseline.remaining_ns.tolist() == pytest.approx([33.3, 22.2, 11.1])
    assert first_pass_ms.tolist() == pytest.approx(pass_ms(COMPUTED_TOKENS + nodes).tolist())
    expected = estimate.total_ns(PlanCoverage.spread_evenly(nodes.astype(np.int64), np.array(missed)))
    assert expected.tolist() == pytest.approx(total_ms.tolist(), abs=0.06)
    assert (expected - first_pass_ms).tolist() == pytest.approx(later_ms.tolist(), abs=0.06)
    assert nodes[np.argmin(expected)] == 30
