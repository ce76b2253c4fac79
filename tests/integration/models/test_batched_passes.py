"""Results of a request do not depend on the requests of the same passes, and its memory is free when it ends."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Sequence
from contextlib import AbstractContextManager, asynccontextmanager
from dataclasses import dataclass, field
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from atspeed.engine.arrays import Int64
from atspeed.engine.bundle.manifest import Precision
from atspeed.engine.errors import CapacityError, OverloadedError
from atspeed.engine.model.batcher import BatchLimits
from atspeed.engine.model.host_memory import HostMemory
from atspeed.engine.model.kv_memory import PassResult
from atspeed.engine.model.pass_stats import PassStats
from atspeed.engine.model.token_tree import TreePass
from atspeed.engine.model.tree_evaluator import TreeEvaluator
from atspeed.engine.model.tree_session import ProgramRun, Selection
from atspeed.engine.search.scoring import Children, Perturbation, ScoringRule
from atspeed.engine.search.trie import ROOT, Pruning
from tests.bundles import write_bundle
from tests.catalogues import random_catalogue
from tests.oracles.models import DictStore, Models

EVERYTHING = Selection(Pruning.none(), limit=100)
HOUR = 3600.0
# float32 sums in another order, on weights so wide that logits go up to 30: a trained model's move by a tenth of this. A
# wrong mask or position would show as 0.1 and more. What int8 sums has no order.
TOLERANCE: dict[Precision, float] = {"float32": 5e-5, "int8": 0}
FIRST_BUFFER = 192  # tokens: a short prompt, its nodes and room for 128 more


HOST: list[tuple[str, ...]] = [
    (ScoringRule.VOCAB, "float32", "llama"),
    (ScoringRule.TRIE, "float32", "qwen3"),
    (ScoringRule.VOCAB, "int8", "llama"),
    (ScoringRule.VOCAB, "float32", "t5"),
]
# Keys and values in pages, as on a GPU; here on the CPU.
PAGED = [(ScoringRule.VOCAB, "float32", "llama", "paged")]
of_buffers = pytest.mark.parametrize("models", HOST, indirect=True, ids="-".join)


@pytest.fixture(scope="module", params=[*HOST, *PAGED], ids="-".join)
def models(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Models:
    rule, precision, architecture, *where = request.param
    catalogue = random_catalogue(40, (6, 5, 4), seed=2)
    root = tmp_path_factory.mktemp("bundle")
    made = write_bundle(root, catalogue, rule=rule, architecture=architecture, precision=precision)
    return Models.load(made, paged="paged" in where)


@asynccontextmanager
async def opened(evaluator: TreeEvaluator) -> AsyncIterator[TreeEvaluator]:
    """Close it in the end; by then nothing may wait or be held."""
    yield evaluator
    assert (evaluator.queued_passes, evaluator.open_kv.used_bytes) == (0, 0)
    await evaluator.close()


def _idle_bytes(evaluator: TreeEvaluator) -> int:
    assert isinstance(evaluator.open_kv, HostMemory)
    return evaluator.open_kv.buffers.idle_bytes


def co_batched(requests: int) -> BatchLimits:
    """Exactly so many passes run together: no padding is too much, and a smaller batch waits for the next pass."""
    return BatchLimits(requests=requests, tokens=100_000, delay_seconds=HOUR, padding=1e9, cached_padding=1e9)


@dataclass(frozen=True)
class Plan:
    """One request: a prompt by items and seed, and the nodes of its passes; a pass may be empty."""

    items: int
    seed: int
    passes: list[list[int]]


@st.composite
def plans(draw: st.DrawFn, models: Models, waves: int) -> Plan:
    """Any ancestor-closed set of nodes, each in its parent's pass or a later one, the root in the first."""
    naive = models.naive
    wanted = draw(st.sets(st.sampled_from(naive.inner()), max_size=12))
    paths = {naive.nodes[node][:end] for node in wanted for end in range(1, len(naive.nodes[node]) + 1)}
    wave = {ROOT: 0}
    for node in sorted(naive.id_of[path] for path in paths):
        wave[node] = draw(st.integers(wave[naive.id_of[naive.nodes[node][:-1]]], waves - 1))
    passes = [sorted(node for node, at in wave.items() if at == number) for number in range(waves)]
    return Plan(draw(st.integers(1, 8)), draw(st.integers(0, 5)), passes)


