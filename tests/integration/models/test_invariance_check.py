"""The check of plan invariance at a target's load: what it finds is said with every pass."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from atspeed.engine.model.tree_session import Selection
from atspeed.engine.search.trie import ROOT, Pruning
from tests.bundles import write_bundle
from tests.catalogues import random_catalogue
from tests.oracles.models import Models


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Models:
    catalogue = random_catalogue(60, (6, 5, 4, 3), seed=5)
    return Models.load(write_bundle(tmp_path_factory.mktemp("bundle"), catalogue, max_items=8, drop_block=4))


async def unordered_passes(models: Models, evaluator: Any) -> int:
    """The count in the stats of one pass."""
    tree = await evaluator.open(models.bundle.bundle.manifest.target.prompt.tokens([]))
    try:
        _, cost = await evaluator.evaluate(tree, np.array([ROOT]), Selection(Pruning.none(), limit=10))
    finally:
        evaluator.end(tree)
    return int(cost.unordered_passes)


async def test_a_target_keeps_its_promise_on_this_machine(models: Models) -> None:
    evaluator = models.evaluator("target")
    found = await evaluator.check_plan_invariance()
    assert found.none
    assert found.nodes > found.trees > 0
    assert evaluator.plan_invariant
    assert await unordered_passes(models, evaluator) == 0
    await evaluator.close()


async def test_kernels_whose_bits_depend_on_the_pass_are_found_and_said(
    models: Models, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By one bit of a logit, in passes of more than one token."""
    evaluator = models.evaluator("target")
    decoder: Any = evaluator.decoder
    run = decoder.run_batch

    def moving(tokens: Any, *others: Any) -> Any:
        logits, normalizer = run(tokens, *others)
        return (np.nextafter(logits, np.float32(9)) if tokens.shape[1] > 1 else logits), normalizer

    monkeypatch.setattr(decoder, "run_batch", moving)
    found = await evaluator.check_plan_invariance()
    assert 0 < found.moved <= found.nodes
    assert not evaluator.plan_invariant
    assert await unordered_passes(models, evaluator) == 1
    await evaluator.close()
