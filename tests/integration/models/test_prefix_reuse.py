"""A history that grows item by item, draft and target alike: what of its prompt is computed anew."""

from __future__ import annotations

import numpy as np
import pytest

from atspeed.engine.arrays import Int64
from atspeed.engine.bundle.manifest import Role
from atspeed.engine.model.tree_evaluator import TreeEvaluator
from atspeed.engine.model.tree_session import Selection
from atspeed.engine.search.scoring import Evaluation
from atspeed.engine.search.trie import ROOT, Pruning
from tests.bundles import write_bundle
from tests.catalogues import random_catalogue
from tests.oracles.models import BLOCK_TOKENS, Models

MAX_ITEMS, DROP_BLOCK, LEVELS, EVENTS = 8, 4, BLOCK_TOKENS, 30
ROLES: tuple[Role, ...] = ("draft", "target")


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Models:
    """Items of as many codes as a block has tokens, as services choose their blocks."""
    catalogue = random_catalogue(60, (6, 5, 4, 3), seed=5)
    root = tmp_path_factory.mktemp("bundle")
    return Models.load(write_bundle(root, catalogue, max_items=MAX_ITEMS, drop_block=DROP_BLOCK))


def window(models: Models, role: Role, items: int) -> int:
    return models.bundle.bundle.manifest.models[role].prompt.window_start(items)


def prompt(models: Models, role: Role, history: Int64) -> Int64:
    entry = models.bundle.bundle.manifest.models[role]
    kept = history[entry.prompt.window_start(len(history)) :]
    columns = models.catalogue.codes[kept] + models.catalogue.trie.codebook_offset
    return entry.prompt.tokens(list(np.array(entry.code_tokens)[columns]))


async def root_of(evaluator: TreeEvaluator, tokens: Int64) -> tuple[Evaluation, int]:
    """The root's evaluation, and the prompt tokens that were found."""
    tree = await evaluator.open(tokens)
    evaluation, cost = await evaluator.evaluate(tree, np.array([ROOT]), Selection(Pruning.none(), limit=10))
    assert cost.new_tokens + cost.cached_tokens_by_tier["memory"] == len(tokens)
    return evaluation, cost.cached_tokens_by_tier["memory"]


@pytest.mark.parametrize("role", ROLES)
async def test_only_the_new_item_is_computed_while_the_window_stands(models: Models, role: Role) -> None:
    """It is computed with the tokens before the first item and after the last; and all of it once in `drop_block` events."""
    history = np.random.default_rng(6).integers(0, models.catalogue.items, EVENTS)
    warm, cold = models.evaluator(role, memory_blocks=1000), models.evaluator(role)
    template = models.bundle.bundle.manifest.models[role].prompt
    around = len(template.prefix) + len(template.suffix)
    moved = 0
    for items in range(1, EVENTS + 1):
        tokens = prompt(models, role, history[:items])
        evaluation, found = await root_of(warm, tokens)
        expected, nothing = await root_of(cold, tokens)
        assert nothing == 0
        np.testing.assert_allclose(evaluation.logp, expected.logp, atol=1e-4)
        if items > 1 and window(models, role, items) == window(models, role, items - 1):
            assert len(tokens) - found <= LEVELS + around
        else:
            moved += 1
    assert moved == 1 + -(-(EVENTS - MAX_ITEMS) // DROP_BLOCK)
    await warm.close()
    await cold.close()
