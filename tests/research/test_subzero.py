"""`research.subzero`: a step equals the dense formula, its mean is the projected gradient, and a quadratic descends."""

from __future__ import annotations

import torch
from torch import Tensor

from research.subzero import SUBSPACE, SubZero


def _matrix(seed: int, rows: int = 7, columns: int = 5) -> Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def _subspace(optimizer: SubZero, weights: Tensor) -> tuple[Tensor, Tensor]:
    left, right = (optimizer.state[weights][name] for name in SUBSPACE)
    return left, right


def test_a_step_equals_the_dense_formula() -> None:
    torch.set_default_dtype(torch.float64)
    try:
        weights, bias = _matrix(1), _matrix(2)[:, 0].clone()
        before, shift = weights.clone(), bias.clone()
        target = _matrix(3)

        def loss() -> float:
            return float((weights - target).square().sum() + (bias - 1).pow(4).sum())

        optimizer = SubZero([weights, bias], lr=0.01, scale=0.1, rank=2, seed=5)
        returned = optimizer.step(loss)
        left, right = _subspace(optimizer, weights)
        generator = torch.Generator().manual_seed(5)
        dense = left @ torch.randn(2, 2, generator=generator) @ right.T * (35**0.5 / 2)
        noise = torch.randn(7, generator=generator)
        found = []
        for sign in (1, -1):
            weights.copy_(before + sign * 0.1 * dense)
            bias.copy_(shift + sign * 0.1 * noise)
            found.append(loss())
        slope = (found[0] - found[1]) / 0.2
        again, moved = before.clone(), shift.clone()
        fresh = SubZero([again, moved], lr=0.01, scale=0.1, rank=2, seed=5)
        fresh.step(lambda: float((again - target).square().sum() + (moved - 1).pow(4).sum()))
        torch.testing.assert_close(again, before - 0.01 * slope * dense)
        torch.testing.assert_close(moved, shift - 0.01 * slope * noise)
        assert abs(returned - sum(found) / 2) < 1e-9
    finally:
        torch.set_default_dtype(torch.float32)


def test_mean_estimate_is_the_gradient_projected_onto_the_subspace() -> None:
    gradient = _matrix(4).float()
    weights = torch.zeros(7, 5)
    optimizer = SubZero([weights], lr=1.0, scale=0.5, rank=2, refresh=10**6)
    total, steps = torch.zeros(7, 5), 6000
    for _ in range(steps):
        weights.zero_()
        optimizer.step(lambda: float((gradient * weights).sum()))  # linear, so the slope is exact
        total -= weights
    left, right = _subspace(optimizer, weights)
    expected = left @ left.T @ gradient @ right @ right.T * 35 / 4  # Z has 4 values, and P the length of 35
    # The mean of 6,000 products of normal values strays by 2 % to 3 %.
    assert (total / steps - expected).norm() < 0.08 * expected.norm()


def test_subspaces_are_orthonormal_and_change_every_few_steps() -> None:
    weights, vector, small = torch.zeros(40, 30), torch.zeros(9), torch.zeros(3, 50)
    optimizer = SubZero([weights, vector, small], lr=0.0, rank=8, refresh=3)
    drawn = []
    for _ in range(7):
        optimizer.step(lambda: 1.0)
        drawn.append(_subspace(optimizer, weights))
    for left, right in drawn:
        torch.testing.assert_close(left.T @ left, torch.eye(8))
        torch.testing.assert_close(right.T @ right, torch.eye(8))
    assert drawn[0][0] is drawn[2][0]
    assert not torch.allclose(drawn[2][0], drawn[3][0])
    assert not torch.allclose(drawn[3][0], drawn[6][0])
    assert [each.shape[1] for each in _subspace(optimizer, small)] == [3, 3]
    assert vector not in optimizer.state  # no noise is kept
    assert (
        max(float(each.abs().max()) for each in (weights, vector, small)) < 1e-6
    )  # a step comes back but for rounding


def test_a_quadratic_descends() -> None:
    weights, target = torch.zeros(12, 10), _matrix(6, 12, 10).float()

    def loss() -> float:
        return float((weights - target).square().mean())

    optimizer = SubZero([weights], lr=0.2, rank=4, refresh=20)
    begun = loss()
    for _ in range(600):
        optimizer.step(loss)
    assert loss() < 0.1 * begun
