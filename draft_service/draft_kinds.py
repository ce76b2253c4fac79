"""Kinds of drafts: the drafter of each kind that a bundle may name."""

from __future__ import annotations

from collections.abc import Callable

from atspeed.engine.bundle.manifest import LANGUAGE_MODEL, LEVEL_HEADS, MANIFEST
from atspeed.engine.errors import BundleError
from atspeed.engine.model.cost_curve import CostCurve
from atspeed.engine.model.tree_evaluator import TreeEvaluator
from draft_service.drafter import Drafter
from draft_service.language_model_drafter import LanguageModelDrafter
from draft_service.level_heads_drafter import LevelHeadsDrafter

MakeDrafter = Callable[[TreeEvaluator], Drafter]
DRAFTERS: dict[str, MakeDrafter] = {LANGUAGE_MODEL: LanguageModelDrafter, LEVEL_HEADS: LevelHeadsDrafter}


def drafter_of(evaluator: TreeEvaluator) -> Drafter:
    """Make the drafter of a bundle's draft. Raises BundleError when the bundle names an unknown kind."""
    kind = evaluator.entry.draft_kind
    if kind not in DRAFTERS:
        raise BundleError(f"{MANIFEST}: draft.draft_kind: {kind} is unknown; known are {', '.join(DRAFTERS)}")
    return DRAFTERS[kind](evaluator)


def make_drafter(evaluator: TreeEvaluator, _curve: CostCurve) -> Drafter:
    """Make the drafter of a hosted draft, as `drafter_of` does."""
    return drafter_of(evaluator)
