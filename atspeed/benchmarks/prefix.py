"""What a cached prefix is worth: the first pass of a request, by which tier has the keys and values of its prompt.

For each user the same pass, the prompt's last token and so many of the trie's first nodes, is made in five states: cold; all of
the prompt in memory; all of it in Redis, read always or only where the measured costs say so; and the prompt of before the last
item in memory, a user who comes back with one new item. One model, one process, a real Redis; states take turns user by
user, so that what disturbs the machine disturbs all of them. Every state must give the same evaluation.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import asdict, dataclass
from enum import StrEnum
from statistics import median
from time import perf_counter_ns
from typing import Any

import numpy as np
from redis.asyncio import Redis
from rich.table import Table

from atspeed.benchmarks.errors import BenchmarkError
from atspeed.benchmarks.intervals import Interval, bootstrap
from atspeed.benchmarks.results import Result
from atspeed.benchmarks.shared_tree_models import prompt_tokens
from atspeed.engine.arrays import Int64
from atspeed.engine.bundle.manifest import Bundle, Role
from atspeed.engine.kv.fetch_cost import FetchPolicy
from atspeed.engine.kv.memory_cache import KvLayout, MemoryKvCache
from atspeed.engine.kv.prefix_cache import PrefixCache
from atspeed.engine.kv.redis_client import connect
from atspeed.engine.kv.redis_store import RedisKvStore
from atspeed.engine.model.cost_curve import CostCurve
from atspeed.engine.model.decoder import RuntimeOptions, load_decoder
from atspeed.engine.model.pass_stats import PassStats
from atspeed.engine.model.tree_evaluator import TreeEvaluator
from atspeed.engine.model.tree_session import Selection
from atspeed.engine.search.scoring import Evaluation
from atspeed.engine.search.trie import Pruning
from atspeed.local.redis_server import local_redis

NAME = "prefix"
# Passes of another shape sum in another order.
TOLERANCE = 1e-3
_MEMORY_BYTES = 2**30
_PATIENCE_SECONDS = 30.0
_CURVE_SECONDS = 5.0


class State(StrEnum):
    """Where a prompt's keys and values are."""

    COLD = "cold"
    MEMORY = "memory"
    REDIS = "redis"
    MEASURED = "redis, where measured to be quicker"
    NEW_ITEM = "memory, one new item"


@dataclass(frozen=True)
class Question:
    """What is measured. nodes: evaluated in a pass, besides the root; each number by itself. block_tokens: an item's where it is
    None.
    """

    role: Role = "target"
    nodes: tuple[int, ...] = (0, 120)
    threads: int = 1
    block_tokens: int | None = None
    seed: int = 1


@dataclass(frozen=True)
class Sample:
    """One pass. ns: from the question to its answer. computed: prompt tokens that were. difference: the largest of a
    log-probability from the cold pass's.
    """

    ns: int
    prompt: int
    computed: int
    cost: PassStats
    difference: float


@dataclass(frozen=True)
class Row:
    """One state over all users. nodes: in the pass, besides the root. Tokens are means. redis_users: those for whom it was read.
    speedup: cold over this, by user.
    """

    role: str
    nodes: int
    state: str
    users: int
    p50_ms: float
    prompt_tokens: float
    computed_tokens: float
    memory_tokens: float
    redis_tokens: float
    redis_users: int
    speedup_vs_cold: Interval
    largest_difference: float

    @property
    def same(self) -> bool:
        """Whether every evaluation is the cold one's, but for rounding."""
        return self.largest_difference <= TOLERANCE


class Bench:
    """One model, and a prefix cache for each state."""

    def __init__(self, bundle: Bundle, question: Question, redis: Redis) -> None:
        self._question = question
        self._entry, self._catalogue = bundle.model(question.role), bundle.catalogue()
        self._decoder = load_decoder(bundle, question.role, RuntimeOptions(intra_op_threads=question.threads))
        self._rule, entry = bundle.manifest.scoring_rule, self._entry
        step = question.block_tokens or entry.prompt.item_stride(self._catalogue.trie.levels)
        self._layout = KvLayout(entry.layers, entry.kv_heads, entry.head_dim, entry.kv_dtype, block_tokens=step)
        patience = _PATIENCE_SECONDS
        self._store = RedisKvStore(redis, self._layout, 3600, patience, write_timeout_seconds=patience)
        self.fetching = FetchPolicy(self._layout.bytes_per_token)
        self._inner = int(self._catalogue.trie.level_start[self._catalogue.trie.levels])

    async def warm_up(self) -> CostCurve:
        """Run what the first request would pay for, and measure what passes cost."""
        async with self._evaluator(self._cache(0)) as evaluator:
            await evaluator.warm_up()
            curve = await evaluator.cost_curve(_CURVE_SECONDS)
        self.fetching.recompute_ns = curve.saved
        return curve

    async def user(self, history: Int64, nodes: int) -> dict[State, Sample]:
        """One user's pass over so many nodes in every state; the user has two items at least."""
        asked = np.arange(min(1 + nodes, self._inner))
        prompt, before = (
            prompt_tokens(self._catalogue, self._entry, items.tolist()) for items in (history, history[:-1])
        )
        cold, expected = await self._pass(self._cache(0), prompt, asked, None)
        warm = self._cache(_MEMORY_BYTES, store=True)
        await self._pass(warm, prompt, asked, expected)
        await warm.close()  # what it writes to Redis is there then
        returning = self._cache(_MEMORY_BYTES)
        await self._pass(returning, before, asked, None)
        caches = {
            State.MEMORY: warm,
            State.REDIS: self._cache(0, store=True),
            State.MEASURED: self._cache(0, store=True, fetching=self.fetching),
            State.NEW_ITEM: returning,
        }
        samples = {State.COLD: cold}
        for state, cache in caches.items():
            samples[state], _ = await self._pass(cache, prompt, asked, expected)
        return samples

    async def _pass(
        self, cache: PrefixCache, prompt: Int64, nodes: Int64, expected: Evaluation | None
    ) -> tuple[Sample, Evaluation]:
        async with self._evaluator(cache) as evaluator:
            begun = perf_counter_ns()
            tree = await evaluator.open(prompt)
            evaluation, cost = await evaluator.evaluate(tree, nodes, Selection(Pruning.none(), limit=20))
            taken = perf_counter_ns() - begun
        computed = cost.new_tokens - (len(nodes) - 1)
        difference = _difference(evaluation, expected or evaluation)
        return Sample(taken, len(prompt), computed, cost, difference), evaluation

    def _cache(self, limit: int, *, store: bool = False, fetching: FetchPolicy | None = None) -> PrefixCache:
        tiers = [self._store] if store else []
        policies = {self._store.name: fetching} if fetching else None
        return PrefixCache(self._layout, MemoryKvCache(limit), tiers, fetch_policies=policies)

    @asynccontextmanager
    async def _evaluator(self, cache: PrefixCache) -> AsyncIterator[TreeEvaluator]:
        trie = self._catalogue.trie
        evaluator = TreeEvaluator(self._decoder, self._entry, trie, self._rule, self._layout, cache)
        yield evaluator
        await evaluator.close()
        await cache.close()


