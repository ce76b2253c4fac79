"""Keys and values in pages of a device, here of the CPU: shared without a copy, stored on the host, evicted, erased."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from atspeed.engine.arrays import Int64
from atspeed.engine.errors import BundleError, DeviceError, OverloadedError
from atspeed.engine.model.batcher import BatchLimits
from atspeed.engine.model.decoder import RuntimeOptions
from atspeed.engine.model.device_decoder import DeviceDecoder
from atspeed.engine.model.device_memory import DeviceMemory
from atspeed.engine.model.device_pools import DevicePools, host_dtype
from atspeed.engine.model.loading import load_device_decoder
from atspeed.engine.model.tree_evaluator import TreeEvaluator
from atspeed.engine.model.tree_session import Selection, TreeSession
from atspeed.engine.search.scoring import Evaluation
from atspeed.engine.search.trie import Pruning
from atspeed.model_host.model_health import ModelHealth
from tests.bundles import write_bundle
from tests.catalogues import random_catalogue
from tests.oracles.models import BLOCK_TOKENS, DictStore, Models

EVERYTHING = Selection(Pruning.none(), limit=100)
USER, OTHER = b"user-one", b"user-two"
TOLERANCE = 1e-4  # float32 sums in another order; a wrong slot or mask shows as 0.1 and more


@pytest.fixture(scope="module")
def host(tmp_path_factory: pytest.TempPathFactory) -> Models:
    return Models.load(write_bundle(tmp_path_factory.mktemp("bundle"), random_catalogue(40, (6, 5, 4), seed=2)))


@pytest.fixture(scope="module")
def paged(host: Models) -> Models:
    return Models(host.bundle, host.catalogue, host.naive, host.decoders, paged=True)


@asynccontextmanager
async def opened(models: Models, **given: Any) -> AsyncIterator[TreeEvaluator]:
    """Close it in the end; by then nothing is held, and the books of the pages are right."""
    evaluator = models.evaluator("target", **given)
    yield evaluator
    await evaluator.close()
    assert evaluator.open_kv.used_bytes == 0
    if isinstance(evaluator.decoder, DeviceDecoder):
        evaluator.decoder.pages.check_integrity()
        assert not evaluator.decoder.pages._holders


async def first_pass(
    evaluator: TreeEvaluator, prompt: Int64, *, user_key: bytes = USER
) -> tuple[TreeSession, Evaluation]:
    tree = await evaluator.open(prompt, user_key=user_key)
    evaluation, _ = await evaluator.evaluate(tree, np.arange(4), EVERYTHING)
    return tree, evaluation


async def answered(evaluator: TreeEvaluator, prompt: Int64, *, user_key: bytes = USER) -> Evaluation:
    tree, evaluation = await first_pass(evaluator, prompt, user_key=user_key)
    evaluator.end(tree)
    return evaluation


def assert_same(found: Evaluation, expected: Evaluation) -> None:
    assert found.child.tolist() == expected.child.tolist()
    np.testing.assert_allclose(found.logp, expected.logp, rtol=TOLERANCE, atol=TOLERANCE)


def memory_of(evaluator: TreeEvaluator) -> DeviceMemory:
    assert isinstance(evaluator.open_kv, DeviceMemory)
    return evaluator.open_kv


def decoder_of(evaluator: TreeEvaluator) -> DeviceDecoder:
    assert isinstance(evaluator.decoder, DeviceDecoder)
    return evaluator.decoder


async def copied_out(evaluator: TreeEvaluator) -> None:
    """Wait for the background tasks."""
    await memory_of(evaluator).close()


@contextmanager
def copies() -> Iterator[list[tuple[str, int]]]:
    """Every way of keys and values between host and device, with the number of slots."""
    seen: list[tuple[str, int]] = []
    read, write = DevicePools.read, DevicePools.write

    def reads(pools: DevicePools, slots: Int64) -> Any:
        seen.append(("out", len(slots)))
        return read(pools, slots)

    def writes(pools: DevicePools, slots: Int64, rows: Any) -> None:
        seen.append(("in", len(slots)))
        write(pools, slots, rows)

    with patch.object(DevicePools, "read", reads), patch.object(DevicePools, "write", writes):
        yield seen


async def test_a_prefix_that_is_on_the_device_is_not_copied(host: Models, paged: Models) -> None:
    """Nor are its blocks copied out twice; the first time they are, after the answer."""
    prompt = paged.prompt(7, seed=3)
    whole = len(prompt) // BLOCK_TOKENS * BLOCK_TOKENS
    async with opened(host) as other, opened(paged, memory_blocks=100) as evaluator:
        expected = await answered(other, prompt)
        with copies() as seen:
            assert_same(await answered(evaluator, prompt), expected)
            await copied_out(evaluator)
            assert seen == [("out", whole)]
            for _ in range(2):
                tree = await evaluator.open(prompt, user_key=USER)
                assert tree.lookup_stats.cached_tokens_by_tier == {
                    "device": (len(prompt) - 1) // BLOCK_TOKENS * BLOCK_TOKENS,
                    "memory": 0,
                }
                evaluator.end(tree)
                assert_same(await answered(evaluator, prompt), expected)
            await copied_out(evaluator)
            assert seen == [("out", whole)]


@pytest.mark.parametrize(("first", "second"), [("paged", "paged"), ("paged", "host"), ("host", "paged")])
async def test_another_replica_goes_on_with_stored_blocks(
    first: str, second: str, request: pytest.FixtureRequest
) -> None:
    """Blocks of the device serve the host and the other way round: a tier does not know where they come from."""
    store, one, two = DictStore(), request.getfixturevalue(first), request.getfixturevalue(second)
    prompt = one.prompt(7, seed=3)
    async with opened(one) as cold:
        expected = await answered(cold, prompt)
    async with opened(one, tier=store) as evaluator:
        await answered(evaluator, prompt)
        if first == "paged":
            await copied_out(evaluator)
        await asyncio.sleep(0)
    assert len(store.blocks) == len(prompt) // BLOCK_TOKENS
    async with opened(two, tier=store) as evaluator:
        tree = await evaluator.open(prompt, user_key=USER)
        cached = (len(prompt) - 1) // BLOCK_TOKENS * BLOCK_TOKENS
        assert tree.lookup_stats.cached_tokens_by_tier[store.name] == cached
        evaluation, cost = await evaluator.evaluate(tree, np.arange(4), EVERYTHING)
        assert cost.new_tokens == len(prompt) - cached + 3
        assert_same(evaluation, expected)
        evaluator.end(tree)
        assert_same(await answered(evaluator, prompt), expected)


async def test_requests_with_one_prompt_share_its_pages(paged: Models) -> None:
    """At the same time too: pages of a held prefix are held by all of them, and are free when the last one ends."""
    prompt = paged.prompt(7, seed=3)
    async with opened(paged, memory_blocks=0) as evaluator:
        await answered(evaluator, prompt)
        pool = decoder_of(evaluator).pages
        shared = (len(prompt) - 1) // BLOCK_TOKENS
        trees = [(await first_pass(evaluator, prompt))[0] for _ in range(5)]
        assert len({tuple(tree.pages[:shared]) for tree in trees}) == 1
        assert len({page for tree in trees for page in tree.pages[shared:]}) == sum(
            len(tree.pages) - shared for tree in trees
        )
        head = trees[0].pages[0]
        for number, tree in enumerate(trees):
            assert pool._holders[head] == len(trees) - number
            evaluator.end(tree)


async def test_small_pool_evicts_prefixes_and_refuses_streams_beyond_it(host: Models, paged: Models) -> None:
    """Users come one after the other; then streams stay open. Lists are right on every page that was used before."""
    prompts = [paged.prompt(6, seed=seed) for seed in range(8)]
    pages = 2 * -(-(len(prompts[0]) + 4) // BLOCK_TOKENS) + 4
    page_bytes = BLOCK_TOKENS * paged.token_bytes
    async with opened(host) as other, opened(paged, open_kv_bytes=pages * page_bytes) as evaluator:
        expected = [await answered(other, prompt) for prompt in prompts]
        for _ in range(2):
            for prompt, right in zip(prompts, expected, strict=True):
                assert_same(await answered(evaluator, prompt), right)
        assert decoder_of(evaluator).pages.statistics.evictions > 0
        trees: list[TreeSession] = []

        async def open_all() -> None:
            for prompt in prompts:
                trees.append(await evaluator.open(prompt, user_key=OTHER))
                await evaluator.evaluate(trees[-1], np.arange(4), EVERYTHING)

        with pytest.raises(OverloadedError, match="kv_device_mb"):
            await open_all()
        assert len(trees) > 1
        # What is open goes on, on the share that is kept for it.
        evaluation, _ = await evaluator.evaluate(trees[0], np.arange(4, 6), EVERYTHING)
        assert len(evaluation.child)
        for tree in trees:
            evaluator.end(tree)
        refused = await evaluator.open(prompts[-1])
        evaluator.end(refused)
        assert_same(await answered(evaluator, prompts[-1]), expected[-1])


def slots_with_content(decoder: DeviceDecoder) -> set[int]:
    """Pages of which any byte is not zero."""
    every = list(range(decoder.pages.pages))
    return {page for page, block in zip(every, decoder.read_pages(every), strict=True) if np.any(block)}


async def test_erasure_overwrites_a_users_pages_and_no_others(paged: Models) -> None:
    """At once where nobody reads them. Those of an open stream stay readable for it, and are overwritten at its end."""
    prompt, other = paged.prompt(7, seed=3), paged.prompt(7, seed=4)
    size = 64 * BLOCK_TOKENS * paged.token_bytes
    async with opened(paged, memory_blocks=100, open_kv_bytes=size) as evaluator:
        decoder, cache = decoder_of(evaluator), memory_of(evaluator)._cache
        decoder._zero(list(range(decoder.pages.pages)))  # a new pool's memory is arbitrary
        expected = await answered(evaluator, other, user_key=OTHER)
        of_other = set(decoder.pages._page_of.values())
        right = await answered(evaluator, prompt)
        of_user = set(decoder.pages._page_of.values()) - of_other
        assert len(of_user) == len(prompt) // BLOCK_TOKENS
        await copied_out(evaluator)
        await cache.erase([USER])
        assert not of_user & slots_with_content(decoder)
        assert of_other <= slots_with_content(decoder)
        assert (await cache.lookup((await evaluator.open(prompt, user_key=USER)).keys)).blocks == ()

        # Held by an open stream of the other user, who is erased meanwhile.
        tree, evaluation = await first_pass(evaluator, other, user_key=OTHER)
        assert_same(evaluation, expected)
        held = set(tree.pages)
        await cache.erase([OTHER])
        assert held & of_other <= slots_with_content(decoder)
        await evaluator.evaluate(tree, np.arange(4, 6), EVERYTHING)
        evaluator.end(tree)
        await copied_out(evaluator)
        assert not of_other & slots_with_content(decoder)
        # For a minute nothing of an erased user is kept, whatever passes are under way.
        assert_same(await answered(evaluator, prompt), right)
        assert_same(await answered(evaluator, other, user_key=OTHER), expected)
        assert not decoder.pages._page_of


async def test_stored_users_lose_their_pages_when_erasures_cannot_arrive(paged: Models) -> None:
    prompt = paged.prompt(7, seed=3)
    async with opened(paged) as evaluator:
        await answered(evaluator, prompt)
        pool = decoder_of(evaluator).pages
        assert len(pool._page_of)
        memory_of(evaluator)._cache.accepts_user_blocks = False
        assert not pool._page_of
        await answered(evaluator, prompt)
        await copied_out(evaluator)
        assert (pool.unclean, len(pool._page_of)) == (0, 0)


async def test_a_device_that_fails_gives_no_list_and_makes_the_model_unhealthy(paged: Models) -> None:
    """In a shared pass too. What was committed stays right, if the device comes back."""
    prompt, changes = paged.prompt(5, seed=1), list[bool]()

    async def changed(healthy: bool) -> None:
        changes.append(healthy)

    async def probe() -> None:
        raise DeviceError("still broken")

    limits = BatchLimits(requests=2, tokens=1000, delay_seconds=3600, padding=1e9)
    async with opened(paged, limits=limits) as evaluator:
        trees = [await evaluator.open(prompt) for _ in range(2)]
        lost = RuntimeError("CUDA failure 719: unspecified launch failure")
        with patch.object(decoder_of(evaluator)._session, "run_with_iobinding", side_effect=lost):
            found = await asyncio.gather(
                *(evaluator.evaluate(tree, np.arange(4), EVERYTHING) for tree in trees), return_exceptions=True
            )
        assert [type(one) for one in found] == [DeviceError, DeviceError]
        again = await asyncio.gather(*(evaluator.evaluate(tree, np.arange(4), EVERYTHING) for tree in trees))
        assert_same(again[0][0], again[1][0])
        for tree in trees:
            evaluator.end(tree)
    health = ModelHealth(5, probe, changed, first_pause_seconds=60)
    health.record_failure(found[0] if isinstance(found[0], Exception) else Exception())
    await asyncio.sleep(0)
    assert (health.healthy, changes) == (False, [False])
    await health.close()


@settings(max_examples=25, deadline=None)
@given(data=st.data(), dtype=st.sampled_from(["float32", "float16", "bfloat16"]))
def test_rows_come_back_as_they_were_written(data: st.DataObject, dtype: str) -> None:
    """Any rows, written in any order, beside rows that stay; nothing touches the slot of zeros."""
    layers, width, slots = 2, 4, 12
    pools = DevicePools(layers, width, dtype, slots, RuntimeOptions())
    expected = np.zeros((layers, 2, slots, width), dtype=host_dtype(dtype))
    pools.zero(np.arange(slots))
    random = np.random.default_rng(data.draw(st.integers(0, 99)))
    for _ in range(data.draw(st.integers(1, 3))):
        places = np.array(data.draw(st.lists(st.integers(2, slots - 1), min_size=1, max_size=8, unique=True)))
        rows = random.integers(0, 100, (layers, 2, len(places), width)).astype(host_dtype(dtype))
        pools.write(places, rows)
        expected[:, :, places] = rows
    order = np.array(data.draw(st.permutations(range(slots))))
    np.testing.assert_array_equal(pools.read(order), expected[:, :, order])


def test_models_and_pools_that_do_not_fit_are_refused_with_the_numbers(host: Models) -> None:
    options, bundle = RuntimeOptions(), host.bundle.bundle
    with pytest.raises(BundleError, match=r"kv_device_mb: 0 MiB hold no page of 4 tokens, which takes 0\.00 MiB"):
        load_device_decoder(bundle, "target", options, page_tokens=4, pool_bytes=100)
    with pytest.raises(BundleError, match=r"kv_device_mb: keys and values of \d+ tokens take 1099511627.* no room for"):
        load_device_decoder(bundle, "target", options, page_tokens=4, pool_bytes=2**60)


def test_batches_of_a_tree_are_single_passes_of_one_shape(paged: Models) -> None:
    """Shapes are few: passes whose sizes are close share their buffers."""

    async def shapes(lengths: Sequence[int]) -> int:
        async with opened(paged) as evaluator:
            for items in lengths:
                await answered(evaluator, paged.prompt(items, seed=items))
            return len(decoder_of(evaluator)._bound)

    assert asyncio.run(shapes([1, 2, 3, 4, 5, 6, 7, 8])) <= 4