def assert_same(models: Models, found: dict[int, Children], expected: dict[int, Children]) -> None:
    tolerance = TOLERANCE[models.bundle.bundle.manifest.target.precision]
    for node, children in found.items():
        assert children.node.tolist() == expected[node].node.tolist()
        np.testing.assert_allclose(children.logp, expected[node].logp, rtol=tolerance, atol=tolerance)
        assert children.log_mass == pytest.approx(expected[node].log_mass, rel=tolerance, abs=tolerance)


@dataclass
class Alone:
    """Return the evaluation of all nodes of a prompt's tree, one at a time and level by level."""

    models: Models
    known: dict[tuple[int, int], dict[int, Children]] = field(default_factory=dict)

    async def __call__(self, items: int, seed: int) -> dict[int, Children]:
        if (items, seed) not in self.known:
            self.known[items, seed] = await self.evaluate(self.models.prompt(items, seed))
        return self.known[items, seed]

    async def evaluate(self, prompt: Int64) -> dict[int, Children]:
        naive, found = self.models.naive, dict[int, Children]()
        async with opened(self.models.evaluator("target", limits=BatchLimits(requests=1))) as evaluator:
            tree = await evaluator.open(prompt)
            for depth in range(naive.levels):
                nodes = [node for node in naive.inner() if len(naive.nodes[node]) == depth]
                evaluation, _ = await evaluator.evaluate(tree, np.array(nodes), EVERYTHING)
                found |= evaluation.items()
            evaluator.end(tree)
        return found


@pytest.fixture(scope="module")
def alone(models: Models) -> Alone:
    return Alone(models)


@settings(max_examples=30)
@given(data=st.data())
def test_co_batched_requests_change_no_result(models: Models, alone: Alone, data: st.DataObject) -> None:
    """Any requests in any order in the same passes: some cold, some on a cached prefix, some at their first pass."""
    waves = data.draw(st.integers(1, 3))
    requests = data.draw(st.lists(plans(models, waves), min_size=2, max_size=5))
    warm = data.draw(st.sets(st.sampled_from(range(len(requests)))))
    found = asyncio.run(run_together(models, requests, sorted(warm), waves))
    for request, children in zip(requests, found, strict=True):
        assert children.keys() == set().union(*request.passes)
        assert_same(models, children, asyncio.run(alone(request.items, request.seed)))


async def run_together(
    models: Models, requests: Sequence[Plan], warm: Sequence[int], waves: int
) -> list[dict[int, Children]]:
    """All requests, wave by wave in one pass; where one sits a wave out, a newcomer takes its place."""
    store, found = DictStore(), [dict[int, Children]() for _ in requests]
    async with opened(models.evaluator("target", memory_blocks=100, tier=store)) as before:
        for index in warm:
            await first_pass(before, models.prompt(requests[index].items, requests[index].seed))
    evaluator = models.evaluator("target", tier=store, limits=co_batched(len(requests)))
    async with opened(evaluator):
        trees = [await evaluator.open(models.prompt(request.items, request.seed)) for request in requests]

        async def take_part(index: int, nodes: list[int]) -> None:
            if not nodes:
                await first_pass(evaluator, models.prompt(3, seed=9))
                return
            evaluation, cost = await evaluator.evaluate(trees[index], np.array(nodes), EVERYTHING)
            assert cost.batch_requests == len(requests)
            found[index] |= evaluation.items()

        for wave in range(waves):
            await asyncio.gather(*(take_part(i, request.passes[wave]) for i, request in enumerate(requests)))
        for tree in trees:
            evaluator.end(tree)
    return found


async def first_pass(evaluator: TreeEvaluator, prompt: Int64) -> PassStats:
    """The root of a tree that is then ended."""
    tree = await evaluator.open(prompt)
    try:
        return (await evaluator.evaluate(tree, np.array([ROOT]), EVERYTHING))[1]
    finally:
        evaluator.end(tree)


async def test_concurrent_requests_share_passes_and_keep_their_lists(models: Models, alone: Alone) -> None:
    """The defaults of a server: no pass waits for co-batched requests."""
    prompts, inner = [(1 + n % 2, n) for n in range(12)], models.naive.inner()
    expected = [await alone(items, seed) for items, seed in prompts]
    async with opened(models.evaluator("target")) as evaluator:

        async def ask(items: int, seed: int) -> tuple[dict[int, Children], PassStats]:
            tree = await evaluator.open(models.prompt(items, seed))
            _, first = await evaluator.evaluate(tree, np.array(inner[:1]), EVERYTHING)
            evaluation, second = await evaluator.evaluate(tree, np.array(inner[1:7]), EVERYTHING)
            evaluator.end(tree)
            return dict(evaluation.items()), first + second

        answers = await asyncio.gather(*(ask(items, seed) for items, seed in prompts))
    for (children, _), truth in zip(answers, expected, strict=True):
        assert_same(models, children, truth)
    assert max(cost.batch_requests for _, cost in answers) > 1
    assert all(cost.batch_tokens >= cost.new_tokens for _, cost in answers)


