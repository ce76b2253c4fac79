"""A model over a catalogue: opens token trees on cached prefixes and evaluates their nodes, for draft and target alike."""

from __future__ import annotations

import asyncio
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np

from engine.bundle import ModelEntry
from engine.cost import PassCost
from engine.cost_curve import CostCurve, measure
from engine.decoder import Decoder, Float32
from engine.errors import CapacityError, PromptError
from engine.kv_cache import NO_OWNER, KvArray, KvLayout, block_keys, copy_blocks, namespace
from engine.kv_store import PrefixCache
from engine.scoring import Evaluation, Perturbation, ScoringRule, best_children
from engine.token_tree import TokenTree, TreePass
from engine.trie import ROOT, Int64, Pruning, Trie

# Nodes that fit beside a prompt and its first pass before the buffer has to grow.
_NODE_ROOM = 256


@dataclass(frozen=True)
class Selection:
    """Which children of an evaluated node are wanted: the best `limit` live ones, perturbed or not."""

    pruning: Pruning
    limit: int
    perturbation: Perturbation | None = None


@dataclass
class OpenTree:
    """A request's token tree in a model service. Until its first pass it has no memory of its own.

    keys: of the prompt's whole blocks. cached: the blocks that were found, until the first pass has read them.
    """

    tokens: TokenTree
    keys: list[bytes]
    cached: tuple[KvArray, ...]
    cost_of_opening: PassCost