async def run(bundle: Bundle, histories: Sequence[Sequence[str]], question: Question) -> list[Row]:
    """A row for each number of nodes and each state. Users with a single item are left out."""
    catalogue = bundle.catalogue()
    users = [catalogue.find(items) for items in histories if len(items) > 1]
    async with AsyncExitStack() as stack:
        redis = connect(stack.enter_context(local_redis()), timeout_seconds=_PATIENCE_SECONDS)
        stack.push_async_callback(redis.aclose)
        bench, rows = Bench(bundle, question, redis), []
        await bench.warm_up()
        for nodes in question.nodes:
            samples = [await bench.user(history, nodes) for history in users]
            rows += [_row(nodes, state, samples, question) for state in State]
    return rows


def _row(nodes: int, state: State, samples: Sequence[Mapping[State, Sample]], question: Question) -> Row:
    own = [sample[state] for sample in samples]
    ratios = [sample[State.COLD].ns / sample[state].ns for sample in samples]
    return Row(
        role=question.role,
        nodes=nodes,
        state=state,
        users=len(own),
        p50_ms=round(median(sample.ns for sample in own) / 1e6, 3),
        prompt_tokens=_mean([sample.prompt for sample in own]),
        computed_tokens=_mean([sample.computed for sample in own]),
        memory_tokens=_mean([sample.cost.cached_tokens_by_tier["memory"] for sample in own]),
        redis_tokens=_mean([sample.cost.cached_tokens_by_tier.get("redis", 0) for sample in own]),
        redis_users=sum(sample.cost.cached_tokens_by_tier.get("redis", 0) > 0 for sample in own),
        speedup_vs_cold=bootstrap(ratios, seed=question.seed),
        largest_difference=max(sample.difference for sample in own),
    )


def _difference(evaluation: Evaluation, expected: Evaluation) -> float:
    """The largest difference of the best children's log-probabilities, rank by rank: near-ties may change places."""
    if evaluation.logp.shape != expected.logp.shape:
        return float("inf")
    return float(np.abs(evaluation.logp - expected.logp).max(initial=0.0))


def _mean(values: Sequence[float]) -> float:
    return round(sum(values) / len(values), 2) if values else 0.0


def table(rows: Sequence[Row]) -> Table:
    """The rows for people."""
    shown = Table(
        "nodes", "prefix", "p50 ms", "prompt tokens computed", "from memory", "from Redis", "faster than cold"
    )
    for row in rows:
        speedup = row.speedup_vs_cold
        shown.add_row(
            str(row.nodes),
            row.state,
            f"{row.p50_ms:.2f}",
            f"{row.computed_tokens:.1f} of {row.prompt_tokens:.1f}",
            f"{row.memory_tokens:.1f}",
            f"{row.redis_tokens:.1f}",
            f"{speedup.value:.2f}x ({speedup.low:.2f} to {speedup.high:.2f})",
        )
    return shown


def to_json(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """The rows of the result file."""
    return [asdict(row) for row in rows]


def from_json(result: Result) -> list[Row]:
    """The rows of a result file. Raises BenchmarkError when it is another benchmark's."""
    if result.header.get("benchmark") != NAME:
        raise BenchmarkError("the result is not one of bench prefix")
    return [Row(**{**row, "speedup_vs_cold": Interval(**row["speedup_vs_cold"])}) for row in result.rows]


def header(question: Question, *, items: tuple[int, int | None], histories: str) -> dict[str, Any]:
    """What was asked, for the result file. items: the least and the most of a user."""
    return {"benchmark": NAME, "question": asdict(question), "items": items, "histories": histories}
