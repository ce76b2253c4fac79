"""Trees that searches share."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from atspeed.engine.model.tree_session import Selection
from atspeed.engine.search.scoring import Perturbation
from atspeed.engine.search.trie import ROOT, Pruning
from research.shared_tree_models import SharedTreeEvaluator, load_decoder_of, prefix_cache, shared_evaluator
from tests.bundles import write_bundle
from tests.catalogues import random_catalogue
from tests.oracles.models import Models


async def test_shared_tree_refuses_unsupported_requests(tmp_path: Path) -> None:
    """Another prompt's tree, exclusions, another temperature; and it computes no node twice."""
    models = Models.load(write_bundle(tmp_path, random_catalogue(80, (6, 5, 4, 4), seed=4)))
    bundle = models.bundle.bundle
    entry, everything = bundle.manifest.target, Selection(Pruning.none(), 10)
    decoder = load_decoder_of(bundle, "target", 1)
    warm: SharedTreeEvaluator = shared_evaluator(decoder, entry, models.catalogue, models.rule, prefix_cache(entry))
    root = np.array([ROOT])
    tree = await warm.open(models.prompt(3, seed=1))
    _, first = await warm.evaluate(tree, root, everything)
    _, second = await warm.evaluate(tree, root, replace(everything, limit=2))
    assert (first.new_tokens > 0, second.new_tokens) == (True, 0)
    assert await warm.open(models.prompt(3, seed=1)) is tree
    for selection in (
        replace(everything, pruning=models.catalogue.pruning(excluded=np.arange(40))),
        replace(everything, perturbation=Perturbation(1, 0.5)),
    ):
        with pytest.raises(ValueError, match="shared tree"):
            await warm.evaluate(tree, root, selection)
    assert await warm.open(models.prompt(3, seed=2)) is not tree
    with pytest.raises(ValueError, match="one prompt"):
        await warm.evaluate(tree, root, everything)
    await warm.close()
