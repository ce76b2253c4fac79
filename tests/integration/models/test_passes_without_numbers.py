"""Passes that give no numbers: which trees they concern, what is kept of them, and whether plain passes still work."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import replace

import numpy as np
import pytest

from atspeed.engine.arrays import Int64
from atspeed.engine.bundle.bundle import Bundle
from atspeed.engine.errors import NoNumbersError
from atspeed.engine.model.batcher import BatchLimits
from atspeed.engine.model.plain_passes import check_plain_passes
from atspeed.engine.model.tree_evaluator import TreeEvaluator
from atspeed.engine.model.tree_session import Selection
from atspeed.engine.search.scoring import Evaluation, ScoringRule
from atspeed.engine.search.trie import ROOT, Pruning
from tests.bundles import BOS, EOH, write_bundle
from tests.catalogues import random_catalogue
from tests.corrupt_models import corrupt
from tests.oracles.models import DictStore, Models
from tests.oracles.naive_trie import NaiveTrie
from tests.oracles.worlds import World

EVERYTHING = Selection(Pruning.none(), limit=100)
PAD = 0
HOUR = 3600.0
WORLD = NaiveTrie({"a": (0, 0), "b": (0, 1), "c": (1, 0), "d": (2, 1)}, (3, 2))


@pytest.fixture(scope="module", params=ScoringRule)
def whole(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Models:
    catalogue = random_catalogue(40, (6, 5, 4), seed=2)
    return Models.load(write_bundle(tmp_path_factory.mktemp("whole"), catalogue, rule=request.param))


def damaged(tmp_path_factory: pytest.TempPathFactory, rule: ScoringRule, tokens: Sequence[int]) -> Models:
    made = write_bundle(tmp_path_factory.mktemp("damaged"), random_catalogue(40, (6, 5, 4), seed=2), rule=rule)
    corrupt(made.root, "target", tokens)
    return Models.load(replace(made, bundle=Bundle(made.root)))


@pytest.fixture(scope="module")
def corrupted(whole: Models, tmp_path_factory: pytest.TempPathFactory) -> Models:
    """With one code of the first level that is NaN, and the token that nothing is made of but padding."""
    return damaged(tmp_path_factory, whole.rule, [PAD, token_of(whole, 2)])


def token_of(models: Models, node: int) -> int:
    return models.bundle.bundle.manifest.target.code_tokens[int(models.catalogue.trie.column(np.array([node]))[0])]


@asynccontextmanager
async def opened(models: Models, store: DictStore | None = None, requests: int = 1) -> AsyncIterator[TreeEvaluator]:
    """Exactly so many passes run together."""
    limits = BatchLimits(requests=requests, tokens=100_000, delay_seconds=HOUR if requests > 1 else 0, padding=1e9)
    evaluator = models.evaluator("target", memory_blocks=100, tier=store, limits=limits)
    yield evaluator
    assert (evaluator.queued_passes, evaluator.open_kv.used_bytes) == (0, 0)
    await evaluator.close()


async def evaluate(evaluator: TreeEvaluator, prompt: Int64, nodes: Sequence[int]) -> Evaluation:
    tree = await evaluator.open(prompt)
    try:
        found, _ = await evaluator.evaluate(tree, np.array(nodes), EVERYTHING)
    finally:
        evaluator.end(tree)
    return found


def valid_prompt(models: Models, seed: int = 0) -> Int64:
    """The prompt of a history without the corrupt code."""
    prompts = (models.prompt(3, seed=number) for number in range(seed * 100, (seed + 1) * 100))
    return next(prompt for prompt in prompts if token_of(models, 2) not in prompt)


async def test_a_pass_that_reads_a_corrupt_code_has_no_numbers_and_others_do(whole: Models, corrupted: Models) -> None:
    prompt = valid_prompt(corrupted)
    async with opened(corrupted) as evaluator, opened(whole) as expected:
        with pytest.raises(NoNumbersError, match="evaluation: some of 2 nodes"):
            await evaluate(evaluator, prompt, [ROOT, 2])
        found, right = await evaluate(evaluator, prompt, [ROOT, 1, 3]), await evaluate(expected, prompt, [ROOT, 1, 3])
        np.testing.assert_array_equal(found.child, right.child)
        np.testing.assert_array_equal(found.logp, right.logp)


async def test_what_an_invalid_pass_computed_of_the_prompt_is_in_no_cache(whole: Models, corrupted: Models) -> None:
    """It once was: from then on no pass of that user had numbers, planned or not."""
    prompt, store = valid_prompt(corrupted), DictStore()
    async with opened(corrupted, store) as evaluator:
        with pytest.raises(NoNumbersError):
            await evaluate(evaluator, prompt, [ROOT, 2])
        tree = await evaluator.open(prompt)
        assert tree.lookup_stats.cached_tokens_by_tier["memory"] == 0
        await asyncio.sleep(0)  # as long as the store needs to be written
        assert store.blocks == {}
        await evaluate(evaluator, prompt, [ROOT, 1])
        await evaluate(evaluator, prompt, [ROOT, 1])
    assert all(np.isfinite(block).all() for block in store.blocks.values())
    assert store.blocks


async def test_what_shares_a_pass_with_an_invalid_one_is_judged_by_itself(corrupted: Models) -> None:
    """Prompts may differ in length, so both kinds have padding, which is made of tokens of the tree itself."""
    prompts = [valid_prompt(corrupted, seed) for seed in range(3)]
    nodes = [[ROOT, 1, 3, 4], [ROOT, 2], [ROOT]]
    async with opened(corrupted) as evaluator:
        alone = [await evaluate(evaluator, prompts[row], nodes[row]) for row in (0, 2)]
    async with opened(corrupted, requests=3) as evaluator:
        asked = [evaluate(evaluator, prompt, some) for prompt, some in zip(prompts, nodes, strict=True)]
        first, invalid, last = await asyncio.gather(*asked, return_exceptions=True)
    assert isinstance(invalid, NoNumbersError)
    for found, right in zip((first, last), alone, strict=True):
        assert isinstance(found, Evaluation), found
        np.testing.assert_array_equal(found.child, right.child)
        np.testing.assert_allclose(found.logp, right.logp, rtol=5e-5, atol=5e-5)


async def test_plain_passes_work_beside_a_corrupt_code_and_its_cost_is_measured(corrupted: Models) -> None:
    async with opened(corrupted) as evaluator:
        await evaluator.warm_up()
        await check_plain_passes(evaluator)
        curve = await evaluator.cost_curve(0)
        assert (curve.forward_ns > 0).all()


@pytest.mark.parametrize("what", ["first of a prompt", "last of a prompt", 0, 1], ids=str)
async def test_plain_passes_fail_where_no_search_ends(
    whole: Models, tmp_path_factory: pytest.TempPathFactory, what: str | int
) -> None:
    trie, tokens = whole.catalogue.trie, whole.bundle.bundle.manifest.target.code_tokens
    of_prompts = {"first of a prompt": [BOS], "last of a prompt": [EOH]}
    level = 0 if isinstance(what, str) else what
    codes = tokens[int(trie.codebook_offset[level]) :][: trie.codebook_sizes[level]]
    damage = of_prompts[what] if isinstance(what, str) else codes
    async with opened(damaged(tmp_path_factory, whole.rule, damage)) as evaluator:
        await evaluator.warm_up()
        with pytest.raises(NoNumbersError):
            await check_plain_passes(evaluator)


@pytest.mark.parametrize("rule", ScoringRule)
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("limit", [1, 3])
def test_logits_that_are_no_numbers_are_no_evaluation(rule: ScoringRule, value: float, limit: int) -> None:
    """A whole row has no numbers, as attention spreads them, and any nodes are pruned."""
    world = World.random(WORLD, rule, seed=1)
    logits, log_normalizer = world.logits.copy(), world.log_normalizer.copy()
    logits[ROOT] = log_normalizer[ROOT] = value
    broken = replace(world, logits=logits, log_normalizer=log_normalizer)
    with np.errstate(all="raise"), pytest.raises(NoNumbersError):
        broken.evaluate(np.array([ROOT, 1]), Pruning.none(), limit)


@pytest.mark.parametrize("rule", ScoringRule)
def test_a_code_that_is_ruled_out_by_its_logit_is_no_child_of_a_list(rule: ScoringRule) -> None:
    """Pruned it may be, as its siblings have numbers; live it has none that a list could hold."""
    world = World.random(WORLD, rule, seed=1)
    logits = world.logits.copy()
    logits[ROOT, 2] = -np.inf
    masked, root = replace(world, logits=logits), np.array([ROOT])
    with pytest.raises(NoNumbersError):
        masked.evaluate(root, Pruning.none(), 1)
    found = masked.evaluate(root, world.pruning(["d"]), 3)
    assert len(found.child) == 2
    assert np.isfinite(found.logp).all()