class TreeEvaluator:
    """Evaluates token trees with one model. Passes run one at a time in a worker thread, outside the event loop.

    All methods are for the event loop, and none moves keys and values on it: a prompt's may be hundreds of megabytes, so
    the worker thread allocates them, copies them in and copies them out. Cancelling `evaluate` gives up waiting; a pass
    that already runs ends by itself and its result is dropped, so the state of a cancelled tree must not be used again.
    """

    def __init__(
        self, decoder: Decoder, entry: ModelEntry, trie: Trie, rule: ScoringRule, layout: KvLayout, cache: PrefixCache
    ) -> None:
        self.decoder, self.entry, self.trie, self.rule = decoder, entry, trie, rule
        self._layout, self._cache = layout, cache
        self._code_tokens = np.asarray(entry.code_tokens, dtype=np.int64)
        self._worker = ThreadPoolExecutor(max_workers=1, thread_name_prefix="onnx")

    async def open(self, prompt: Int64, *, tenant: str = "", owner: bytes = NO_OWNER) -> OpenTree:
        """Start a tree on a prompt [prompt], on as much of it as the prefix cache holds. owner: the tag of a stored user.

        Raises PromptError on an empty prompt, an unknown token id, or one too long for the model.
        """
        self._check_prompt(prompt)
        begun = time.perf_counter_ns()
        step = self._layout.block_tokens
        keys = block_keys(namespace(self.entry.fingerprint, self._layout, tenant), prompt, step, owner)
        # The last prompt token is always computed: its logits are the root's evaluation.
        cached = await self._cache.lookup(keys[: (len(prompt) - 1) // step])
        cost = PassCost(
            queue_ns=time.perf_counter_ns() - begun,
            memory_cached_tokens=cached.memory_tokens,
            redis_cached_tokens=cached.redis_tokens,
        )
        return OpenTree(self._empty_tree(prompt), keys, cached.blocks, cost)

    async def evaluate(self, tree: OpenTree, nodes: Int64, selection: Selection) -> tuple[Evaluation, PassCost]:
        """One pass: the best children of `nodes` [n], ascending inner nodes, not evaluated before on this tree.

        Parents are evaluated before or among `nodes`; the root is in the first pass, or the prompt is computed without it.
        Raises CapacityError when a node breaks that.
        """
        self._check_nodes(tree.tokens, nodes)
        queued = time.perf_counter_ns()
        loop = asyncio.get_running_loop()
        evaluation, computed, cost = await loop.run_in_executor(
            self._worker, self._pass, tree, nodes, selection, queued
        )
        if computed:
            self._cache.remember(tree.keys, computed)
        opening, tree.cost_of_opening = tree.cost_of_opening, PassCost()
        return evaluation, cost + opening

    async def warm_up(self) -> None:
        """Run one pass of each kind, so that the first request does not pay for allocations."""
        prompt = np.full(self._layout.block_tokens + 1, self.entry.prompt.prefix[0], dtype=np.int64)
        longest = self.entry.max_positions - self.trie.levels + 1
        everything = Selection(Pruning.none(), limit=1)
        tree = OpenTree(self._empty_tree(prompt[:longest]), [], (), PassCost())
        await self.evaluate(tree, np.array([ROOT]), everything)
        if self.trie.levels > 1:
            await self.evaluate(tree, self.trie.children(ROOT)[:1], everything)

    async def cost_curve(self, seconds: float) -> CostCurve:
        """Measure what passes cost, for about so long. Nothing else should run on the model meanwhile."""
        block, levels = self._layout.block_tokens, self.trie.levels
        blocks = (self.entry.prompt.max_tokens(levels) - 1) // block
        cached = sorted({0, blocks // 2 * block, blocks * block})
        most = self.entry.max_positions - (levels - 1) - cached[-1] + int(self.trie.level_start[levels]) - 1
        return await measure(self._rehearse, most, cached, seconds)

    async def _rehearse(self, new: int, cached: int) -> PassCost:
        """A first pass over `new` tokens, nodes of the trie as far as it has so many, on `cached` ones, a multiple of a block."""
        nodes = np.arange(min(new, int(self.trie.level_start[self.trie.levels])))
        prompt = np.full(cached + new - len(nodes) + 1, self.entry.prompt.prefix[0], dtype=np.int64)
        block = np.zeros(self._layout.block_shape, dtype=self.decoder.dtype)
        tree = OpenTree(self._empty_tree(prompt), [], (block,) * (cached // self._layout.block_tokens), PassCost())
        _, cost = await self.evaluate(tree, nodes, Selection(Pruning.none(), limit=1))
        return cost

    async def close(self) -> None:
        """Wait for the running pass, write what is pending, and stop."""
        await asyncio.to_thread(self._worker.shutdown)
        await self._cache.close()

    def _empty_tree(self, prompt: Int64) -> TokenTree:
        return TokenTree(prompt, self.decoder.empty_kv(0))

    def _pass(
        self, tree: OpenTree, nodes: Int64, selection: Selection, queued: int
    ) -> tuple[Evaluation, list[KvArray], PassCost]:
        """In the worker thread: the evaluation, the prompt's blocks that were computed, and the cost."""
        begun = time.perf_counter_ns()
        first = tree.tokens.length < len(tree.tokens.prompt)
        if first:
            self._prepare(tree, len(nodes))
        step = tree.tokens.plan_pass(self.trie, nodes, self._code_tokens)
        logits, log_normalizer = self._forward(tree.tokens, step)
        tree.tokens.commit(step, nodes)
        computed = self._computed_blocks(tree) if first else []
        forward = time.perf_counter_ns()
        evaluation = best_children(
            self.trie,
            nodes,
            logits,
            log_normalizer,
            rule=self.rule,
            pruning=selection.pruning,
            limit=selection.limit,
            perturbation=selection.perturbation,
        )
        ended = time.perf_counter_ns()
        return evaluation, computed, PassCost(begun - queued, forward - begun, ended - forward, len(step.tokens))

    def _prepare(self, tree: OpenTree, nodes: int) -> None:
        """Room for a tree's first pass and some nodes more, with the cached blocks in it; once, even if the pass is refused."""
        if not tree.tokens.length:
            tree.tokens.reserve(len(tree.tokens.prompt) + nodes + _NODE_ROOM)
            tree.tokens.fill_prefix(tree.cached)

    def _forward(self, tree: TokenTree, step: TreePass) -> tuple[Float32, Float32]:
        new = len(step.tokens)
        tree.reserve(new)
        past, new_kv = tree.kv[:, :, : tree.length], tree.kv[:, :, tree.length : tree.length + new]
        return self.decoder.run(step.tokens, step.positions, step.visible, past, step.rows, new_kv)

    def _computed_blocks(self, tree: OpenTree) -> list[KvArray]:
        """Copies of the prompt's blocks that no cache had; the tree lets go of those that one had."""
        computed = copy_blocks(self._layout, tree.tokens.kv, len(tree.cached), len(tree.keys))
        tree.cached = ()
        return computed

    def _check_prompt(self, prompt: Int64) -> None:
        longest = self.entry.max_positions - (self.trie.levels - 1)
        if not 0 < len(prompt) <= longest:
            raise PromptError(f"prompt: must have between 1 and {longest} tokens, got {len(prompt)}")
        if prompt.min() < 0 or prompt.max() >= self.entry.vocab_size:
            raise PromptError(f"prompt: a token id is outside the vocabulary of {self.entry.vocab_size}")

    def _check_nodes(self, tree: TokenTree, nodes: Int64) -> None:
        inner = int(self.trie.level_start[self.trie.levels])
        if not len(nodes) or nodes[0] < ROOT or nodes[-1] >= inner or (np.diff(nodes) <= 0).any():
            raise CapacityError(f"nodes: must be one or more ascending node ids between 0 and {inner - 1}")
        started = tree.length >= len(tree.prompt)
        if started != (nodes[0] != ROOT):
            raise CapacityError("nodes: the root belongs to the first pass of a tree, and only to it")
        if any(node in tree.slots for node in nodes.tolist()):
            raise CapacityError("nodes: a node was evaluated before on this tree")
