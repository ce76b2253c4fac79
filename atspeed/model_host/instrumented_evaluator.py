"""An evaluator whose cache lookups and passes are measured and traced."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from functools import partial

from atspeed.engine.arrays import Int64
from atspeed.engine.bundle.manifest import ModelEntry
from atspeed.engine.kv.memory_cache import NO_OWNER, KvLayout
from atspeed.engine.kv.prefix_cache import PrefixCache
from atspeed.engine.model.batcher import BatchLimits
from atspeed.engine.model.decoder import Decoder
from atspeed.engine.model.pass_stats import PassStats
from atspeed.engine.model.plain_passes import check_plain_passes
from atspeed.engine.model.tree_evaluator import Found, OpenTree, PassProgram, PassRecord, Selection, TreeEvaluator
from atspeed.engine.search.scoring import ScoringRule
from atspeed.engine.search.trie import Trie
from atspeed.model_host.model_health import ModelHealth
from atspeed.model_host.model_metrics import ModelMetrics
from atspeed.observability import tracing


class InstrumentedEvaluator(TreeEvaluator):
    """A TreeEvaluator that says what it does."""

    def __init__(
        self,
        decoder: Decoder,
        entry: ModelEntry,
        trie: Trie,
        rule: ScoringRule,
        layout: KvLayout,
        cache: PrefixCache,
        metrics: ModelMetrics,
        *,
        limits: BatchLimits,
        open_kv_bytes: int,
        unhealthy_after: int,
        declare_fit: Callable[[bool], Awaitable[None]],
    ) -> None:
        super().__init__(decoder, entry, trie, rule, layout, cache, limits=limits, open_kv_bytes=open_kv_bytes)
        self._metrics = metrics
        self._fitness = ModelHealth(unhealthy_after, partial(check_plain_passes, self), declare_fit)
        self._reads = metrics.watch(self, self._fitness)

    async def open(self, prompt: Int64, *, tenant: str = "", owner: bytes = NO_OWNER) -> OpenTree:
        """As TreeEvaluator's."""
        with tracing.span("cache lookup", prompt_tokens=len(prompt)) as span:
            tree = await super().open(prompt, tenant=tenant, owner=owner)
            cost = tree.cost_of_opening
            span.set(memory_tokens=cost.memory_cached_tokens, redis_tokens=cost.redis_cached_tokens)
        self._metrics.opened(tree)
        return tree

    async def run_steps(
        self, tree: OpenTree, steps: PassProgram[Found], selection: Selection
    ) -> tuple[Found, PassStats]:
        """As TreeEvaluator's."""
        if not self._metrics.knows(tree):
            return await super().run_steps(tree, steps, selection)
        with self._judged(), self._reported(tree):
            return await super().run_steps(tree, steps, selection)

    async def examine(self) -> None:
        """Say that it is unfit where its plain passes do not work, before anybody asks for one."""
        await self._fitness.examine()

    async def close(self) -> None:
        """As TreeEvaluator's."""
        await self._fitness.close()
        await super().close()
        self._metrics.remove(self._reads)

    @contextmanager
    def _judged(self) -> Iterator[None]:
        """Passes of which the last says whether the model works."""
        try:
            yield
        except Exception as error:
            self._fitness.failed(error)
            raise

    @contextmanager
    def _reported(self, tree: OpenTree) -> Iterator[None]:
        """Passes over a tree, each of which is told of in the end, also where another one fails or nobody waits for it."""
        before = len(tree.passes)
        try:
            yield
        finally:
            for made in tree.passes[before:]:
                self._report(made)

    def _report(self, made: PassRecord) -> None:
        cost = made.cost
        if made.valid:
            self._fitness.passed()
        self._metrics.passed(made.nodes, cost)
        tracing.past_span(
            "pass",
            made.queued_ns,
            made.done_ns,
            nodes=made.nodes,
            tokens=cost.new_tokens,
            requests=cost.batch_requests,
            queue_ms=cost.queue_ns / 1e6,
            forward_ms=cost.forward_ns / 1e6,
        )

    def end(self, tree: OpenTree) -> None:
        """As TreeEvaluator's."""
        super().end(tree)
        self._metrics.ended(tree)