async def test_a_perturbed_request_and_a_pruned_one_keep_their_own_selection(models: Models) -> None:
    noise = Selection(Pruning.none(), 3, Perturbation(seed=4, temperature=0.7))
    pruned = Selection(Pruning(np.array([1], dtype=np.int32)), 2)
    answers = []
    for limits in (co_batched(3), BatchLimits(requests=1)):
        async with opened(models.evaluator("target", limits=limits)) as evaluator:
            trees = [await evaluator.open(models.prompt(items, seed=items)) for items in (2, 3, 5)]
            selections = zip(trees, (noise, pruned, EVERYTHING), strict=True)
            passes = (evaluator.evaluate(tree, np.array([ROOT, 2]), selection) for tree, selection in selections)
            answers.append([dict(evaluation.items()) for evaluation, _ in await asyncio.gather(*passes)])
            for tree in trees:
                evaluator.end(tree)
    for together, by_itself in zip(*answers, strict=True):
        assert_same(models, together, by_itself)


async def test_orphan_node_is_refused_without_its_co_batched_requests(models: Models, alone: Alone) -> None:
    orphan = next(node for node in models.naive.inner() if len(models.naive.nodes[node]) == 2)
    async with opened(models.evaluator("target", limits=co_batched(3))) as evaluator:
        trees = [await evaluator.open(models.prompt(items, seed=1)) for items in (4, 5, 6)]
        asked = ([ROOT, 1], [ROOT, orphan], [ROOT, 2])
        first, refused, third = await asyncio.gather(
            *(evaluator.evaluate(tree, np.array(nodes), EVERYTHING) for tree, nodes in zip(trees, asked, strict=True)),
            return_exceptions=True,
        )
        for tree in trees:
            evaluator.end(tree)
    assert isinstance(refused, CapacityError)
    for answer, items in ((first, 4), (third, 6)):
        assert not isinstance(answer, BaseException)
        assert answer[1].batch_requests == 2
        assert_same(models, dict(answer[0].items()), await alone(items, 1))


async def test_cancelled_pass_leaves_the_queue_and_frees_its_memory(models: Models) -> None:
    """A queue of one place, in which a pass waits for others: when it is cancelled, another takes the place."""
    limits = BatchLimits(requests=2, delay_seconds=HOUR, waiting=1)
    async with opened(models.evaluator("target", limits=limits)) as evaluator:
        for seed in range(3):
            tree = await evaluator.open(models.prompt(3, seed))
            waits = asyncio.create_task(evaluator.evaluate(tree, np.array([ROOT]), EVERYTHING))
            await asyncio.sleep(0)
            assert evaluator.queued_passes == 1
            with pytest.raises(OverloadedError, match="max_queued_passes"):
                await first_pass(evaluator, models.prompt(2, seed=9))
            waits.cancel()
            await asyncio.wait([waits])
            assert evaluator.queued_passes == 0
            assert evaluator.open_kv.used_bytes > 0
            evaluator.end(tree)
            assert evaluator.open_kv.used_bytes == 0


async def test_warm_up_waits_for_no_co_batched_request(models: Models) -> None:
    async with opened(models.evaluator("target", limits=co_batched(2))) as evaluator:
        await evaluator.warm_up()
        await evaluator.cost_curve(0)


@of_buffers
async def test_memory_of_a_running_pass_is_freed_at_its_end(models: Models) -> None:
    """A tree may end in the middle of its pass. Its buffer must not go to another one while the pass still writes to it."""
    async with opened(models.evaluator("target")) as evaluator:
        entered, go_on = threading.Event(), threading.Event()
        run = evaluator.decoder.run

        def slow(*arguments: Any) -> Any:
            entered.set()
            go_on.wait()
            return run(*arguments)

        tree = await evaluator.open(models.prompt(3, seed=1))
        with patch.object(evaluator.decoder, "run", slow):
            cancelled = asyncio.create_task(evaluator.evaluate(tree, np.array([ROOT]), EVERYTHING))
            await asyncio.to_thread(entered.wait)
            cancelled.cancel()
            await asyncio.wait([cancelled])
            evaluator.end(tree)
            assert evaluator.open_kv.used_bytes > 0
            assert _idle_bytes(evaluator) == 0
            go_on.set()
            await first_pass(evaluator, models.prompt(3, seed=2))
        assert (evaluator.open_kv.used_bytes, tree.tokens.kv.size) == (0, 0)


