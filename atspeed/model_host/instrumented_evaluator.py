"""A tree evaluator with metrics, traces and model health."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from functools import partial

from atspeed.engine.arrays import Int64
from atspeed.engine.bundle.manifest import ModelEntry
from atspeed.engine.kv.memory_cache import NO_USER_KEY, KvLayout
from atspeed.engine.kv.prefix_cache import PrefixCache
from atspeed.engine.model.batcher import BatchLimits
from atspeed.engine.model.device_decoder import ModelDecoder
from atspeed.engine.model.pass_stats import PassStats
from atspeed.engine.model.plain_passes import check_plain_passes
from atspeed.engine.model.tree_evaluator import TreeEvaluator
from atspeed.engine.model.tree_session import CompletedPass, Found, PassProgram, Selection, TreeSession
from atspeed.engine.search.scoring import ScoringRule
from atspeed.engine.search.trie import Trie
from atspeed.model_host.model_health import ModelHealth
from atspeed.model_host.model_metrics import ModelMetrics
from atspeed.observability import tracing


class InstrumentedEvaluator(TreeEvaluator):
    """A TreeEvaluator whose cache lookups and passes are measured and traced."""

    def __init__(
        self,
        decoder: ModelDecoder,
        entry: ModelEntry,
        trie: Trie,
        rule: ScoringRule,
        layout: KvLayout,
        cache: PrefixCache,
        metrics: ModelMetrics,
        *,
        limits: BatchLimits,
        open_kv_bytes: int,
        unhealthy_after: int | None,
        on_health_change: Callable[[bool], Awaitable[None]],
    ) -> None:
        super().__init__(decoder, entry, trie, rule, layout, cache, limits=limits, open_kv_bytes=open_kv_bytes)
        self._metrics = metrics
        self._health = ModelHealth(unhealthy_after, partial(check_plain_passes, self), on_health_change)
        self._reads = metrics.add_evaluator(self, self._health)

    async def open(self, prompt: Int64, *, tenant: str = "", user_key: bytes = NO_USER_KEY) -> TreeSession:
        """Open a tree, with a span and metrics of the cache lookup."""
        with tracing.span("cache lookup", prompt_tokens=len(prompt)) as span:
            tree = await super().open(prompt, tenant=tenant, user_key=user_key)
            tiers = tree.lookup_stats.cached_tokens_by_tier
            span.set(**{f"{tier}_tokens": tokens for tier, tokens in tiers.items()})
        self._metrics.tree_opened(tree)
        return tree

    async def run_steps(
        self, tree: TreeSession, steps: PassProgram[Found], selection: Selection
    ) -> tuple[Found, PassStats]:
        """Run a pass program, with spans and metrics of its passes. The trees of the warm-up are not measured."""
        if not self._metrics.is_open(tree):
            return await super().run_steps(tree, steps, selection)
        with self._failures_counted(), self._passes_reported(tree):
            return await super().run_steps(tree, steps, selection)

    async def probe_at_start(self) -> None:
        """Probe the model before its first request."""
        await self._health.probe_at_start()

    async def close(self) -> None:
        """Close the evaluator and remove its metrics."""
        await self._health.close()
        await super().close()
        self._metrics.remove(self._reads)

    @contextmanager
    def _failures_counted(self) -> Iterator[None]:
        """Count an exception of the block as a failure of the model."""
        try:
            yield
        except Exception as error:
            self._health.record_failure(error)
            raise

    @contextmanager
    def _passes_reported(self, tree: TreeSession) -> Iterator[None]:
        """Report each pass over a tree at the end, also after a failure or a cancellation."""
        before = len(tree.passes)
        try:
            yield
        finally:
            for made in tree.passes[before:]:
                self._report(made)

    def _report(self, made: CompletedPass) -> None:
        cost = made.stats
        if made.valid:
            self._health.record_success()
        self._metrics.pass_done(made.nodes, cost)
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

    def end(self, tree: TreeSession) -> None:
        """Free a tree."""
        super().end(tree)
        self._metrics.tree_ended(tree)
