"""Evaluation of trie nodes by one model, on token trees with a cached prefix."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import replace
from functools import partial, reduce
from operator import add
from typing import TypeVar, cast

import numpy as np

from atspeed.engine.arrays import Float32, Float64, Int64, KvArray
from atspeed.engine.bundle.manifest import ModelEntry
from atspeed.engine.errors import CapacityError, NoNumbersError, PromptError
from atspeed.engine.kv.memory_cache import NO_USER_KEY, KvLayout
from atspeed.engine.kv.prefix_cache import PrefixCache
from atspeed.engine.model.batch_decoder import TreeOutput
from atspeed.engine.model.batcher import Batcher, BatchLimits, PassSize, Reschedule
from atspeed.engine.model.cost_curve import CostCurve, measure
from atspeed.engine.model.decoder import Decoder
from atspeed.engine.model.device_decoder import DeviceDecoder, ModelDecoder
from atspeed.engine.model.device_memory import DeviceMemory
from atspeed.engine.model.device_selector import DeviceSelector
from atspeed.engine.model.host_memory import HostMemory
from atspeed.engine.model.invariance import Moved, TreeSizes, check_invariance
from atspeed.engine.model.kv_memory import KvMemory, PassResult
from atspeed.engine.model.pass_stats import PassStats
from atspeed.engine.model.prompt_kv import prompt_kv
from atspeed.engine.model.token_tree import TokenTree, TreePass
from atspeed.engine.model.tree_session import CompletedPass, Found, PassProgram, ProgramRun, Selection, TreeSession
from atspeed.engine.search.scoring import Evaluation, ScoringRule, best_children, codes_normalizer
from atspeed.engine.search.trie import ENDED, ROOT, Pruning, Trie

_OPEN_KV_BYTES = 4 * 2**30  # default of the setting kv_open_mb
# Trees of the check at the load. Before the sums had an order, nearly every node of such a tree moved.
_CHECKED_TREES, _CHECKED_PROMPT, _CHECKED_NODES = 4, 128, 24
# Prompt tokens of a pass, while more than two such parts are left. Other requests wait for a part at most. Shorter parts save no
# more memory or time (docs/benchmarks/long-histories.md).
PROMPT_PART = 128
Part = TypeVar("Part")


class TreeEvaluator:
    """Evaluates token trees with one model. Passes run one at a time in a worker thread, with dynamic batching (`Batcher`).

    All methods are for the event loop, and none moves keys and values on it: those of a prompt may be hundreds of megabytes, so
    the worker thread allocates them and copies them in and out. Cancelling `evaluate` or `run_steps` stops the wait: a queued
    pass never begins, a running pass ends and its result is dropped. A cancelled session can only be ended, with `end`.

    On the host a long prompt is read in parts, `PROMPT_PART` tokens a pass. Passes of other requests come between two parts. The
    parts that were read before a cancellation stay in the prefix cache. No bit of a score depends on the parts
    (docs/decisions/0037-sums-in-one-order.md). Statistics have all parts as one pass.

    Attributes:
        decoder: the model.
        entry: its entry in the bundle's manifest.
        trie: the catalogue's trie.
        rule: the scoring rule.
        open_kv: the memory of open sessions.
        plan_invariant: false if scores are known to depend on the other tokens of a pass, as on a device.
    """

    def __init__(
        self,
        decoder: ModelDecoder,
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
        self.plan_invariant = entry.plan_invariant and not isinstance(decoder, DeviceDecoder)
        self._layout = layout
        self._prompts = prompt_kv(decoder, entry, layout, cache)
        self._splits_prompts = entry.encoder is None and not isinstance(decoder, DeviceDecoder)
        self._code_tokens = np.asarray(entry.code_tokens, dtype=np.int64)
        self.open_kv = self._memory(cache, open_kv_bytes)
        # One column of each code token: levels may share tokens.
        self._distinct_columns = np.unique(self._code_tokens, return_index=True)[1]
        self._batcher = Batcher(self._run, _within_sums(limits or BatchLimits(), decoder))

    @property
    def queued_passes(self) -> int:
        """Return the number of passes that wait for the worker thread."""
        return self._batcher.queued

    async def open(self, prompt: Int64, *, tenant: str = "", user_key: bytes = NO_USER_KEY) -> TreeSession:
        """Start a session on a prompt, int64 [prompt], with the KV that the prefix cache holds. End it with `end`.

        Raises PromptError when the prompt is empty or too long for the model, or holds an unknown token id.

        Args:
            prompt: the token ids.
            tenant: the tenant; tenants share no cached KV.
            user_key: the key of a stored user.
        """
        self._check_prompt(prompt)
        begun = time.perf_counter_ns()
        keys = self._prompts.keys(prompt, tenant, user_key)
        cached = await self.open_kv.lookup(prompt, keys)
        stats = PassStats(lookup_ns=time.perf_counter_ns() - begun, cached_tokens_by_tier=cached.tokens_by_tier)
        known, pages = len(cached.pages) + len(cached.blocks), list(cached.pages)
        return TreeSession(self.open_kv.tree(prompt), keys, cached.blocks, stats, pages=pages, known_blocks=known)

    async def evaluate(self, tree: TreeSession, nodes: Int64, selection: Selection) -> tuple[Evaluation, PassStats]:
        """Make one pass: the best children of `nodes`, int64 [n], ascending inner nodes, not evaluated before on this tree.

        Parents are evaluated before or among `nodes`; the root is in the first pass, and in no other. Raises CapacityError when a
        node breaks that, OverloadedError when the queue or the memory of open sessions is full, and NoNumbersError. After
        NoNumbersError the session cannot be used: its keys and values are not finite either.
        """
        return await self.run_steps(tree, _one_pass(nodes), selection)

    async def run_steps(
        self, tree: TreeSession, steps: PassProgram[Found], selection: Selection
    ) -> tuple[Found, PassStats]:
        """Make the passes of a program, each as `evaluate` does; return its result and the statistics of all passes.

        The program runs in the worker thread: no pass waits for the event loop between two passes. If no older request waits, the
        next pass begins at once. Raises the program's exceptions and those of `evaluate`.
        """
        made = len(tree.passes)
        try:
            nodes = next(steps)
        except StopIteration as end:
            return cast("Found", end.value), PassStats()
        size = self._admitted(tree, nodes)
        queued = time.perf_counter_ns()
        run = ProgramRun(tree, steps, selection, nodes, queued, queued)
        tree.last_request = self._batcher.put(run, size, began_at=tree.opened_at, may_wait=not tree.synthetic)
        try:
            found = await self._batcher.outcome(tree.last_request)
        finally:
            self.open_kv.remember(tree)  # the blocks of the prompt, even if a later pass failed
        return cast("Found", found), reduce(add, [done.stats for done in tree.passes[made:]])

    def end(self, tree: TreeSession) -> None:
        """End a session and release its memory: at once, or when the pass that still writes to it has ended."""
        if tree.last_request is None or tree.last_request.done.done():
            self._release(tree)
        else:
            tree.last_request.done.add_done_callback(lambda _: self._release(tree))

    async def warm_up(self) -> None:
        """Run one pass of each kind, so that the first request does not wait for allocations."""
        prompt = self._prompts.filler(self._layout.block_tokens)
        everything = Selection(Pruning.none(), limit=1)
        tree = self.open_synthetic(prompt[: self.entry.max_positions - self.trie.levels + 1])
        try:
            with suppress(NoNumbersError):  # `plain_passes` decides whether that matters
                await self.evaluate(tree, np.array([ROOT]), everything)
                if self.trie.levels > 1:
                    await self.evaluate(tree, self.trie.children(ROOT)[:1], everything)
        finally:
            self.end(tree)

    async def check_plan_invariance(self) -> Moved:
        """Compare a few trees in shared passes and alone, in a worker thread; `plan_invariant` is false if a bit moved.

        The model is one of the host.
        """
        if isinstance(self.decoder, DeviceDecoder):
            raise TypeError("a device's sums have no order that could be checked")
        moved = await asyncio.to_thread(self._moved_bits, self.decoder)
        self.plan_invariant = self.entry.plan_invariant and moved.none
        return moved

    def _moved_bits(self, decoder: Decoder) -> Moved:
        entry, levels = self.entry, self.trie.levels
        prompt = min(entry.prompt.max_tokens(levels), entry.max_positions - levels, _CHECKED_PROMPT)
        start = entry.encoder.decoder_start if entry.encoder else None
        sizes = TreeSizes(max(1, prompt), _CHECKED_NODES, depth=max(1, levels - 1), trees=2)
        return check_invariance([decoder], sizes, self._code_tokens, trees=_CHECKED_TREES, decoder_start=start)

    def open_synthetic(self, prompt: Int64, cached_blocks: tuple[KvArray, ...] = ()) -> TreeSession:
        """Start a session for a measurement or a check, on given blocks. No cache reads or keeps them. End it with `end`."""
        known = len(cached_blocks)
        return TreeSession(
            self.open_kv.tree(prompt), [], cached_blocks, PassStats(), synthetic=True, known_blocks=known
        )

    async def cost_curve(self, seconds: float) -> CostCurve:
        """Measure the cost curve, for about `seconds`. No other pass should run on the model meanwhile."""
        block, levels = self._layout.block_tokens, self.trie.levels
        longest = self.entry.max_positions - (levels - 1)
        blocks = (min(self.entry.prompt.max_tokens(levels), longest) - 1) // block
        cached = sorted({0, blocks // 2 * block, blocks * block})
        nodes = self.trie.readable()
        most = longest - cached[-1] + len(nodes) - 1
        return await measure(partial(self._measured_pass, nodes), most, cached, seconds)

    async def _measured_pass(self, nodes: Int64, new: int, cached: int) -> PassStats:
        """Make a first pass over `new` tokens on `cached` ones, a multiple of a block. The first of `nodes` come first."""
        nodes = nodes[:new]
        prompt = self._prompts.filler(cached + new - len(nodes))
        block = np.zeros(self._layout.block_shape, dtype=self.decoder.dtype)
        tree = self.open_synthetic(prompt, (block,) * (cached // self._layout.block_tokens))
        try:
            with suppress(NoNumbersError):
                await self.evaluate(tree, nodes, Selection(Pruning.none(), limit=1))
        finally:
            self.end(tree)
        return tree.passes[-1].stats

    async def close(self) -> None:
        """Run the queued passes, and stop. The cache stays the caller's to close."""
        await self._batcher.close()
        await self.open_kv.close()

    def _memory(self, cache: PrefixCache, open_kv_bytes: int) -> KvMemory:
        if not isinstance(self.decoder, DeviceDecoder):
            return HostMemory(self.decoder, self._prompts, open_kv_bytes)
        options, stream = self.decoder.options, self.decoder.stream
        selector = DeviceSelector(self.trie, self.rule, self._code_tokens, options, stream)
        return DeviceMemory(self.decoder, selector, self._prompts, self._layout, cache)

    def _admitted(self, tree: TreeSession, nodes: Int64) -> PassSize:
        """Check a pass and reserve its memory; return its size. Raises CapacityError and OverloadedError, see `evaluate`."""
        self._check_nodes(tree.tokens, nodes)
        size = self._size(tree, nodes)
        self.open_kv.reserve(tree, size.cached_tokens + size.new_tokens)
        return self._next_pass(tree, size)

    def _next_pass(self, tree: TreeSession, rest: PassSize) -> PassSize:
        """Return the size of the next pass of a tree. rest: all that is left until its nodes are evaluated."""
        part = self._part(len(tree.tokens.prompt) - rest.cached_tokens)
        return PassSize(part, rest.cached_tokens) if part else rest

    def _part(self, prompt_tokens: int) -> int:
        """Return the prompt tokens of the next pass, if so many are left; 0 if it computes all of them."""
        return PROMPT_PART if self._splits_prompts and prompt_tokens > 2 * PROMPT_PART else 0

    def _size(self, tree: TreeSession, nodes: Int64) -> PassSize:
        """Return the size of a pass, cached blocks included that the first pass still has to copy into the tree."""
        step, prompt = self._layout.block_tokens, len(tree.tokens.prompt)
        cached = tree.tokens.length or min(tree.known_blocks * step, prompt - 1)
        new_prompt = max(0, prompt - cached)
        # The root has no token of its own: its logits are the last prompt token's.
        return PassSize(new_prompt + len(nodes) - int(nodes[0] == ROOT), cached)

    def _release(self, tree: TreeSession) -> None:
        self.open_kv.release(tree)
        tree.cached_blocks = ()

    def _run(self, runs: Sequence[ProgramRun]) -> Iterator[object]:
        """Make one pass over several trees, in the worker thread. A failure of one tree does not affect the others.

        If the model itself fails, nothing has been committed, and each run can be repeated.
        """
        begun, read = time.perf_counter_ns(), _reported_tokens(runs)
        steps = [_attempt(self._prepare, run) for run in runs]
        ready = [(run, step) for run, step in zip(runs, steps, strict=True) if isinstance(step, TreePass)]
        outputs = iter(self.open_kv.run(ready) if ready else ())
        forward = PassStats(
            forward_ns=time.perf_counter_ns() - begun,
            batch_requests=len(ready),
            batch_tokens=len(ready) * max((len(step.tokens) for _, step in ready), default=0)
            + (_reported_tokens(runs) - read),  # of the encoder
        )
        for run, step in zip(runs, steps, strict=True):
            if isinstance(step, TreePass):
                finish = partial(self._finish, step=step, output=next(outputs), begun=begun, forward=forward)
                yield _attempt(finish, run)
            else:
                yield step

    def _prepare(self, run: ProgramRun) -> TreePass:
        """Give the tree its memory, with the cached blocks before its first pass, and plan the pass."""
        self.open_kv.begin(run.tree)
        tree = run.tree.tokens
        if part := self._part(len(tree.prompt) - tree.length):
            return tree.plan_prompt(part)
        return tree.plan_pass(self.trie, run.nodes, self._code_tokens)

    def _finish(self, run: ProgramRun, step: TreePass, output: PassResult, begun: int, forward: PassStats) -> object:
        """Commit a pass and advance the program: another pass, or its result."""
        tree = run.tree
        if tree.tokens.length + len(step.tokens) < len(tree.tokens.prompt):
            return self._finish_part(run, step, output, begun, forward)
        first = tree.tokens.length < len(tree.tokens.prompt)
        tree.tokens.commit(step, run.nodes)
        if first and isinstance(output, TreeOutput) and output.state is not None:
            tree.state = output.state[0]  # of the root, the first node of a first pass
        selecting = time.perf_counter_ns()
        evaluation = self._evaluation(run, output)
        valid, copying = isinstance(evaluation, Evaluation), time.perf_counter_ns()
        if first and valid:  # a node that makes scores NaN may have done so to the prompt's keys and values
            self.open_kv.keep_prompt(tree)
            tree.cached_blocks = ()
        done = time.perf_counter_ns()
        stats = tree.lookup_stats + PassStats(
            queue_ns=begun - run.waiting_ns,
            forward_ns=forward.forward_ns + done - copying,
            selection_ns=copying - selecting,
            new_tokens=len(step.tokens),
            batch_requests=forward.batch_requests,
            batch_tokens=forward.batch_tokens,
            unordered_passes=int(not self.plan_invariant),
        )
        tree.lookup_stats = PassStats()
        tree.passes.append(CompletedPass(len(run.nodes), stats, run.queued_ns, done, valid))
        return self._next(run, evaluation) if isinstance(evaluation, Evaluation) else evaluation

    def _finish_part(
        self, run: ProgramRun, step: TreePass, output: PassResult, begun: int, forward: PassStats
    ) -> Reschedule:
        """Commit a part of the prompt. The next part comes behind the requests that wait."""
        tree, copying = run.tree, time.perf_counter_ns()
        tree.tokens.commit(step, np.empty(0, dtype=np.int64))
        # The last token attends to all others, so numbers that are not finite reach it.
        if isinstance(output, TreeOutput) and np.isfinite(output.log_normalizer).all():
            self.open_kv.keep_prompt(tree)
        queue_ns, run.waiting_ns = begun - run.waiting_ns, time.perf_counter_ns()
        tree.lookup_stats += replace(
            forward,
            queue_ns=queue_ns,
            forward_ns=forward.forward_ns + run.waiting_ns - copying,
            new_tokens=len(step.tokens),
        )
        return Reschedule(self._next_pass(tree, self._size(tree, run.nodes)), behind=True)

    def _evaluation(self, run: ProgramRun, output: PassResult) -> Evaluation | NoNumbersError:
        if not isinstance(output, TreeOutput):
            return output
        selection = run.selection
        log_normalizer: Float32 | Float64 = output.log_normalizer
        if self.rule is ScoringRule.CODES:
            log_normalizer = codes_normalizer(output.code_logits, self._distinct_columns)
        try:
            return best_children(
                self.trie,
                run.nodes,
                output.code_logits,
                log_normalizer,
                rule=self.rule,
                pruning=selection.pruning,
                limit=selection.limit,
                perturbation=selection.perturbation,
            )
        except NoNumbersError as error:
            return error

    def _next(self, run: ProgramRun, evaluation: Evaluation) -> object:
        """Return the program's next pass, or its result."""
        try:
            run.nodes = run.steps.send(evaluation)
        except StopIteration as end:
            return end.value
        size = self._admitted(run.tree, run.nodes)
        run.queued_ns = run.waiting_ns = time.perf_counter_ns()
        return Reschedule(size)

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
        if (self.trie.code[nodes[nodes != ROOT]] == ENDED).any():
            raise CapacityError("nodes: an ended place has no token, and needs no evaluation")
        if not tree.slots.keys().isdisjoint(nodes.tolist()):
            raise CapacityError("nodes: a node was evaluated before on this tree")


def _within_sums(limits: BatchLimits, decoder: ModelDecoder) -> BatchLimits:
    """Return the limits under which a host's graph keeps the order of its sums."""
    return limits if isinstance(decoder, DeviceDecoder) else replace(limits, row_keys=decoder.shared_keys)


def _reported_tokens(runs: Sequence[ProgramRun]) -> int:
    """Return the tokens that the next passes will report besides their own: of the encoder, and of parts of prompts."""
    return sum(run.tree.lookup_stats.new_tokens for run in runs)


def _one_pass(nodes: Int64) -> PassProgram[Evaluation]:
    return (yield nodes)


def _attempt(compute: Callable[[ProgramRun], Part], run: ProgramRun) -> Part | Exception:
    try:
        return compute(run)
    except Exception as error:  # noqa: BLE001 - it is the outcome of the request whose pass this is
        return error
