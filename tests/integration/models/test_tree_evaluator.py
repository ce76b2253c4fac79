"""A node's evaluation is the checkpoint's score of its path, for all co-batched nodes, caches and passes."""

from __future__ import annotations

import math
import threading
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from typing import Any

import numpy as np
import pytest

from atspeed.engine.arrays import Int64, KvArray
from atspeed.engine.errors import CapacityError, PromptError
from atspeed.engine.kv import memory_cache
from atspeed.engine.kv.buffer_pool import BufferPool
from atspeed.engine.kv.tier import KvTier
from atspeed.engine.model import prompt_kv
from atspeed.engine.model.token_tree import TokenTree
from atspeed.engine.model.tree_evaluator import TreeEvaluator
from atspeed.engine.model.tree_session import Selection
from atspeed.engine.search.scoring import Children, Evaluation, ScoringRule
from atspeed.engine.search.trie import ROOT, Pruning
from tests.bundles import shared_tokens, write_bundle
from tests.catalogues import random_catalogue, tailed_catalogue
from tests.oracles.models import BLOCK_TOKENS, DictStore, Models
from tests.oracles.sequence_model import SequenceModel

EVERYTHING = Selection(Pruning.none(), limit=100)
# float32 sums in another order: far below what a wrong mask or position would do (0.1 and more on these weights).
ABSOLUTE, RELATIVE = 1e-4, 1e-5


DECODERS = [(ScoringRule.VOCAB, "llama"), (ScoringRule.TRIE, "qwen3"), (ScoringRule.CODES, "qwen2")]


