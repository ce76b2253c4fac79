"""The drafter of a bundle's draft kind."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, cast

import pytest

from atspeed.engine.bundle.manifest import LANGUAGE_MODEL
from atspeed.engine.errors import BundleError
from atspeed.engine.model.tree_evaluator import TreeEvaluator
from draft_service.draft_kinds import DRAFTERS, make_drafter
from draft_service.drafter import Drafted, DraftRequest

CURVE: Any = None


class Silent:
    """A drafter that never proposes a node."""

    def __init__(self, evaluator: TreeEvaluator) -> None:
        self.evaluator = evaluator

    async def plan(self, request: DraftRequest) -> Drafted:
        raise NotImplementedError


def evaluator(kind: str) -> TreeEvaluator:
    return cast("TreeEvaluator", SimpleNamespace(entry=SimpleNamespace(draft_kind=kind)))


def test_registered_kind_makes_the_drafter(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(DRAFTERS, "silent", Silent)
    asked = evaluator("silent")
    made = make_drafter(asked, CURVE)
    assert isinstance(made, Silent)
    assert made.evaluator is asked


def test_unknown_kind_names_the_field_and_the_known_ones() -> None:
    with pytest.raises(BundleError, match=rf"draft\.draft_kind: oracle is unknown; known are {LANGUAGE_MODEL}"):
        make_drafter(evaluator("oracle"), CURVE)
