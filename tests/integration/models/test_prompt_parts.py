"""Long prompts are read in parts: the same bits, other requests between them, parts that outlive a cancellation."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager
from typing import Any, cast
from unittest.mock import patch

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from atspeed.engine.arrays import Int64
from atspeed.engine.errors import NoNumbersError
from atspeed.engine.model import tree_evaluator
from atspeed.engine.model.batch_decoder import TreeOutput
from atspeed.engine.model.tree_evaluator import TreeEvaluator
from atspeed.engine.model.tree_session import ProgramRun, Selection, TreeSession
from atspeed.engine.search.scoring import Evaluation
from atspeed.engine.search.trie import ROOT, Pruning
from tests.bundles import write_bundle
from tests.catalogues import random_catalogue
from tests.oracles.models import BLOCK_TOKENS, Models
from tests.serving import LIVENESS_SECONDS

BEST = Selection(Pruning.none(), limit=3)
WHOLE = 1_000  # tokens: more than any prompt here


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Models:
    catalogue = random_catalogue(60, (6, 5, 4), seed=2)
    return Models.load(write_bundle(tmp_path_factory.mktemp("bundle"), catalogue, max_items=14))


@asynccontextmanager
async def opened(models: Models, part: int, **limits: Any) -> AsyncIterator[TreeEvaluator]:
    """An evaluator that reads so many tokens a part. In the end nothing may wait or be held."""
    with patch.object(tree_evaluator, "PROMPT_PART", part):
        evaluator = models.evaluator("target", memory_blocks=100, **limits)
        yield evaluator
        await evaluator.close()
        await asyncio.sleep(0)  # what the thread has left to the event loop
    assert (evaluator.queued_passes, evaluator.open_kv.used_bytes) == (0, 0)


async def first_pass(evaluator: TreeEvaluator, prompt: Int64, nodes: Int64) -> tuple[Evaluation, TreeSession]:
    tree = await evaluator.open(prompt)
    try:
        found, _ = await evaluator.evaluate(tree, nodes, BEST)
    finally:
        evaluator.end(tree)
    return found, tree


async def until_queued(evaluator: TreeEvaluator) -> None:
    async with asyncio.timeout(LIVENESS_SECONDS):
        while not evaluator.queued_passes:  # noqa: ASYNC110 - the queue has no event
            await asyncio.sleep(0)


@contextmanager
def held_before(evaluator: TreeEvaluator, number: int) -> Iterator[tuple[list[int], threading.Event, threading.Event]]:
    """Hold the pass of this number, from 1 on. Gives the new tokens of all passes, and the events of its begin and release."""
    tokens: list[int] = []
    entered, go_on = threading.Event(), threading.Event()
    run = evaluator.open_kv.run

    def watched(passes: Sequence[tuple[ProgramRun, Any]]) -> Any:
        tokens.extend(len(step.tokens) for _, step in passes)
        if len(tokens) == number:
            entered.set()
            assert go_on.wait(LIVENESS_SECONDS)
        return run(passes)

    with patch.object(evaluator.open_kv, "run", watched):
        yield tokens, entered, go_on


@settings(max_examples=25)
@given(
    part=st.integers(1, 24),
    items=st.integers(1, 14),
    cached=st.integers(0, 14),
    seed=st.integers(0, 3),
    tree=st.booleans(),
)
def test_no_bit_depends_on_the_parts(models: Models, part: int, items: int, cached: int, seed: int, tree: bool) -> None:
    """Scores and cached keys and values are compared, behind any cached beginning. Statistics are those of one pass."""
    prompt = models.prompt(items, seed)
    nodes = np.array(models.naive.inner() if tree else [ROOT])

    async def evaluated(part: int, cached: int) -> tuple[list[bytes], TreeSession]:
        async with opened(models, part) as evaluator:
            if cached:
                await first_pass(evaluator, prompt[: cached * 3], np.array([ROOT]))
            found, session = await first_pass(evaluator, prompt, nodes)
            kept = await evaluator.open(prompt)
            blocks = [found.child.tobytes(), found.logp.tobytes(), *(block.tobytes() for block in kept.cached_blocks)]
            assert len(kept.cached_blocks) == (len(prompt) - 1) // BLOCK_TOKENS
            evaluator.end(kept)
        return blocks, session

    expected, _ = asyncio.run(evaluated(WHOLE, 0))
    _, whole = asyncio.run(evaluated(WHOLE, cached))
    found, in_parts = asyncio.run(evaluated(part, cached))
    assert found == expected
    [one], [same] = in_parts.passes, whole.passes
    assert (
        one.nodes,
        one.stats.new_tokens,
        one.stats.batch_tokens,
        one.stats.cached_tokens,
        one.stats.batch_requests,
    ) == (
        same.nodes,
        same.stats.new_tokens,
        same.stats.batch_tokens,
        same.stats.cached_tokens,
        same.stats.batch_requests,
    )
    assert one.queued_ns + one.stats.queue_ns + one.stats.forward_ns <= one.done_ns


async def test_other_requests_come_between_two_parts(models: Models) -> None:
    """Also one that began later; without parts it waited for the whole prompt."""
    long, short = models.prompt(14, seed=1), models.prompt(1, seed=2)
    async with opened(models, part=8) as evaluator:
        with held_before(evaluator, 1) as (tokens, entered, go_on):
            reading = asyncio.create_task(first_pass(evaluator, long, np.array([ROOT])))
            await asyncio.to_thread(entered.wait, LIVENESS_SECONDS)
            other = asyncio.create_task(first_pass(evaluator, short, np.array([ROOT])))
            await until_queued(evaluator)
            go_on.set()
            await asyncio.gather(reading, other)
    left = len(long) - 8 * (len(tokens) - 2)
    assert tokens == [8, len(short), *[8] * (len(tokens) - 3), left]
    assert 8 < left <= 16


async def test_parts_outlive_a_cancellation(models: Models) -> None:
    prompt = models.prompt(14, seed=1)
    async with opened(models, part=8) as evaluator:
        with held_before(evaluator, 3) as (tokens, entered, go_on):
            reading = asyncio.create_task(first_pass(evaluator, prompt, np.array([ROOT])))
            await asyncio.to_thread(entered.wait, LIVENESS_SECONDS)
            reading.cancel()
            await asyncio.wait([reading])
            go_on.set()
        found, again = await first_pass(evaluator, prompt, np.array([ROOT]))
    assert tokens == [8, 8, 8]
    assert again.passes[0].stats.cached_tokens_by_tier["memory"] == 16
    async with opened(models, WHOLE) as evaluator:
        expected, _ = await first_pass(evaluator, prompt, np.array([ROOT]))
    assert (found.child.tobytes(), found.logp.tobytes()) == (expected.child.tobytes(), expected.logp.tobytes())


async def test_part_without_numbers_is_in_no_cache(models: Models) -> None:
    """A prompt whose second part is damaged: the first one is kept."""
    prompt = models.prompt(14, seed=1)
    async with opened(models, part=8) as evaluator:
        run = evaluator.open_kv.run

        def damaged(passes: Sequence[tuple[ProgramRun, Any]]) -> Any:
            found = run(passes)
            [(of, step)] = passes
            start = of.tree.tokens.length
            if start >= 8:
                of.tree.tokens.kv[:, :, start : start + len(step.tokens)] = np.nan
                cast("TreeOutput", found[0]).log_normalizer[:] = np.nan
            return found

        with patch.object(evaluator.open_kv, "run", damaged), pytest.raises(NoNumbersError):
            await first_pass(evaluator, prompt, np.array([ROOT]))
        again = await evaluator.open(prompt)
        assert again.lookup_stats.cached_tokens_by_tier["memory"] == 8
        evaluator.end(again)
