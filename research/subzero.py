"""SubZero: gradient-free steps in random low-rank subspaces of every weight matrix.

Yu et al. 2024, arXiv 2410.08989. A step compares the losses above and below the weights along one random direction, and moves
against their difference. No gradient is computed, so no activation is kept.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor

SUBSPACE = ("left", "right")  # the keys of a matrix's state


class SubZero(torch.optim.Optimizer):
    """Optimizer whose `step` takes a function that returns the loss at the present weights.

    A matrix W [m, n] moves along P = sqrt(m n) / r * U Z V', with orthonormal U [m, r] and V [n, r] and normal Z [r, r]. So P is
    as long as a dense normal matrix. Other parameters move along normal values. Z is drawn again from the step's seed each time
    it is needed. With s = (loss(W + scale P) - loss(W - scale P)) / (2 scale), a step is W <- W - lr s P.

    Args:
        parameters: the weights. They change during a step, and rounding moves them by about 1e-7 of their size.
        lr: the learning rate.
        scale: the size of the perturbation.
        rank: r; a smaller side of the matrix limits it.
        refresh: steps between two draws of U and V.
        seed: the seed of everything random.
    """

    def __init__(
        self,
        parameters: Iterable[Tensor],
        lr: float,
        *,
        scale: float = 1e-3,
        rank: int = 24,
        refresh: int = 500,
        seed: int = 0,
    ) -> None:
        super().__init__(parameters, {"lr": lr})
        self._scale, self._rank, self._refresh, self._seed = scale, rank, refresh, seed
        self._steps = 0

    @torch.no_grad()
    def step(self, closure: Callable[[], float]) -> float:  # type: ignore[override] # a loss is always needed
        """Make one step. Returns the mean of the two losses."""
        if self._steps % self._refresh == 0:
            self._draw_subspaces()
        self._move(self._scale)
        above = float(closure())
        self._move(-2 * self._scale)
        below = float(closure())
        slope = (above - below) / (2 * self._scale)
        for group in self.param_groups:
            self._move_group(group["params"], self._scale - group["lr"] * slope)
        self._steps += 1
        return (above + below) / 2

    def _draw_subspaces(self) -> None:
        generator = torch.Generator().manual_seed(self._seed - 1 - self._steps)
        for group in self.param_groups:
            for weights in (each for each in group["params"] if each.ndim == 2):
                rank = min(self._rank, *weights.shape)
                for name, side in zip(SUBSPACE, weights.shape, strict=True):
                    drawn = torch.randn(side, rank, generator=generator)
                    self.state[weights][name] = torch.linalg.qr(drawn).Q

    def _move(self, amount: float) -> None:
        for group in self.param_groups:
            self._move_group(group["params"], amount)

    def _move_group(self, parameters: Iterable[Tensor], amount: float) -> None:
        """Move the weights by `amount` along the direction of this step."""
        generator = torch.Generator().manual_seed(self._seed + self._steps)
        for weights in parameters:
            if weights.ndim == 2:
                left, right = (self.state[weights][name] for name in SUBSPACE)
                rank = left.shape[1]
                drawn = torch.randn(rank, rank, generator=generator)
                length = weights.numel() ** 0.5 / rank
                weights.addmm_(left @ drawn, right.T, alpha=amount * length)  # P is never held
            else:
                weights.add_(torch.randn(weights.shape, generator=generator), alpha=amount)
