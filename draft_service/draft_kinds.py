"""Kinds of drafts: the drafter of each kind that a bundle may name."""

from __future__ import annotations

from collections.abc import Callable

from atspeed.engine.bundle.manifest import LANGUAGE_MODEL, MANIFEST
from atspeed.engine.errors import BundleError
from atspeed.engine.model.cost_curve import CostCurve
from atspeed.engine.model.tree_evaluator import TreeEvaluator
from draft_service.drafter import Drafter, LanguageModelDrafter

MakeDrafter = Callable[[TreeEvaluator], Drafter]
DRAFTERS: dict[str, MakeDrafter] = {LANGUAGE_MODEL: LanguageModelDrafter}


def make_drafter(evaluator: TreeEvaluator, _curve: CostCurve) -> Drafter:
    """Make the drafter of a bundle's draft. Raises BundleError when the bundle names an unknown kind."""
    kind = evaluator.entry.draft_kind
    if kind not in DRAFTERS:
        raise BundleError(f"{MANIFEST}: draft.draft_kind: {kind} is unknown; known are {', '.join(DRAFTERS)}")
    return DRAFTERS[kind](evaluator)