@of_buffers
async def test_sessions_beyond_the_memory_are_refused_and_served_later(models: Models) -> None:
    async with opened(models.evaluator("target", open_kv_bytes=4 * FIRST_BUFFER * models.token_bytes)) as evaluator:
        trees = [await evaluator.open(models.prompt(3, seed=n)) for n in range(3)]
        for tree in trees:
            await evaluator.evaluate(tree, np.array([ROOT]), EVERYTHING)
        with pytest.raises(OverloadedError, match="kv_open_mb"):
            await first_pass(evaluator, models.prompt(3, seed=3))
        evaluator.end(trees.pop())
        await first_pass(evaluator, models.prompt(3, seed=3))
        for tree in trees:
            evaluator.end(tree)


@of_buffers
async def test_session_grows_while_new_ones_are_refused(models: Models, alone: Alone) -> None:
    """At the limit running requests once failed in the middle, for others that had just come."""
    limit = 16 * FIRST_BUFFER * models.token_bytes
    with patch(
        "atspeed.engine.model.host_memory._NODE_ROOM", 120
    ):  # together with prompt and root a full first buffer, or nearly
        async with opened(models.evaluator("target", open_kv_bytes=limit)) as evaluator:
            trees = [await evaluator.open(models.prompt(3, seed=n)) for n in range(14)]
            for tree in trees:
                evaluator.open_kv.reserve(tree, FIRST_BUFFER - 120)
            with pytest.raises(OverloadedError, match="kv_open_mb"):
                await first_pass(evaluator, models.prompt(3, seed=14))
            evaluator.open_kv.reserve(trees[0], FIRST_BUFFER + 1)
            evaluation, _ = await evaluator.evaluate(trees[0], np.array(models.naive.inner()), EVERYTHING)
            assert_same(models, dict(evaluation.items()), await alone(3, 0))
            for tree in trees:
                evaluator.end(tree)


@pytest.mark.parametrize("broken", ["run", "finish"])
async def test_failure_of_a_shared_pass_fails_no_other_request(models: Models, alone: Alone, broken: str) -> None:
    """After a failure of the model in a batch all requests run one by one. After a later one only that request fails."""
    async with opened(models.evaluator("target", limits=co_batched(3))) as evaluator:
        trees = [await evaluator.open(models.prompt(items, seed=1)) for items in (4, 5, 6)]
        memory, finish = evaluator.open_kv, evaluator._finish
        run = memory.run

        def run_alone(inputs: Sequence[tuple[ProgramRun, TreePass]]) -> list[PassResult]:
            if len(inputs) > 1:
                raise MemoryError
            return run(inputs)

        def finish_but_second(work: ProgramRun, *arguments: Any, **named: Any) -> object:
            if work.tree is trees[1]:
                raise MemoryError
            return finish(work, *arguments, **named)

        breaks: dict[str, AbstractContextManager[object]] = {
            "run": patch.object(memory, "run", run_alone),
            "finish": patch.object(evaluator, "_finish", finish_but_second),
        }
        with breaks[broken]:
            answers = await asyncio.gather(
                *(evaluator.evaluate(tree, np.array([ROOT, 1]), EVERYTHING) for tree in trees), return_exceptions=True
            )
        for tree in trees:
            evaluator.end(tree)
    for answer, items in zip(answers, (4, 5, 6), strict=True):
        if broken == "finish" and items == 5:
            assert isinstance(answer, MemoryError)
            continue
        assert not isinstance(answer, BaseException)
        assert_same(models, dict(answer[0].items()), await alone(items, 1))


@of_buffers
async def test_released_buffer_is_used_by_the_next_session(models: Models, alone: Alone) -> None:
    """Earlier content of the buffer changes no answer, on a shorter prompt or a longer one."""
    async with opened(models.evaluator("target")) as evaluator:
        for items in (5, 8, 2):
            tree = await evaluator.open(models.prompt(items, seed=1))
            evaluation, _ = await evaluator.evaluate(tree, np.array(models.naive.inner()), EVERYTHING)
            assert_same(models, dict(evaluation.items()), await alone(items, 1))
            tree.tokens.kv[:] = np.nan
            evaluator.end(tree)
        assert _idle_bytes(evaluator) == FIRST_BUFFER * models.token_bytes
