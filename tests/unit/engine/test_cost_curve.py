"""The cost curve keeps its measurements, interpolates between them, and survives the wire."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import product
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from atspeed.engine.model.cost_curve import NEW_TOKENS, CostCurve, measure
from atspeed.engine.model.pass_stats import PassStats
from atspeed.errors import InvalidArgumentError
from atspeed.rpc import wire


def naive(curve: CostCurve, new: float, cached: float) -> float:
    """Two linear interpolations in plain Python, one axis after the other."""
    measured = min(cached, curve.cached_tokens[-1])
    column = [_line(curve.cached_tokens.tolist(), row.tolist(), measured) for row in curve.forward_ns]
    return _line(curve.new_tokens.tolist(), column, new)


def _line(axis: Sequence[float], values: Sequence[float], at: float) -> float:
    if len(axis) == 1 or at <= axis[0]:
        return values[0]
    right = next((index for index in range(1, len(axis)) if at <= axis[index]), len(axis) - 1)
    slope = (values[right] - values[right - 1]) / (axis[right] - axis[right - 1])
    return values[right - 1] + slope * (at - axis[right - 1])


@st.composite
def curves(draw: st.DrawFn) -> CostCurve:
    new = sorted(draw(st.sets(st.integers(1, 300), min_size=1, max_size=6)))
    cached = sorted(draw(st.sets(st.integers(0, 300), min_size=1, max_size=3)))
    cells = draw(st.lists(st.integers(1, 10**9), min_size=len(new) * len(cached), max_size=len(new) * len(cached)))
    return CostCurve.smoothed(new, cached, np.reshape(np.asarray(cells, dtype=np.float64), (len(new), len(cached))))


@given(curves(), st.lists(st.tuples(st.integers(0, 600), st.integers(0, 600)), min_size=1))
def test_prediction_is_bilinear_on_the_grid_and_linear_beyond_it(
    curve: CostCurve, shapes: list[tuple[int, int]]
) -> None:
    predicted = curve.predict(*np.transpose(shapes))
    assert predicted == pytest.approx([naive(curve, new, cached) for new, cached in shapes])


@given(curves(), st.floats(0, 600), st.floats(0, 600))
def test_the_prediction_of_one_pass_is_that_of_many(curve: CostCurve, new: float, cached: float) -> None:
    assert curve.pass_ns(new, cached) == pytest.approx(naive(curve, new, cached))
    assert curve.pass_ns(new, cached) == pytest.approx(float(curve.predict(new, cached)))


@given(curves())
def test_larger_passes_never_cost_less(curve: CostCurve) -> None:
    """Beyond the most new tokens, which slope is the steeper decides between more and fewer cached ones."""
    grid = curve.predict(np.arange(400)[:, None], np.arange(0, 400, 7))
    rounding = 1e-9 * grid.max()
    assert (np.diff(grid, axis=0) >= -rounding).all()
    within = grid[: curve.new_tokens[-1] + 1]
    assert (np.diff(within, axis=1) >= -rounding).all()


def test_smoothed_curve_raises_noisy_values_only() -> None:
    curve = CostCurve.smoothed([1, 4, 16], [0, 32], np.array([[5.0, 6.0], [4.0, 9.0], [8.0, 7.0]]))
    assert curve.forward_ns.tolist() == [[5, 6], [5, 9], [8, 9]]
    assert [float(curve.predict(new, cached)) for new, cached in product([1, 4, 16], [0, 32])] == [5, 6, 5, 9, 8, 9]


def cost(new: int, cached: int) -> int:
    """A simulated pass: flat up to 16 tokens, then linear."""
    return 1_000_000 + 20_000 * max(0, new - 16) + 100 * cached


class Machine:
    """Runs simulated passes; every third one is disturbed."""

    def __init__(self) -> None:
        self.passes: list[tuple[int, int]] = []

    async def __call__(self, new: int, cached: int) -> PassStats:
        self.passes.append((new, cached))
        disturbed = len(self.passes) % 7 == 3
        return PassStats(forward_ns=cost(new, cached) * (10 if disturbed else 1), new_tokens=new)


async def test_measured_curve_is_the_median_of_the_rounds() -> None:
    curve = await measure(Machine(), 1000, [0, 64, 128], seconds=60)
    assert curve.new_tokens.tolist() == sorted(NEW_TOKENS)
    for new, cached in product(NEW_TOKENS, (0, 64, 128)):
        assert float(curve.predict(new, cached)) == cost(new, cached)


async def test_without_time_the_shape_of_the_curve_is_measured_once() -> None:
    machine = Machine()
    curve = await measure(machine, 1000, [0], seconds=0)
    assert machine.passes == [(1, 0), (64, 0)]
    assert curve.new_tokens.tolist() == [1, 64]


async def test_no_pass_is_larger_than_the_model_can_read() -> None:
    machine = Machine()
    await measure(machine, 16, [0], seconds=60)
    assert {new for new, _ in machine.passes} == {1, 4, 16}


@given(curves())
def test_cost_curve_survives_the_wire(curve: CostCurve) -> None:
    received = wire.cost_curve(wire.to_cost_curve(curve), "cost_curve")
    for name in ("new_tokens", "cached_tokens"):
        np.testing.assert_array_equal(getattr(received, name), getattr(curve, name))
    np.testing.assert_allclose(received.forward_ns, curve.forward_ns, rtol=1e-12)  # it travels in milliseconds


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"new_tokens": [], "forward_ms": []}, "new_tokens: must be ascending"),
        ({"new_tokens": [4, 1]}, "new_tokens: must be ascending"),
        ({"new_tokens": [0, 4]}, "new_tokens: must be ascending and begin with at least 1"),
        ({"cached_tokens": [-1]}, "cached_tokens: must be ascending and begin with at least 0"),
        ({"forward_ms": [1.0]}, "cannot reshape"),
        ({"forward_ms": [1.0, float("nan")]}, "finite and above 0"),
        ({"forward_ms": [0.0, 1.0]}, "finite and above 0"),
        ({"forward_ms": [2.0, 1.0]}, "must not fall"),
    ],
)
def test_invalid_curve_is_refused(change: dict[str, Any], problem: str) -> None:
    message = wire.to_cost_curve(CostCurve.smoothed([1, 4], [0], np.array([[1.0], [2.0]])))
    for name, values in change.items():
        getattr(message, name).CopyFrom(wire.to_array(np.asarray(values, "float64" if name[0] == "f" else "int64")))
    with pytest.raises(InvalidArgumentError, match=problem) as refusal:
        wire.cost_curve(message, "cost_curve")
    assert str(refusal.value).startswith("cost_curve")
