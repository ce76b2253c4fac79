"""Recipes that train in seconds, made of runs/tiny.toml, and which models a training run fits."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from atspeed.training.recipe import ModelRecipe, read_recipe
from atspeed.training.trainer import FitState, Trainer

RUNS = Path(__file__).parents[1] / "runs"
TINY = read_recipe(RUNS / "tiny.toml")


def short_recipe(more: str = "", *, users: int = 40, target_epochs: int = 2, draft_epochs: int = 2) -> str:
    """The text of runs/tiny.toml on fewer users and epochs. more: sections that follow it."""
    text = re.sub("(?m)^users = .*$", f"users = {users}", (RUNS / "tiny.toml").read_text())
    for role, epochs in (("target", target_epochs), ("draft", draft_epochs)):
        text = re.sub(rf"(\[{role}\.schedule\]\nepochs = )\d+", rf"\g<1>{epochs}", text)
    return f"evaluation_users = 20\n{text}\n{more}"


def with_epochs(part: ModelRecipe, epochs: int) -> ModelRecipe:
    """A model that is trained so long."""
    return part.model_copy(update={"schedule": part.schedule.model_copy(update={"epochs": epochs})})


def fitted_titles(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Titles of the models that are trained from now on, in their order."""
    fitted: list[str] = []
    fit = Trainer.fit

    def noted(trainer: Trainer[Any]) -> FitState:
        fitted.append(trainer.title)
        return fit(trainer)

    monkeypatch.setattr(Trainer, "fit", noted)
    return fitted
