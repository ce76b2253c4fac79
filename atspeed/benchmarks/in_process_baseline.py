"""In-process baseline: target-only searches without gRPC, orchestrator or Redis.

Its throughput in a closed loop on the same cores bounds that of the services without speculation.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Iterable, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from atspeed.engine.arrays import Int64
from atspeed.engine.bundle.bundle import Bundle
from atspeed.engine.bundle.catalogue import Catalogue
from atspeed.engine.bundle.prompts import prompts_of
from atspeed.engine.model.pass_stats import PassStats
from atspeed.engine.model.tree_evaluator import TreeEvaluator
from atspeed.engine.model.tree_session import Selection, TreeSession
from atspeed.engine.search.beam_widths import BeamWidths
from atspeed.engine.search.scoring import Evaluation
from atspeed.engine.search.trie import Pruning
from atspeed.model_host.hosted_models import served_models
from orchestrator.planning.sized_draft import NoDraft
from orchestrator.search.beam_loop import beam_search
from orchestrator.search.policies import Strict
from target_service.settings import TargetSettings


@dataclass(frozen=True)
class Prompt:
    """Prompt of a search. tokens: int64 [prompt]. tenant: keeps the caches of equal prompts apart."""

    tokens: Int64
    tenant: str = ""


@dataclass(frozen=True)
class Throughput:
    """Throughput of a closed loop of `concurrency` searches at once."""

    concurrency: int
    searches: int
    searches_per_second: float


@dataclass
class LocalTarget:
    """Target of one search, see `beam_loop.Target`. stats: of its passes so far."""

    evaluator: TreeEvaluator
    prompt: Prompt
    limit: int
    passes: int = 0
    stats: PassStats = field(default_factory=PassStats)
    _tree: TreeSession | None = None

    async def evaluate(self, nodes: Int64) -> Evaluation:
        """Make one pass."""
        if self._tree is None:
            self._tree = await self.evaluator.open(self.prompt.tokens, tenant=self.prompt.tenant)
        evaluation, stats = await self.evaluator.evaluate(self._tree, nodes, Selection(Pruning.none(), self.limit))
        self.passes += 1
        self.stats += stats
        return evaluation

    def close(self) -> None:
        """End the search: its memory goes to the next one."""
        if self._tree is not None:
            self.evaluator.end(self._tree)


class InProcessBaseline:
    """Target-only searches over one or more copies of a bundle's target, which take turns."""

    def __init__(self, bundle: Bundle, catalogue: Catalogue, evaluators: Sequence[TreeEvaluator]) -> None:
        self.catalogue = catalogue
        self._evaluators = evaluators
        self._prompts = prompts_of(bundle, "target", catalogue)
        self._rule = bundle.manifest.scoring_rule
        self._searches = 0

    @property
    def longest_history(self) -> int:
        """Largest number of items in a prompt."""
        return self._prompts.template.max_items

    def prompt(self, history: Iterable[str], tenant: str = "") -> Prompt:
        """Return the target's prompt for a history."""
        return Prompt(self._prompts.tokens(self.catalogue.find(history)), tenant)

    async def search(self, prompt: Prompt, k: int) -> LocalTarget:
        """Search with K beams. Returns the target with its passes and their stats."""
        evaluator = self._evaluators[self._searches % len(self._evaluators)]
        self._searches += 1
        target = LocalTarget(evaluator, prompt, limit=k)
        try:
            await beam_search(self.catalogue.trie, self._rule, Strict(BeamWidths.of(k)), target, NoDraft())
        finally:
            target.close()
        return target

    async def closed_loop(self, prompts: Sequence[Prompt], k: int, concurrency: int) -> Throughput:
        """Search for all prompts, with `concurrency` searches at once."""
        waiting = iter(prompts)

        async def take_turns() -> None:
            for prompt in waiting:
                await self.search(prompt, k)

        begun = time.perf_counter()
        await asyncio.gather(*(take_turns() for _ in range(concurrency)))
        return Throughput(concurrency, len(prompts), len(prompts) / (time.perf_counter() - begun))


@asynccontextmanager
async def in_process_baseline(root: Path, *, threads: int, replicas: int = 1) -> AsyncIterator[InProcessBaseline]:
    """Load `replicas` copies of the bundle's target, each with so many threads."""
    bundle = Bundle(root)
    settings = TargetSettings(bundle=root, threads=threads, verify_bundle=False, warm_up_seconds=0)
    async with AsyncExitStack() as stack:
        models = [
            await stack.enter_async_context(served_models(settings, "target", lambda evaluator, _: evaluator))
            for _ in range(replicas)
        ]
        yield InProcessBaseline(bundle, bundle.catalogue(), [replica.stable.evaluator for replica in models])


def median_ms(nanoseconds: Iterable[float]) -> float:
    """Return the median in milliseconds, to the microsecond; 0 for no values."""
    values = list(nanoseconds)
    return round(float(np.median(values)) / 1e6, 3) if values else 0.0
