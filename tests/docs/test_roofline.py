"""The predicted times of docs/gpu.md: bounds that any prediction must keep, and the figures that the design is for."""

from __future__ import annotations

import runpy
from pathlib import Path
from typing import Any

import pytest

from atspeed.capacity.roofline import (
    BYTES_PER_SECOND,
    EAGER,
    HOST,
    KERNELS,
    OPERATIONS_PER_SECOND,
    REPLAYED,
    Pass,
)
from atspeed.training.inflation import SHAPES

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def roofline() -> dict[str, Any]:
    return runpy.run_path(str(ROOT / "docs" / "roofline.py"))


@pytest.mark.parametrize("name", ["1.7b", "7b"])
def test_a_pass_takes_at_least_its_weights_its_operations_and_its_kernels(name: str) -> None:
    layer, beside = KERNELS[name]
    shape = SHAPES[name]
    for new in (1, 120, 512):
        for graph in (True, False):
            made = Pass(name, 1000, new, graph=graph)
            weights = made.read * BYTES_PER_SECOND / 2
            assert made.seconds > made.read
            assert made.seconds > 2 * new * weights / OPERATIONS_PER_SECOND
            least = REPLAYED if graph else EAGER
            assert made.seconds > least * (layer * shape.layers + beside)
        assert Pass(name, 1000, new).seconds < Pass(name, 1000, new, graph=False).seconds


def test_weights_are_those_of_the_models() -> None:
    """6.6 billion numbers of 7B are read, all but the embedding; 13 GB in float16."""
    assert Pass("7b", 0, 1).read * BYTES_PER_SECOND == pytest.approx(13.2e9, rel=0.01)


def test_a_plan_of_120_nodes_behind_1000_tokens_of_7b_stays_below_6_ms() -> None:
    made = Pass("7b", 1000, 120)
    assert made.seconds + HOST * 120 < 6e-3


def test_the_tables_name_the_better_plan(roofline: dict[str, Any]) -> None:
    rows = [line.split("|")[1:-1] for line in roofline["tables"]().splitlines() if line.startswith("| 7b, ")]
    lists = [[cell.strip() for cell in row] for row in rows if len(row) == 6][:3]  # K = 50 is an assumption
    assert [row[0] for row in lists] == ["7b, 5", "7b, 10", "7b, 20"]
    for _, plan, passes, plain, strict, ratio in lists:
        assert int(plan) in (120, 240)
        assert 1 <= float(passes) < 4
        assert float(ratio) == pytest.approx(float(plain) / float(strict), abs=0.06)
