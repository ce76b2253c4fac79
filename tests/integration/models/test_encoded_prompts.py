"""Prompts that an encoder reads: only a whole prompt is cached, and what is cached changes no result."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from unittest.mock import patch

import numpy as np
import pytest

from atspeed.engine.arrays import Int64, KvArray
from atspeed.engine.errors import BundleError, NoNumbersError
from atspeed.engine.kv.memory_cache import NO_USER_KEY, user_key_of
from atspeed.engine.kv.tier import KvTier
from atspeed.engine.model.batcher import BatchLimits
from atspeed.engine.model.decoder import Decoder, RuntimeOptions
from atspeed.engine.model.encoder_decoder import ENCODER_FILE, EncoderDecoder
from atspeed.engine.model.prompt_kv import prompt_kv
from atspeed.engine.model.tree_evaluator import TreeEvaluator
from atspeed.engine.model.tree_session import Selection
from atspeed.engine.search.scoring import Children
from atspeed.engine.search.trie import ROOT, Pruning
from atspeed.training.export import export_decoder
from tests.bundles import random_model, write_bundle
from tests.catalogues import random_catalogue
from tests.oracles.models import BLOCK_TOKENS, DictStore, Models

EVERYTHING = Selection(Pruning.none(), limit=100)
USER, STRANGER = b"u" * 8, b"s" * 8
TOLERANCE = 5e-5


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Models:
    catalogue = random_catalogue(40, (6, 5, 4), seed=2)
    return Models.load(write_bundle(tmp_path_factory.mktemp("bundle"), catalogue, architecture="t5"))


@asynccontextmanager
async def opened(models: Models, memory_blocks: int = 0, tier: KvTier | None = None) -> AsyncIterator[TreeEvaluator]:
    evaluator = models.evaluator("target", memory_blocks=memory_blocks, tier=tier)
    yield evaluator
    await evaluator.close()


async def evaluate(
    evaluator: TreeEvaluator, prompt: Int64, nodes: list[int], user_key: bytes = NO_USER_KEY
) -> tuple[dict[int, Children], dict[str, int], int]:
    """The nodes, the cached tokens by tier, and the computed ones."""
    tree = await evaluator.open(prompt, user_key=user_key)
    found, cost = await evaluator.evaluate(tree, np.array(nodes), EVERYTHING)
    evaluator.end(tree)
    return dict(found.items()), dict(cost.cached_tokens_by_tier), cost.new_tokens


def assert_same(found: dict[int, Children], expected: dict[int, Children]) -> None:
    assert found.keys() == expected.keys()
    for node, children in found.items():
        np.testing.assert_array_equal(children.node, expected[node].node)
        np.testing.assert_allclose(children.logp, expected[node].logp, atol=TOLERANCE)


@pytest.mark.parametrize("items", range(1, 9))
async def test_a_prompt_of_any_length_is_found_whole(models: Models, items: int) -> None:
    """Its last block is seldom full. In memory; in the tier below; and in both, of which neither has all."""
    prompt, nodes, store = models.prompt(items, seed=items), models.naive.inner(), DictStore()
    step = BLOCK_TOKENS
    blocks = -(-len(prompt) // step)
    async with opened(models) as cold:
        expected, nothing, computed = await evaluate(cold, prompt, nodes)
    # The encoder's tokens, the decoder's first one, and one for each node but the root.
    assert (sum(nothing.values()), computed) == (0, len(prompt) + len(nodes))
    async with opened(models, 100, store) as warm:
        await evaluate(warm, prompt, [ROOT])
        found, cached, computed = await evaluate(warm, prompt, nodes)
    assert_same(found, expected)
    assert (cached["memory"], computed) == (len(prompt), len(nodes))
    assert len(store.blocks) == blocks
    for kept in {0, 1, blocks - 1}:  # blocks that memory has room for
        async with opened(models, kept, store) as narrow:
            await evaluate(narrow, prompt, [ROOT])
            found, cached, computed = await evaluate(narrow, prompt, nodes)
        assert_same(found, expected)
        assert cached == {"memory": kept * step, store.name: len(prompt) - kept * step}
        assert computed == len(nodes)


async def test_a_part_of_a_prompt_is_no_hit(models: Models) -> None:
    """Its rows depend on all tokens: those of a longer prompt, or of one that ends in another way, are other rows."""
    prompt, nodes = models.prompt(7, seed=3), models.naive.inner()
    other_end = prompt.copy()
    other_end[-2] += 1 if other_end[-2] < prompt.max() else -1
    related = [models.prompt(8, seed=3), models.prompt(6, seed=3), prompt[:-1], prompt[: 4 * BLOCK_TOKENS], other_end]
    async with opened(models) as cold:
        expected, _, _ = await evaluate(cold, prompt, nodes)
    async with opened(models, 1000) as warm:
        for other in related:
            await evaluate(warm, other, [ROOT])
        found, cached, _ = await evaluate(warm, prompt, nodes)
        assert sum(cached.values()) == 0
        assert_same(found, expected)


async def test_a_prompt_that_lost_blocks_is_computed_anew(models: Models) -> None:
    prompt, nodes = models.prompt(7, seed=3), models.naive.inner()
    async with opened(models) as cold:
        expected, _, _ = await evaluate(cold, prompt, nodes)
    async with opened(models, 3) as narrow:
        for _ in range(2):
            found, cached, computed = await evaluate(narrow, prompt, nodes)
            assert_same(found, expected)
            assert (cached, computed) == ({"memory": 0}, len(prompt) + len(nodes))


async def test_every_block_belongs_to_the_user(models: Models) -> None:
    """None is a shared prefix, not even of a template with one: each row depends on the history."""
    entry = models.bundle.bundle.manifest.target
    with_prefix = entry.model_copy(update={"prompt": entry.prompt.model_copy(update={"prefix": (1, 1, 1, 1, 1)})})
    prompt, store = np.append([1] * 5, models.prompt(7, seed=3)), DictStore()
    async with opened(models, 100, store) as evaluator:
        prompts = prompt_kv(evaluator.decoder, with_prefix, evaluator._layout, evaluator._prompts._cache)
        assert {user_key_of(key) for key in prompts.keys(prompt, "", USER)} == {USER}
        for user in (USER, STRANGER):
            _, cached, _ = await evaluate(evaluator, prompt, [ROOT], user)
            assert sum(cached.values()) == 0
        await evaluator._prompts._cache.erase([USER])
        for user, tokens in ((USER, 0), (STRANGER, len(prompt))):
            _, cached, _ = await evaluate(evaluator, prompt, [ROOT], user)
            assert sum(cached.values()) == tokens
    assert {user_key_of(key) for key in store.blocks} == {STRANGER}


async def test_tenants_share_nothing(models: Models) -> None:
    prompt = models.prompt(4, seed=3)
    async with opened(models, 100) as evaluator:
        await evaluate(evaluator, prompt, [ROOT])
        tree = await evaluator.open(prompt, tenant="other")
        assert tree.lookup_stats.cached_tokens == 0


async def test_rows_that_are_not_finite_fail_their_request_alone(models: Models) -> None:
    """No cache keeps such rows."""
    bad, good = models.prompt(5, seed=1), models.prompt(5, seed=2)
    limits = BatchLimits(requests=2, tokens=100_000, delay_seconds=3600, padding=1e9)
    async with opened(models) as cold:
        expected, _, _ = await evaluate(cold, good, [ROOT, 1])
    evaluator = models.evaluator("target", memory_blocks=100, limits=limits)
    decoder = evaluator.decoder
    assert isinstance(decoder, EncoderDecoder)
    encode = decoder.encode

    def spoilt(tokens: Int64, kv: KvArray) -> None:
        encode(tokens, kv)
        if np.array_equal(tokens, bad):
            kv[:, :, 2] = np.nan

    with patch.object(evaluator._prompts, "_encode", spoilt):
        trees = [await evaluator.open(prompt) for prompt in (bad, good)]
        failed, answer = await asyncio.gather(
            *(evaluator.evaluate(tree, np.array([ROOT, 1]), EVERYTHING) for tree in trees), return_exceptions=True
        )
    assert isinstance(failed, NoNumbersError)
    assert not isinstance(answer, BaseException)
    assert answer[1].batch_requests == 2
    assert_same(dict(answer[0].items()), expected)
    for prompt, tokens in ((bad, 0), (good, len(good))):
        assert (await evaluator.open(prompt)).lookup_stats.cached_tokens == tokens
    await evaluator.close()


def test_an_encoder_that_does_not_fit_is_refused(models: Models, tmp_path_factory: pytest.TempPathFactory) -> None:
    """A decoder without its encoder; and one beside the encoder of a model with more layers."""
    folder, other = tmp_path_factory.mktemp("one"), tmp_path_factory.mktemp("other")
    export_decoder(random_model("t5", 20, 1), folder, code_tokens=range(5, 10))
    export_decoder(random_model("t5", 20, 1, num_decoder_layers=3), other, code_tokens=range(5, 10))
    for name in (ENCODER_FILE, f"{ENCODER_FILE}.data"):
        (other / name).replace(folder / name)
    with pytest.raises(BundleError, match=r"encoder\.onnx: output cross_.*\.2: not one that"):
        EncoderDecoder(folder / "model.onnx", RuntimeOptions())
    (folder / ENCODER_FILE).unlink()
    with pytest.raises(BundleError, match=r"encoder\.onnx"):
        EncoderDecoder(folder / "model.onnx", RuntimeOptions())
    decoder, entry = Decoder(folder / "model.onnx", RuntimeOptions()), models.bundle.bundle.manifest.target
    evaluator = models.evaluator("target")
    with pytest.raises(TypeError, match="encoder is not loaded"):
        prompt_kv(decoder, entry, evaluator._layout, evaluator._prompts._cache)


def test_a_prompt_and_its_rows_must_match(models: Models) -> None:
    decoder = models.decoders["target"]
    assert isinstance(decoder, EncoderDecoder)
    for kv in (
        decoder.empty_kv(3),
        np.zeros_like(decoder.empty_kv(4), dtype=np.float64),
        decoder.empty_kv(8)[:, :, ::2],
    ):
        with pytest.raises(ValueError, match="kv"):
            decoder.encode(np.array([3, 4, 5, 6]), kv)
