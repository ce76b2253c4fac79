"""Programs of passes: they stay in the worker thread, share passes and can be cancelled."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from atspeed.engine.errors import CapacityError, OverloadedError
from atspeed.engine.model.batcher import BatchLimits
from atspeed.engine.model.pass_stats import PassStats
from atspeed.engine.model.tree_evaluator import TreeEvaluator
from atspeed.engine.model.tree_session import PassProgram, Selection, TreeSession
from atspeed.engine.search.scoring import Children
from atspeed.engine.search.trie import ROOT, Pruning
from tests.bundles import write_bundle
from tests.catalogues import random_catalogue
from tests.oracles.models import BLOCK_TOKENS, Models
from tests.serving import LIVENESS_SECONDS

BEST = Selection(Pruning.none(), limit=3)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Models:
    return Models.load(write_bundle(tmp_path_factory.mktemp("bundle"), random_catalogue(60, (6, 5, 4), seed=2)))


@asynccontextmanager
async def opened(models: Models, **settings: Any) -> AsyncIterator[TreeEvaluator]:
    """Close it in the end; by then nothing may wait or be held."""
    evaluator = models.evaluator("target", memory_blocks=100, **settings)
    yield evaluator
    await evaluator.close()
    await asyncio.sleep(0)  # what the thread has left to the event loop
    assert (evaluator.queued_passes, evaluator.open_kv.used_bytes) == (0, 0)


def downwards(levels: int) -> PassProgram[dict[int, Children]]:
    """The best children of the best children of the root, so many levels down."""
    found: dict[int, Children] = {}
    nodes = np.array([ROOT])
    for _ in range(levels):
        evaluation = yield nodes
        found |= evaluation.items()
        nodes = np.sort(evaluation.child.astype(np.int64))
    return found


async def by_hand(
    evaluator: TreeEvaluator, tree: TreeSession, levels: int
) -> tuple[dict[int, Children], list[PassStats]]:
    """The same with a call for each pass."""
    found: dict[int, Children] = {}
    costs, nodes = [], np.array([ROOT])
    for _ in range(levels):
        evaluation, cost = await evaluator.evaluate(tree, nodes, BEST)
        costs.append(cost)
        found |= evaluation.items()
        nodes = np.sort(evaluation.child.astype(np.int64))
    return found, costs


def exactly(found: dict[int, Children]) -> dict[int, tuple[bytes, bytes, float]]:
    return {node: (c.node.tobytes(), c.logp.tobytes(), c.log_mass) for node, c in found.items()}


@contextmanager
def passes_begin(evaluator: TreeEvaluator, on_pass: Callable[[int], None]) -> Iterator[list[int]]:
    """Calls `on_pass` in the worker thread before every pass, with its number from 1 on. Gives how many trees shared each."""
    shared: list[int] = []
    run = evaluator.open_kv.run

    def watched(trees: Sequence[Any]) -> Any:
        shared.append(len(trees))
        on_pass(len(shared))
        return run(trees)

    with patch.object(evaluator.open_kv, "run", watched):
        yield shared


def until_set(event: threading.Event) -> None:
    assert event.wait(LIVENESS_SECONDS)


@pytest.mark.parametrize("levels", [1, 2, 3])
async def test_program_runs_while_the_event_loop_is_blocked(models: Models, levels: int) -> None:
    """The results are bit for bit those of one call after the other, for the same work."""
    async with opened(models) as evaluator:
        last_begun = threading.Event()
        tree = await evaluator.open(models.prompt(5, seed=1))
        with passes_begin(evaluator, lambda number: last_begun.set() if number == levels else None):
            following = asyncio.create_task(evaluator.run_steps(tree, downwards(levels), BEST))
            await asyncio.sleep(0)
            until_set(last_begun)
            found, cost = await following
        evaluator.end(tree)
    async with opened(models) as evaluator:
        by_itself = await evaluator.open(models.prompt(5, seed=1))
        expected, costs = await by_hand(evaluator, by_itself, levels)
        evaluator.end(by_itself)
    assert exactly(found) == exactly(expected)
    assert [made.nodes for made in tree.passes] == [made.nodes for made in by_itself.passes]
    assert [made.stats.new_tokens for made in tree.passes] == [cost.new_tokens for cost in costs]
    assert cost.new_tokens == sum(cost.new_tokens for cost in costs)
    assert cost.batch_requests == 1
    assert all(made.queued_ns + made.stats.queue_ns <= made.done_ns for made in tree.passes)


async def test_empty_program_makes_no_pass(models: Models) -> None:
    async with opened(models) as evaluator:
        tree = await evaluator.open(models.prompt(5, seed=1))
        assert await evaluator.run_steps(tree, downwards(0), BEST) == ({}, PassStats())
        assert tree.passes == []
        evaluator.end(tree)


@settings(max_examples=15)
@given(st.lists(st.tuples(st.integers(1, 8), st.integers(0, 2), st.integers(1, 3)), min_size=2, max_size=5))
@example([(1, 0, 3), (8, 0, 3)])
def test_concurrent_programs_share_passes_and_keep_their_results(
    models: Models, asked: list[tuple[int, int, int]]
) -> None:
    """Held back until all wait: then those of one level run together, and the next levels, and none waits for the last."""

    async def together() -> list[dict[int, Children]]:
        limits = BatchLimits(tokens=100_000, padding=1e9, cached_padding=1e9)
        async with opened(models, limits=limits) as evaluator:
            all_wait = threading.Event()
            trees = [await evaluator.open(models.prompt(items, seed)) for items, seed, _ in asked]
            with passes_begin(evaluator, lambda _: until_set(all_wait)) as shared:
                searches = [
                    asyncio.create_task(evaluator.run_steps(tree, downwards(levels), BEST))
                    for tree, (_, _, levels) in zip(trees, asked, strict=True)
                ]
                await asyncio.sleep(0)
                all_wait.set()
                found = [search for search, _ in await asyncio.gather(*searches)]
            for tree in trees:
                evaluator.end(tree)
            assert sum(shared) == sum(levels for _, _, levels in asked)
            assert len(shared) <= 1 + max(levels for _, _, levels in asked)
        return found

    async def alone(items: int, seed: int, levels: int) -> dict[int, Children]:
        async with opened(models) as evaluator:
            tree = await evaluator.open(models.prompt(items, seed))
            found, _ = await evaluator.run_steps(tree, downwards(levels), BEST)
            evaluator.end(tree)
        return found

    for found, (items, seed, levels) in zip(asyncio.run(together()), asked, strict=True):
        expected = asyncio.run(alone(items, seed, levels))
        assert found.keys() == expected.keys()
        for node, children in found.items():
            assert children.node.tolist() == expected[node].node.tolist()
            np.testing.assert_allclose(children.logp, expected[node].logp, rtol=5e-5, atol=5e-5)


@pytest.mark.parametrize("given_up_in", [1, 2])
async def test_cancelled_program_ends_with_its_pass(models: Models, given_up_in: int) -> None:
    """Its memory is free then and not before; the prompt's blocks, once computed, are the cache's all the same."""
    prompt = models.prompt(5, seed=1)
    async with opened(models) as evaluator:
        entered, go_on = threading.Event(), threading.Event()

        def hold(number: int) -> None:
            if number == given_up_in:
                entered.set()
                until_set(go_on)

        tree = await evaluator.open(prompt)
        with passes_begin(evaluator, hold) as passes:
            following = asyncio.create_task(evaluator.run_steps(tree, downwards(3), BEST))
            await asyncio.to_thread(until_set, entered)
            following.cancel()
            await asyncio.wait([following])
            evaluator.end(tree)
            assert evaluator.open_kv.used_bytes > 0
            go_on.set()
            assert tree.last_request is not None
            await asyncio.wait([tree.last_request.done])
            await asyncio.sleep(0)
            assert (evaluator.open_kv.used_bytes, len(passes)) == (0, given_up_in)
        again = await evaluator.open(prompt)
        known = (len(prompt) - 1) // BLOCK_TOKENS * BLOCK_TOKENS if given_up_in > 1 else 0
        assert again.lookup_stats.cached_tokens_by_tier["memory"] == known
        evaluator.end(again)


async def test_failure_below_the_first_level_fails_only_its_request(models: Models) -> None:
    """A node without its parent, and a mistake of the steps themselves."""

    def orphan() -> PassProgram[None]:
        yield np.array([ROOT])
        yield np.array([models.naive.inner()[-1]])

    def mistaken() -> PassProgram[None]:
        yield np.array([ROOT])
        raise ArithmeticError

    wrong: list[tuple[Callable[[], PassProgram[None]], type[Exception]]] = [
        (orphan, CapacityError),
        (mistaken, ArithmeticError),
    ]
    async with opened(models) as evaluator:
        for steps, error in wrong:
            trees = [await evaluator.open(models.prompt(items, seed=1)) for items in (3, 4)]
            failing, working = (
                evaluator.run_steps(tree, each, BEST) for tree, each in zip(trees, (steps(), downwards(2)), strict=True)
            )
            failed, worked = await asyncio.gather(failing, working, return_exceptions=True)
            assert isinstance(failed, error)
            assert not isinstance(worked, BaseException)
            assert [len(tree.passes) for tree in trees] == [1, 2]
            for tree in trees:
                evaluator.end(tree)


async def test_program_that_outgrows_the_memory_is_refused(models: Models) -> None:
    """Room for the prompt, its first buffer with no place for nodes, and not for the next."""
    with patch("atspeed.engine.model.host_memory._NODE_ROOM", 0):
        async with opened(models, open_kv_bytes=64 * models.token_bytes) as evaluator:
            tree = await evaluator.open(np.resize(models.prompt(8, seed=1), 50))
            prompt = len(tree.tokens.prompt)
            inner = np.array([node for node in models.naive.inner() if node != ROOT])
            assert prompt < 64 < prompt + len(inner)

            def everything() -> PassProgram[None]:
                yield np.array([ROOT])
                yield inner

            with pytest.raises(OverloadedError, match="kv_open_mb"):
                await evaluator.run_steps(tree, everything(), BEST)
            evaluator.end(tree)