def bundle_of(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Models:
    rule, architecture, *where = request.param
    catalogue, tokens = random_catalogue(40, (6, 5, 4), seed=2), None
    if rule is ScoringRule.CODES:
        catalogue = tailed_catalogue(40, (6, 5, 4), seed=2)
        tokens = shared_tokens(catalogue)
    root = tmp_path_factory.mktemp("bundle")
    made = write_bundle(root, catalogue, rule=rule, architecture=architecture, code_tokens=tokens)
    return Models.load(made, paged="paged" in where)


HOST = [*DECODERS, (ScoringRule.TRIE, "t5"), (ScoringRule.CODES, "t5")]
# Keys and values in pages, as on a GPU; here on the CPU.
PAGED = [(*of, "paged") for of in DECODERS]


@pytest.fixture(scope="module", params=[*HOST, *PAGED], ids="-".join)
def models(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Models:
    return bundle_of(request, tmp_path_factory)


@pytest.fixture(scope="module", params=DECODERS, ids="-".join)
def decoders(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Models:
    """Without an encoder: the beginning of a prompt can be cached alone."""
    return bundle_of(request, tmp_path_factory)


@asynccontextmanager
async def opened(models: Models, memory_blocks: int = 0, tier: KvTier | None = None) -> AsyncIterator[TreeEvaluator]:
    evaluator = models.evaluator("target", memory_blocks=memory_blocks, tier=tier)
    yield evaluator
    await evaluator.close()


async def evaluate(evaluator: TreeEvaluator, prompt: Int64, *passes: list[int]) -> dict[int, Children]:
    """All nodes of some passes over one tree."""
    tree = await evaluator.open(prompt)
    found: dict[int, Children] = {}
    for nodes in passes:
        evaluation, _ = await evaluator.evaluate(tree, np.array(nodes), EVERYTHING)
        evaluation.validate(evaluator.trie)
        found |= evaluation.items()
    return found


def assert_same(found: dict[int, Children], expected: dict[int, Children]) -> None:
    assert found.keys() == expected.keys()
    for node, children in found.items():
        ours, theirs = (dict(zip(c.node.tolist(), c.logp.tolist(), strict=True)) for c in (children, expected[node]))
        assert ours == pytest.approx(theirs, rel=RELATIVE, abs=ABSOLUTE)
        assert children.log_mass == pytest.approx(expected[node].log_mass, rel=RELATIVE, abs=ABSOLUTE)


@pytest.mark.parametrize("items", [1, 4, 8])
async def test_every_node_is_evaluated_as_the_checkpoint_reads_its_path(models: Models, items: int) -> None:
    """The whole trie in one pass, against the torch model on every prefix as a plain sequence."""
    naive, prompt = models.naive, models.prompt(items, seed=items)
    code_tokens = models.bundle.bundle.manifest.target.code_tokens
    oracle = SequenceModel(models.bundle.target, naive, code_tokens, prompt, models.rule)
    async with opened(models) as evaluator:
        found = await evaluate(evaluator, prompt, naive.inner())
    for node, children in found.items():
        path = naive.nodes[node]
        expected = {code: oracle(path, code) for code in naive.children(path)}
        ours = {
            naive.nodes[c][-1]: logp for c, logp in zip(children.node.tolist(), children.logp.tolist(), strict=True)
        }
        assert ours == pytest.approx(expected, rel=RELATIVE, abs=ABSOLUTE)
        assert children.log_mass == pytest.approx(
            math.log(math.fsum(map(math.exp, expected.values()))), rel=RELATIVE, abs=ABSOLUTE
        )


async def test_co_batched_nodes_and_order_of_passes_change_no_result(models: Models) -> None:
    """The whole trie at once; level by level; and every node alone with its ancestors, root first, one node a pass."""
    naive, prompt = models.naive, models.prompt(5, seed=1)
    inner = naive.inner()
    levels = [[n for n in inner if len(naive.nodes[n]) == depth] for depth in range(naive.levels)]
    async with opened(models) as evaluator:
        at_once = await evaluate(evaluator, prompt, inner)
        assert_same(await evaluate(evaluator, prompt, *levels), at_once)
        for node in inner[1::4]:
            path = naive.nodes[node]
            chain = [naive.id_of[path[:end]] for end in range(len(path) + 1)]
            alone = {n: at_once[n] for n in chain}
            assert_same(await evaluate(evaluator, prompt, *[[n] for n in chain]), alone)
            assert_same(await evaluate(evaluator, prompt, chain), alone)


async def test_every_state_of_the_cache_gives_the_same_result(decoders: Models) -> None:
    """Cold; all in memory; part in memory; all in the store; and a prefix of another user's longer history."""
    prompt, longer = decoders.prompt(10, seed=3), decoders.prompt(11, seed=3)
    blocks = (len(prompt) - 1) // BLOCK_TOKENS
    assert blocks >= 4
    nodes, store = decoders.naive.inner(), DictStore()
    async with opened(decoders) as cold:
        expected = await evaluate(cold, prompt, nodes)
    async with opened(decoders, 100, store) as warm:
        assert_same(await evaluate(warm, prompt, nodes), expected)
        tree = await warm.open(prompt)
        assert tree.lookup_stats.cached_tokens_by_tier["memory"] == blocks * BLOCK_TOKENS
        assert_same(await evaluate(warm, prompt, nodes), expected)
        _, cost = await warm.evaluate(tree, np.array(nodes), EVERYTHING)
        assert cost.new_tokens == len(prompt) - blocks * BLOCK_TOKENS + len(nodes) - 1
    async with opened(decoders, 2, store) as narrow:
        assert_same(await evaluate(narrow, prompt, nodes), expected)
        tree = await narrow.open(prompt)
        assert tree.lookup_stats.cached_tokens_by_tier["memory"] == 2 * BLOCK_TOKENS
        assert tree.lookup_stats.cached_tokens_by_tier[store.name] == (blocks - 2) * BLOCK_TOKENS
        assert_same(await evaluate(narrow, prompt, nodes), expected)
    async with opened(decoders, 100) as shared:
        await evaluate(shared, longer, [ROOT])
        assert (await shared.open(prompt)).lookup_stats.cached_tokens_by_tier["memory"] > 0
        assert_same(await evaluate(shared, prompt, nodes), expected)


@pytest.mark.parametrize("models", HOST, indirect=True, ids="-".join)
async def test_keys_and_values_move_in_the_worker_thread_alone(models: Models, monkeypatch: pytest.MonkeyPatch) -> None:
    """A long prompt's are hundreds of megabytes: on the event loop they would hold up health checks and cancellation."""
    moves: list[tuple[str, str]] = []

    def watch(owner: Any, name: str) -> None:
        original = getattr(owner, name)

        def watched(*args: object) -> object:
            moves.append((name, threading.current_thread().name))
            return original(*args)

        monkeypatch.setattr(owner, name, watched)

    prompt = models.prompt(7, seed=3)
    watch(TokenTree, "move_to")
    watch(BufferPool, "take")
    watch(TokenTree, "fill_prefix")
    watch(prompt_kv, "copy_blocks")
    watch(memory_cache, "_read_only_copy")
    async with opened(models, 100) as evaluator:
        for _ in range(2):
            tree = await evaluator.open(prompt)
            assert tree.tokens.kv.size == 0, "a stream that waits for its turn holds memory"
            await evaluator.evaluate(tree, np.array([ROOT]), EVERYTHING)
            assert tree.cached_blocks == ()
    assert {name for name, _ in moves} == {"move_to", "take", "fill_prefix", "copy_blocks", "_read_only_copy"}
    assert all(thread.startswith("onnx") for _, thread in moves), moves


async def test_only_the_blocks_that_no_cache_had_are_written(decoders: Models) -> None:
    """Those of a longer history, on top of a shorter one's; and none twice, whatever else the tree evaluates."""
    written: list[list[bytes]] = []

    class Recorder(DictStore):
        async def put(self, blocks: Mapping[bytes, KvArray]) -> None:
            written.append(list(blocks))
            await super().put(blocks)

    inner = decoders.naive.inner()
    short, longer = decoders.prompt(4, seed=3)[:-1], decoders.prompt(8, seed=3)
    longer[: len(short)] = short
    async with opened(decoders, 100, Recorder()) as evaluator:
        for prompt in (short, longer, longer):
            await evaluate(evaluator, prompt, [ROOT], inner[1:])
        expected = (await evaluator.open(longer)).keys
    blocks = len(short) // BLOCK_TOKENS
    assert written == [expected[:blocks], expected[blocks:]]


async def test_tenants_share_no_prefix(models: Models) -> None:
    prompt = models.prompt(7, seed=3)
    async with opened(models, 100) as evaluator:
        await evaluate(evaluator, prompt, [ROOT])
        assert (await evaluator.open(prompt)).lookup_stats.cached_tokens > 0
        assert (await evaluator.open(prompt, tenant="b")).lookup_stats.cached_tokens == 0


async def test_a_tree_grows_beyond_its_first_buffer(models: Models, monkeypatch: pytest.MonkeyPatch) -> None:
    """Many small passes on a buffer that starts without room for a second one."""
    naive, prompt = models.naive, models.prompt(5, seed=1)
    async with opened(models) as evaluator:
        expected = await evaluate(evaluator, prompt, naive.inner())
        monkeypatch.setattr("atspeed.engine.model.host_memory._NODE_ROOM", 0)
        assert_same(await evaluate(evaluator, prompt, *[[node] for node in naive.inner()]), expected)


async def test_concurrent_requests_do_not_mix(models: Models) -> None:
    """Two trees whose passes alternate."""
    prompts, naive = [models.prompt(4, seed=7), models.prompt(6, seed=8)], models.naive
    levels = [np.array([n for n in naive.inner() if len(naive.nodes[n]) == depth]) for depth in range(naive.levels)]
    async with opened(models) as evaluator:
        expected = [await evaluate(evaluator, prompt, naive.inner()) for prompt in prompts]
        trees = [await evaluator.open(prompt) for prompt in prompts]
        found: list[dict[int, Children]] = [{}, {}]
        for nodes in levels:
            for tree, into in zip(trees, found, strict=True):
                into |= (await evaluator.evaluate(tree, nodes, EVERYTHING))[0].items()
    for ours, theirs in zip(found, expected, strict=True):
        assert_same(ours, theirs)


@pytest.mark.parametrize(
    ("passes", "problem"),
    [
        ([[ROOT], [ROOT]], "root belongs to the first pass"),
        ([[1]], "root belongs to the first pass"),
        ([[ROOT, -1]], "ascending"),
        ([[]], "one or more"),
        ([[ROOT, 2, 1]], "ascending"),
        ([[ROOT, 1, 1]], "ascending"),
        ([[ROOT, 1], [1]], "evaluated before"),
        ([[ROOT], [1], [1, 2]], "evaluated before"),
    ],
)
async def test_a_misuse_of_a_tree_is_refused(models: Models, passes: list[list[int]], problem: str) -> None:
    async with opened(models) as evaluator:
        *before, last = passes
        tree = await evaluator.open(models.prompt(2, seed=0))
        for nodes in before:
            await evaluator.evaluate(tree, np.array(nodes), EVERYTHING)
        with pytest.raises(CapacityError, match=problem):
            await evaluator.evaluate(tree, np.array(last, dtype=np.int64), EVERYTHING)


async def test_orphan_or_leaf_is_refused_and_the_session_stays_usable(models: Models) -> None:
    """A refused pass leaves no trace: the same tree still gives what a fresh one gives, on a cached prefix too."""
    naive, prompt = models.naive, models.prompt(5, seed=0)
    orphan = next(node for node in naive.inner() if len(naive.nodes[node]) == 2)
    leaf, parent = max(naive.inner()) + 1, naive.id_of[naive.nodes[orphan][:1]]
    async with opened(models, 100) as evaluator:
        expected = await evaluate(evaluator, prompt, [ROOT, parent, orphan])
        tree = await evaluator.open(prompt)
        for nodes, problem in (([ROOT, orphan], "ancestor"), ([ROOT, leaf], "between 0 and")):
            with pytest.raises(CapacityError, match=problem):
                await evaluator.evaluate(tree, np.array(nodes), EVERYTHING)
        found: Evaluation = (await evaluator.evaluate(tree, np.array([ROOT, parent, orphan]), EVERYTHING))[0]
        assert_same(dict(found.items()), expected)


async def test_a_place_after_the_end_of_a_path_is_refused(models: Models) -> None:
    ended = [node for node, path in enumerate(models.naive.nodes) if path[-1:] == (-1,) and len(path) < 4]
    assert bool(ended) == (models.rule is ScoringRule.CODES)
    async with opened(models) as evaluator:
        for node in ended[:3]:
            tree = await evaluator.open(models.prompt(2, seed=0))
            parent = models.catalogue.trie.with_ancestors([node])
            with pytest.raises(CapacityError, match="an ended place has no token"):
                await evaluator.evaluate(tree, np.append(ROOT, parent).astype(np.int64), EVERYTHING)


async def test_prompts_that_the_model_cannot_read_are_refused(models: Models) -> None:
    """The longest prompt that it can read leaves room for a whole path."""
    entry = models.bundle.bundle.manifest.target
    longest = entry.max_positions - (models.naive.levels - 1)
    async with opened(models) as evaluator:
        for prompt, problem in (
            (np.ones(longest + 1, dtype=np.int64), f"between 1 and {longest}"),
            (np.empty(0, dtype=np.int64), f"between 1 and {longest}"),
            (np.array([1, entry.vocab_size]), "outside the vocabulary"),
            (np.array([-1, 1]), "outside the vocabulary"),
        ):
            with pytest.raises(PromptError, match=problem):
                await evaluator.open(prompt)
        found = await evaluate(evaluator, np.ones(longest, dtype=np.int64), models.naive.inner())
        assert len(found) == len(models.naive.inner())


async def test_warm_up_leaves_no_memory_and_no_block(models: Models) -> None:
    async with opened(models, 100) as evaluator:
        await evaluator.warm_up()
        prompt = models.prompt(7, seed=3)
        assert (await evaluator.open(prompt)).lookup_stats.cached_tokens == 0


async def test_a_catalogue_of_one_level_can_be_served(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Items of one code have no inner node but the root; warming up once asked for a leaf."""
    root = tmp_path_factory.mktemp("one-level")
    models = Models.load(write_bundle(root, random_catalogue(5, (9,), seed=0)))
    async with opened(models) as evaluator:
        await evaluator.warm_up()
        found = await evaluate(evaluator, models.prompt(2, seed=0), [ROOT])
        assert sorted(found[ROOT].node.tolist()) == models.catalogue.trie.children(ROOT).tolist()
