"""A model over a catalogue: opens token trees on cached prefixes and evaluates their nodes, for draft and target alike."""

from __future__ import annotations

import time
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import partial, reduce
from operator import add
from typing import Any, TypeVar, cast

import numpy as np

from atspeed.engine.arrays import Int64, KvArray
from atspeed.engine.bundle.manifest import ModelEntry
from atspeed.engine.errors import CapacityError, NoNumbersError, PromptError
from atspeed.engine.kv.buffer_pool import BufferPool, capacity_for
from atspeed.engine.kv.memory_cache import NO_OWNER, KvLayout, block_keys, copy_blocks, namespace
from atspeed.engine.kv.prefix_cache import PrefixCache
from atspeed.engine.model.batch_decoder import BatchDecoder, TreeInput, TreeOutput
from atspeed.engine.model.batcher import Batcher, BatchLimits, PassSize, Reschedule, Ticket
from atspeed.engine.model.cost_curve import CostCurve, measure
from atspeed.engine.model.decoder import Decoder
from atspeed.engine.model.pass_stats import PassStats
from atspeed.engine.model.token_tree import TokenTree, TreePass
from atspeed.engine.search.scoring import Evaluation, Perturbation, ScoringRule, best_children
from atspeed.engine.search.trie import ROOT, Pruning, Trie

# Nodes that fit beside a prompt and its first pass before the buffer has to grow.
_NODE_ROOM = 128
_OPEN_KV_BYTES = 4 * 2**30
Part = TypeVar("Part")
Found = TypeVar("Found")

# Passes of which each depends on what came of the last: yields the nodes of one, is sent their evaluation, returns what it found.
PassProgram = Generator[Int64, Evaluation, Found]


@dataclass(frozen=True)
class Selection:
    """Which children of an evaluated node are wanted: the best `limit` live ones, perturbed or not."""

    pruning: Pruning
    limit: int
    perturbation: Perturbation | None = None


@dataclass(frozen=True)
class PassRecord:
    """A pass that was made, over so many nodes. From when it queued up until it was done, by `time.perf_counter_ns`.

    valid: whether its scores are numbers.
    """

    nodes: int
    cost: PassStats
    queued_ns: int
    done_ns: int
    valid: bool = True


@dataclass
class OpenTree:
    """A request's token tree in a model service. Until its first pass it has no memory of its own.

    keys: of the prompt's whole blocks. cached: the blocks that were found, until the first pass has read them. computed: those
    that no cache had, from the first pass until the cache has them. cost_of_opening: until a pass has it in its own.
    since: when it was opened, by `time.monotonic`; its passes come before those of younger trees. rehearsal: whether nobody waits
    for it, so that its passes wait for nobody. capacity: tokens that are reserved for it.
    passes: those that were made. newest: the work that was queued last. While that is not done, the worker thread alone
    touches the tree.
    """

    tokens: TokenTree
    keys: list[bytes]
    cached: tuple[KvArray, ...]
    cost_of_opening: PassStats
    since: float = field(default_factory=time.monotonic)
    rehearsal: bool = False
    capacity: int = 0
    computed: list[KvArray] = field(default_factory=list)
    passes: list[PassRecord] = field(default_factory=list)
    newest: Ticket[TreeWork, object] | None = None


@dataclass
class TreeWork:
    """Passes over one tree. nodes: of the next one; queued_ns: since when it waits for its turn."""

    tree: OpenTree
    steps: PassProgram[Any]
    selection: Selection
    nodes: Int64
    queued_ns: int


