"""Losses of drafts, each at the best setting of its grid: passes of test users.

The comparison file names the losses and their grids (atspeed/training/comparison.py). Settings are chosen on validation users
with one seed. The drafts of the chosen settings, several seeds each, are counted on test users. Finished drafts and counts are
kept, so the command resumes where it was stopped.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from atspeed.benchmarks.results import Columns
from atspeed.engine.bundle.bundle import Bundle
from atspeed.engine.search.mode import Mode
from atspeed.training.compared_drafts import Candidate
from atspeed.training.comparison import Comparison
from research import kept_counts
from research.acceptance import AcceptanceConfig, AcceptanceRow, parse_budget
from research.eval_examples import HeldOutCase

NAME = "losses"
WIDTHS = (10, 20)
BUDGETS = ("40/level", "120/all", "240/all")
MODES = (Mode.STRICT, Mode.RELAXED_SAMPLING)  # AtSpeed-R is made for the latter


@dataclass(frozen=True)
class SettingRow:
    """One setting of a loss, measured on validation users.

    Attributes:
        loss: the name of the loss.
        setting: its values, spelled.
        accepted: mean number of leading levels that the draft's nodes hold whole, of the best epoch.
        covered: share of the target's beams that they hold.
        chosen: whether it is the best of its loss.
    """

    loss: str
    setting: str
    accepted: float
    covered: float
    chosen: bool


COLUMNS: Columns[SettingRow] = (
    ("loss", lambda row: row.loss),
    ("setting", lambda row: row.setting),
    ("accepted levels", lambda row: f"{row.accepted:.3f}"),
    ("covered", lambda row: f"{row.covered:.1%}"),
    ("chosen", lambda row: "yes" if row.chosen else ""),
)


def setting_rows(candidates: Sequence[Candidate]) -> list[SettingRow]:
    """Return the rows of all settings that were tried, in the order of the file."""
    return [
        SettingRow(each.loss, spelled(each.setting), round(each.accepted, 6), round(each.covered, 6), each.chosen)
        for each in candidates
    ]


def spelled(setting: Mapping[str, str | float]) -> str:
    """Spell a setting: `weight 0.7, prefixes draft`."""
    return ", ".join(f"{key} {value}" for key, value in setting.items())


def count_passes(
    bundles: Mapping[str, Bundle], cases: Sequence[HeldOutCase], *, seed: int, workers: int, threads: int
) -> list[AcceptanceRow]:
    """Count target passes of each chosen draft, or read what an earlier run has counted."""
    budgets = [parse_budget(label) for label in BUDGETS]
    asked = AcceptanceConfig(budgets, WIDTHS, MODES, seed=seed, workers=workers, threads=threads)
    return kept_counts.count(bundles, cases, asked, study=NAME)


def header(plan: Comparison, *, data: str, users: int) -> dict[str, Any]:
    """Return the header's fields. The training is the same for all drafts of the plan."""
    draft = plan.variants[0].recipe.draft
    training = {}
    if draft is not None and draft.alignment is not None:
        schedule = draft.schedule
        training = {"prompts": draft.alignment.prompts, "epochs": schedule.epochs, "batch size": schedule.batch_size}
    seeds = len({variant.seed for variant in plan.variants})
    return {
        "benchmark": NAME,
        "recipe": plan.base.name,
        "data": data,
        "users": users,
        "seeds": seeds,
        "training": training,
    }
