"""The models' cost curves are asked for until they are known, and again from time to time."""

from __future__ import annotations

import asyncio

import pytest

from atspeed.engine.model.cost_curve import CostCurve
from atspeed.engine.search.scoring import Perturbation
from orchestrator.planning import curve_refresh
from tests.oracles.simulation import (
    DEAR,
    FLAT,
    STEEP,
)

NOISE = Perturbation(seed=5, temperature=0.8)
USELESS = 30.0


class Measured:
    """A model service that says what its passes cost, but for the times that something goes wrong."""

    def __init__(self, *answers: CostCurve | Exception) -> None:
        self._answers = list(answers)

    async def cost_curve(self) -> CostCurve:
        """The next answer; the last one again and again."""
        answer = self._answers.pop(0) if len(self._answers) > 1 else self._answers[0]
        if isinstance(answer, Exception):
            raise answer
        return answer


def test_curves_are_asked_for_again_whatever_went_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(curve_refresh, "_FIRST_PAUSE_SECONDS", 0)
    monkeypatch.setattr(curve_refresh, "_REFRESH_SECONDS", 0)
    measured: list[CostCurve] = []
    enough = asyncio.Event()

    class ProposedPlan:
        def measure_by(self, target: CostCurve, draft: CostCurve) -> None:
            measured.append(target)
            if len(measured) == 3:
                enough.set()

    async def learn() -> None:
        learning = asyncio.create_task(
            curve_refresh.learn_curves(
                ProposedPlan(),  # type: ignore[arg-type]
                Measured(ValueError("odd"), STEEP.target, RuntimeError("odder"), DEAR.target, FLAT.target),
                Measured(FLAT.draft),
            )
        )
        await enough.wait()
        learning.cancel()

    asyncio.run(learn())
    assert measured[:3] == [STEEP.target, DEAR.target, FLAT.target]