class TreeEvaluator:
    """Evaluates token trees with one model. Passes run one at a time in a worker thread, outside the event loop; those that
    wait together run together, as far as the limits allow.

    All methods are for the event loop, and none moves keys and values on it: a prompt's may be hundreds of megabytes, so
    the worker thread allocates them, copies them in and copies them out. Cancelling `evaluate` or `follow` gives up waiting:
    a pass that has not begun never does; one that runs ends by itself and its result is dropped, so of a cancelled tree
    nothing may be asked any more. `end` it all the same.

    open_kv: the memory of open trees, for at most `open_kv_bytes`.
    """

    def __init__(
        self,
        decoder: Decoder,
        entry: ModelEntry,
        trie: Trie,
        rule: ScoringRule,
        layout: KvLayout,
        cache: PrefixCache,
        *,
        limits: BatchLimits | None = None,
        open_kv_bytes: int = _OPEN_KV_BYTES,
    ) -> None:
        self.decoder = decoder
        self.entry = entry
        self.trie = trie
        self.rule = rule
        self.open_kv = BufferPool(decoder.empty_kv, open_kv_bytes)
        self._layout = layout
        self._cache = cache
        self._code_tokens = np.asarray(entry.code_tokens, dtype=np.int64)
        self._batch_decoder = BatchDecoder(decoder)
        self._batcher = Batcher(self._run, limits or BatchLimits())

    @property
    def waiting_passes(self) -> int:
        """How many passes wait for the worker thread."""
        return self._batcher.waiting

    async def open(self, prompt: Int64, *, tenant: str = "", owner: bytes = NO_OWNER) -> OpenTree:
        """Start a tree on a prompt [prompt], on as much of it as the prefix cache holds. End it with `end`.

        owner: the tag of a stored user.

        Raises PromptError on an empty prompt, an unknown token id, or one too long for the model.
        """
        self._check_prompt(prompt)
        begun = time.perf_counter_ns()
        step = self._layout.block_tokens
        chain = namespace(self.entry.fingerprint, self._layout, tenant)
        keys = block_keys(chain, prompt, step, owner, template_tokens=self._template_tokens(prompt))
        # The last prompt token is always computed: its logits are the root's evaluation.
        cached = await self._cache.lookup(keys[: (len(prompt) - 1) // step])
        cost = PassStats(
            lookup_ns=time.perf_counter_ns() - begun,
            memory_cached_tokens=cached.memory_tokens,
            redis_cached_tokens=cached.redis_tokens,
        )
        return OpenTree(self._empty_tree(prompt), keys, cached.blocks, cost)

    async def evaluate(self, tree: OpenTree, nodes: Int64, selection: Selection) -> tuple[Evaluation, PassStats]:
        """One pass: the best children of `nodes` [n], ascending inner nodes, not evaluated before on this tree.

        Parents are evaluated before or among `nodes`; the root is in the first pass, or the prompt is computed without it.
        Raises CapacityError when a node breaks that, OverloadedError when the queue or the open trees' memory is full, and
        NoNumbersError, after which the tree is of no use: it holds keys and values that are no numbers either.
        """
        return await self.run_steps(tree, _one_pass(nodes), selection)

    async def run_steps(
        self, tree: OpenTree, steps: PassProgram[Found], selection: Selection
    ) -> tuple[Found, PassStats]:
        """Pass after pass, as for `evaluate` each, and what they found in the end.

        The steps are taken in the worker thread: from one pass to the next nothing waits for the event loop, and where no older
        request waits, the next begins at once. Raises what they raise.
        """
        made = len(tree.passes)
        try:
            nodes = next(steps)
        except StopIteration as end:
            return cast("Found", end.value), PassStats()
        size = self._admitted(tree, nodes)
        work = TreeWork(tree, steps, selection, nodes, time.perf_counter_ns())
        tree.newest = self._batcher.put(work, size, since=tree.since, patient=not tree.rehearsal)
        try:
            found = await self._batcher.outcome(tree.newest)
        finally:
            self._remember(tree)
        return cast("Found", found), reduce(add, [record.cost for record in tree.passes[made:]])

    def end(self, tree: OpenTree) -> None:
        """Let go of a tree and its memory: at once, or when the pass that still writes to it has ended."""
        if tree.newest is None or tree.newest.done.done():
            self._release(tree)
        else:
            tree.newest.done.add_done_callback(lambda _: self._release(tree))

    async def warm_up(self) -> None:
        """Run one pass of each kind, so that the first request does not pay for allocations."""
        prompt = np.full(self._layout.block_tokens + 1, self.entry.prompt.prefix[0], dtype=np.int64)
        everything = Selection(Pruning.none(), limit=1)
        tree = self.rehearsal(prompt[: self.entry.max_positions - self.trie.levels + 1])
        try:
            with suppress(NoNumbersError):  # it is for `plain_passes` to say whether that matters
                await self.evaluate(tree, np.array([ROOT]), everything)
                if self.trie.levels > 1:
                    await self.evaluate(tree, self.trie.children(ROOT)[:1], everything)
        finally:
            self.end(tree)

    def rehearsal(self, prompt: Int64, cached: tuple[KvArray, ...] = ()) -> OpenTree:
        """A tree that nobody waits for, on blocks that are made up; no cache keeps anything of it. End it with `end`."""
        return OpenTree(self._empty_tree(prompt), [], cached, PassStats(), rehearsal=True)

    async def cost_curve(self, seconds: float) -> CostCurve:
        """Measure what passes cost, for about so long. Nothing else should run on the model meanwhile."""
        block, levels = self._layout.block_tokens, self.trie.levels
        blocks = (self.entry.prompt.max_tokens(levels) - 1) // block
        cached = sorted({0, blocks // 2 * block, blocks * block})
        most = self.entry.max_positions - (levels - 1) - cached[-1] + int(self.trie.level_start[levels]) - 1
        return await measure(self._rehearse, most, cached, seconds)

    async def _rehearse(self, new: int, cached: int) -> PassStats:
        """A first pass over `new` tokens, nodes of the trie as far as it has so many, on `cached` ones, a multiple of a block."""
        nodes = np.arange(min(new, int(self.trie.level_start[self.trie.levels])))
        prompt = np.full(cached + new - len(nodes) + 1, self.entry.prompt.prefix[0], dtype=np.int64)
        block = np.zeros(self._layout.block_shape, dtype=self.decoder.dtype)
        tree = self.rehearsal(prompt, (block,) * (cached // self._layout.block_tokens))
        try:
            with suppress(NoNumbersError):
                await self.evaluate(tree, nodes, Selection(Pruning.none(), limit=1))
        finally:
            self.end(tree)
        return tree.passes[-1].cost

    async def close(self) -> None:
        """Wait for the passes that are queued, and stop. The cache stays the caller's to close."""
        await self._batcher.close()

    def _empty_tree(self, prompt: Int64) -> TokenTree:
        return TokenTree(prompt, self.decoder.empty_kv(0))

    def _remember(self, tree: OpenTree) -> None:
        """Give the cache what a first pass computed for it, whatever became of the later ones."""
        computed, tree.computed = tree.computed, []
        if computed:
            self._cache.remember(tree.keys, computed)

    def _admitted(self, tree: OpenTree, nodes: Int64) -> PassSize:
        """A pass that may wait for its turn. Raises CapacityError, OverloadedError; see `evaluate`."""
        self._check_nodes(tree.tokens, nodes)
        size = self._size(tree, nodes)
        self._reserve(tree, size)
        return size

    def _size(self, tree: OpenTree, nodes: Int64) -> PassSize:
        """What a pass will compute and read, the cached blocks included that the tree still has to be filled with."""
        cached = tree.tokens.length or len(tree.cached) * self._layout.block_tokens
        return PassSize(max(0, len(tree.tokens.prompt) - cached) + len(nodes) - int(nodes[0] == ROOT), cached)

    def _reserve(self, tree: OpenTree, size: PassSize) -> None:
        """Room for what the tree will hold after the pass; a first time some more, then half as much again."""
        needed = size.cached_tokens + size.new_tokens
        if needed <= tree.capacity:
            return
        grown = tree.capacity + tree.capacity // 2
        capacity = capacity_for(max(needed, grown) if tree.capacity else needed + _NODE_ROOM)
        self.open_kv.reserve(capacity, growing=tree.capacity > 0)
        self._cancel_unused(tree)
        tree.capacity = capacity

    def _cancel_unused(self, tree: OpenTree) -> None:
        """Give up what was reserved for a pass that never began."""
        if tree.capacity > tree.tokens.kv.shape[2]:
            self.open_kv.cancel(tree.capacity)

    def _release(self, tree: OpenTree) -> None:
        self._cancel_unused(tree)
        held, tree.tokens.kv = tree.tokens.kv, self.decoder.empty_kv(0)
        if held.size:
            self.open_kv.give_back(held)
        tree.capacity = 0
        tree.cached = ()

    def _run(self, works: Sequence[TreeWork]) -> Iterator[object]:
        """In the worker thread: several trees' passes as one. What fails for one tree does not take the others with it. Where
        the model itself fails nothing has been committed, and each may be run again.
        """
        begun = time.perf_counter_ns()
        steps = [_attempt(self._prepare, work) for work in works]
        ready = [(work, step) for work, step in zip(works, steps, strict=True) if isinstance(step, TreePass)]
        inputs = [_input(work.tree.tokens, step) for work, step in ready]
        outputs = iter(self._batch_decoder.run(inputs) if inputs else ())
        batch_tokens = len(ready) * max((len(step.tokens) for _, step in ready), default=0)
        forward = PassStats(
            forward_ns=time.perf_counter_ns() - begun, batch_requests=len(ready), batch_tokens=batch_tokens
        )
        for work, step in zip(works, steps, strict=True):
            if isinstance(step, TreePass):
                yield _attempt(
                    partial(self._finish, step=step, output=next(outputs), begun=begun, forward=forward), work
                )
            else:
                yield step

    def _prepare(self, work: TreeWork) -> TreePass:
        """Room for the pass, before a tree's first one with the cached blocks in it, even if the pass is refused then."""
        tree = work.tree
        if tree.tokens.kv.shape[2] < tree.capacity:
            outgrown = tree.tokens.move_to(self.open_kv.take(tree.capacity))
            if outgrown.size:
                self.open_kv.give_back(outgrown)
        if not tree.tokens.length:
            tree.tokens.fill_prefix(tree.cached)
        return tree.tokens.plan_pass(self.trie, work.nodes, self._code_tokens)

    def _finish(self, work: TreeWork, step: TreePass, output: TreeOutput, begun: int, forward: PassStats) -> object:
        """What the pass says of the tree's nodes, and what follows from it: another pass, or what was looked for."""
        tree = work.tree
        first = tree.tokens.length < len(tree.tokens.prompt)
        tree.tokens.commit(step, work.nodes)
        selecting = time.perf_counter_ns()
        evaluation = self._evaluation(work, output)
        valid, copying = isinstance(evaluation, Evaluation), time.perf_counter_ns()
        if first and valid:  # a node that spoils a pass spoils the prompt's keys and values in it too
            tree.computed = self._computed_blocks(tree)
        done = time.perf_counter_ns()
        cost = replace(
            tree.cost_of_opening,
            queue_ns=begun - work.queued_ns,
            forward_ns=forward.forward_ns + done - copying,
            selection_ns=copying - selecting,
            new_tokens=len(step.tokens),
            batch_requests=forward.batch_requests,
            batch_tokens=forward.batch_tokens,
        )
        tree.cost_of_opening = PassStats()
        tree.passes.append(PassRecord(len(work.nodes), cost, work.queued_ns, done, valid))
        return self._next(work, evaluation) if isinstance(evaluation, Evaluation) else evaluation

    def _evaluation(self, work: TreeWork, output: TreeOutput) -> Evaluation | NoNumbersError:
        selection = work.selection
        try:
            return best_children(
                self.trie,
                work.nodes,
                output.code_logits,
                output.log_normalizer,
                rule=self.rule,
                pruning=selection.pruning,
                limit=selection.limit,
                perturbation=selection.perturbation,
            )
        except NoNumbersError as error:
            return error

    def _next(self, work: TreeWork, evaluation: Evaluation) -> object:
        """The work's next pass, or what it has found."""
        try:
            work.nodes = work.steps.send(evaluation)
        except StopIteration as end:
            return end.value
        size = self._admitted(work.tree, work.nodes)
        work.queued_ns = time.perf_counter_ns()
        return Reschedule(size)

    def _computed_blocks(self, tree: OpenTree) -> list[KvArray]:
        """Copies of the prompt's blocks that no cache had; the tree lets go of those that one had."""
        computed = copy_blocks(self._layout, tree.tokens.kv, len(tree.cached), len(tree.keys))
        tree.cached = ()
        return computed

    def _template_tokens(self, prompt: Int64) -> int:
        """How many tokens at a prompt's beginning are the template's and not the user's."""
        prefix = self.entry.prompt.prefix
        return len(prefix) if tuple(prompt[: len(prefix)].tolist()) == prefix else 0

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
        if not tree.slots.keys().isdisjoint(nodes.tolist()):
            raise CapacityError("nodes: a node was evaluated before on this tree")


def _one_pass(nodes: Int64) -> PassProgram[Evaluation]:
    return (yield nodes)


def _input(tree: TokenTree, step: TreePass) -> TreeInput:
    end = tree.length + len(step.tokens)
    return TreeInput(step, tree.kv[:, :, : tree.length], tree.kv[:, :, tree.length : end])


def _attempt(compute: Callable[[TreeWork], Part], work: TreeWork) -> Part | Exception:
    try:
        return compute(work)
    except Exception as error:  # noqa: BLE001 - it is for the request whose pass this is
        return error
