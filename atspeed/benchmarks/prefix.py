"""Value of a cached prefix: a request's first pass, by the tier of its prompt.

For each user the same pass is made in five states. The pass evaluates the prompt's last token and the first nodes of the trie.
Nothing of the prompt is kept; all of it is in memory; all of it is in Redis, which is read always, or only where the measured
costs favour it; or the prompt before the last item is in memory, as for a user who returns with one new item.
One model, one process, a real Redis. States take turns user by user, so that a disturbance of the machine meets all of them.
Every state must give the same evaluation.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import asdict, dataclass
from enum import StrEnum
from pathlib import Path
from statistics import median
from time import perf_counter_ns
from typing import Any

import numpy as np
from redis.asyncio import Redis

from atspeed.benchmarks import markdown
from atspeed.benchmarks.intervals import Interval, bootstrap
from atspeed.benchmarks.markdown import figures, item_range, origin, paragraphs, row_table
from atspeed.benchmarks.results import Columns, Result
from atspeed.engine.arrays import Int64
from atspeed.engine.bundle.bundle import Bundle
from atspeed.engine.bundle.manifest import Role
from atspeed.engine.bundle.prompts import prompts_of
from atspeed.engine.kv.fetch_policy import FetchPolicy
from atspeed.engine.kv.memory_cache import KvLayout, MemoryKvCache
from atspeed.engine.kv.prefix_cache import PrefixCache
from atspeed.engine.kv.redis_client import connect
from atspeed.engine.kv.redis_store import RedisKvStore
from atspeed.engine.model.cost_curve import CostCurve
from atspeed.engine.model.decoder import RuntimeOptions
from atspeed.engine.model.loading import load_decoder
from atspeed.engine.model.pass_stats import PassStats
from atspeed.engine.model.tree_evaluator import TreeEvaluator
from atspeed.engine.model.tree_session import Selection
from atspeed.engine.search.scoring import Evaluation
from atspeed.engine.search.trie import Pruning
from atspeed.local.redis_server import local_redis

NAME = "prefix"
TOLERANCE = 1e-3  # passes of another shape add in another order; a wrong cache differs by far more
_MEMORY_BYTES = 2**30  # holds the prompt of one user of the largest model that is measured
_TTL_SECONDS = 3600  # outlasts a run
_REDIS_TIMEOUT_SECONDS = 30.0  # a slow read is to be measured, not cut off
_CURVE_SECONDS = 5.0  # enough passes for a stable cost curve
_CHILDREN = 20  # best children of each node that a pass returns


class PrefixState(StrEnum):
    """Place of a prompt's keys and values."""

    COLD = "cold"
    MEMORY = "memory"
    REDIS = "redis"
    MEASURED = "redis, where measured to be quicker"
    NEW_ITEM = "memory, one new item"


@dataclass(frozen=True)
class PrefixConfig:
    """Configuration of the measurement.

    Attributes:
        role: the model that is measured.
        nodes: numbers of nodes in a pass besides the root, each measured by itself.
        threads: threads of a pass.
        block_tokens: prompt tokens in one block; None: those of an item.
        seed: seed of the bootstrap.
    """

    role: Role = "target"
    nodes: tuple[int, ...] = (0, 120)
    threads: int = 1
    block_tokens: int | None = None
    seed: int = 1


@dataclass(frozen=True)
class PassSample:
    """One measured pass.

    Attributes:
        ns: nanoseconds from opening the tree to the evaluation.
        prompt: prompt tokens.
        computed: prompt tokens that the pass computed.
        stats: what the pass reports.
        difference: the largest difference of a log-probability from the cold pass.
    """

    ns: int
    prompt: int
    computed: int
    stats: PassStats
    difference: float


@dataclass(frozen=True)
class PrefixRow:
    """One state over all users.

    Attributes:
        nodes: nodes in the pass besides the root.
        prompt_tokens, computed_tokens, memory_tokens, redis_tokens: means over users.
        redis_users: users for whom Redis was read.
        speedup_vs_cold: time of the cold pass over that of this one, by user.
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
    def is_same(self) -> bool:
        """True if every evaluation is that of the cold pass, but for rounding."""
        return self.largest_difference <= TOLERANCE

    @property
    def speedup(self) -> str:
        """Mean speed-up over cold passes, in words."""
        return f"{self.speedup_vs_cold.value:.2f}x"


COLUMNS: Columns[PrefixRow] = (
    ("prefix", lambda row: row.state),
    ("p50 ms", lambda row: f"{row.p50_ms:.2f}"),
    ("prompt tokens", lambda row: f"{row.prompt_tokens:.1f}"),
    ("computed", lambda row: f"{row.computed_tokens:.1f}"),
    ("from memory", lambda row: f"{row.memory_tokens:.1f}"),
    ("from Redis", lambda row: f"{row.redis_tokens:.1f}"),
    ("users", lambda row: str(row.users)),
    ("over cold", lambda row: row.speedup),
    ("95 %", lambda row: f"{row.speedup_vs_cold.low:.2f} to {row.speedup_vs_cold.high:.2f}"),
)
TERMINAL_COLUMNS: Columns[PrefixRow] = (("nodes", lambda row: str(row.nodes)), *COLUMNS)


class PrefixMeter:
    """Measures passes of one model, with a prefix cache for each state."""

    def __init__(self, bundle: Bundle, config: PrefixConfig, redis: Redis) -> None:
        entry = bundle.model(config.role)
        self._entry = entry
        self._catalogue = bundle.catalogue()
        self._prompts = prompts_of(bundle, config.role, self._catalogue)
        self._decoder = load_decoder(bundle, config.role, RuntimeOptions(intra_op_threads=config.threads))
        self._rule = bundle.manifest.scoring_rule
        step = config.block_tokens or entry.prompt.item_stride(self._catalogue.longest_spelling)
        self._layout = KvLayout(entry.layers, entry.kv_heads, entry.head_dim, entry.kv_dtype, block_tokens=step)
        timeout = _REDIS_TIMEOUT_SECONDS
        self._store = RedisKvStore(redis, self._layout, _TTL_SECONDS, timeout, write_timeout_seconds=timeout)
        self._fetch_policy = FetchPolicy()
        self._nodes = self._catalogue.trie.readable()

    async def warm_up(self) -> CostCurve:
        """Run what the first request would pay for, and measure the cost curve."""
        async with self._evaluator(self._cache(0)) as evaluator:
            await evaluator.warm_up()
            curve = await evaluator.cost_curve(_CURVE_SECONDS)
        self._fetch_policy.recompute_ns = curve.saved
        return curve

    async def measure(self, history: Int64, nodes: int) -> dict[PrefixState, PassSample]:
        """Measure one user's pass over so many nodes in every state. The user has two items at least."""
        evaluated = self._nodes[: 1 + nodes]
        prompt, before = (self._prompts.tokens(items) for items in (history, history[:-1]))
        cold, expected = await self._pass(self._cache(0), prompt, evaluated, None)
        warm = self._cache(_MEMORY_BYTES, store=True)
        await self._pass(warm, prompt, evaluated, expected)
        await warm.close()  # waits until all is written to Redis
        returning = self._cache(_MEMORY_BYTES)
        await self._pass(returning, before, evaluated, None)
        caches = {
            PrefixState.MEMORY: warm,
            PrefixState.REDIS: self._cache(0, store=True),
            PrefixState.MEASURED: self._cache(0, store=True, fetching=self._fetch_policy),
            PrefixState.NEW_ITEM: returning,
        }
        samples = {PrefixState.COLD: cold}
        for state, cache in caches.items():
            samples[state], _ = await self._pass(cache, prompt, evaluated, expected)
        return samples

    async def _pass(
        self, cache: PrefixCache, prompt: Int64, nodes: Int64, expected: Evaluation | None
    ) -> tuple[PassSample, Evaluation]:
        async with self._evaluator(cache) as evaluator:
            begun = perf_counter_ns()
            tree = await evaluator.open(prompt)
            evaluation, stats = await evaluator.evaluate(tree, nodes, Selection(Pruning.none(), limit=_CHILDREN))
            taken = perf_counter_ns() - begun
        computed = stats.new_tokens - (len(nodes) - 1)
        difference = _difference(evaluation, expected or evaluation)
        return PassSample(taken, len(prompt), computed, stats, difference), evaluation

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


async def run(bundle: Bundle, histories: Sequence[Sequence[str]], config: PrefixConfig) -> list[PrefixRow]:
    """Return a row for each number of nodes and each state. Users with a single item are left out."""
    catalogue = bundle.catalogue()
    users = [catalogue.find(items) for items in histories if len(items) > 1]
    async with AsyncExitStack() as stack:
        redis = connect(stack.enter_context(local_redis()), timeout_seconds=_REDIS_TIMEOUT_SECONDS)
        stack.push_async_callback(redis.aclose)
        meter, rows = PrefixMeter(bundle, config, redis), []
        await meter.warm_up()
        for nodes in config.nodes:
            samples = [await meter.measure(history, nodes) for history in users]
            rows += [_row(nodes, state, samples, config) for state in PrefixState]
    return rows


def _row(
    nodes: int, state: PrefixState, samples: Sequence[Mapping[PrefixState, PassSample]], config: PrefixConfig
) -> PrefixRow:
    own = [sample[state] for sample in samples]
    ratios = [sample[PrefixState.COLD].ns / sample[state].ns for sample in samples]
    return PrefixRow(
        role=config.role,
        nodes=nodes,
        state=state,
        users=len(own),
        p50_ms=round(median(sample.ns for sample in own) / 1e6, 3),
        prompt_tokens=_mean([sample.prompt for sample in own]),
        computed_tokens=_mean([sample.computed for sample in own]),
        memory_tokens=_mean([sample.stats.cached_tokens_by_tier["memory"] for sample in own]),
        redis_tokens=_mean([sample.stats.cached_tokens_by_tier.get("redis", 0) for sample in own]),
        redis_users=sum(sample.stats.cached_tokens_by_tier.get("redis", 0) > 0 for sample in own),
        speedup_vs_cold=bootstrap(ratios, seed=config.seed),
        largest_difference=max(sample.difference for sample in own),
    )


def _difference(evaluation: Evaluation, expected: Evaluation) -> float:
    """Return the largest difference of the best children's log-probabilities, rank by rank: near-ties may change places."""
    if evaluation.logp.shape != expected.logp.shape:
        return float("inf")
    return float(np.abs(evaluation.logp - expected.logp).max(initial=0.0))


def _mean(values: Sequence[float]) -> float:
    return round(sum(values) / len(values), 2) if values else 0.0


def header(config: PrefixConfig, *, items: tuple[int, int | None], histories: str) -> dict[str, Any]:
    """Return the header's fields. items: the least and the most of a user."""
    return {"benchmark": NAME, "question": asdict(config), "items": items, "histories": histories}


def write(result: Result, folder: Path) -> Path:
    """Write the page of a result file. Returns its path."""
    return markdown.write(folder / "prefix.md", _page(result.header, result.rows_of(NAME, PrefixRow)))


def _page(header: Mapping[str, Any], rows: Sequence[PrefixRow]) -> Iterator[str]:
    asked, users = header["question"], rows[0].users
    yield from paragraphs(
        "# Benefit of a cached prefix",
        f"A request's first pass of the {asked['role']} in one process, the prompt's last token and some nodes of the trie "
        "besides the root (0: as plain beam search begins), by the cached part of the prompt and its tier. "
        f"{users} users with {item_range(header['items'])}, of {header['histories']}; every user in every state before the next.",
    )
    yield from origin(header, [("threads", str(asked["threads"]))])
    by_nodes = {nodes: {row.state: row for row in rows if row.nodes == nodes} for nodes in asked["nodes"]}
    yield from figures(figure for nodes, states in by_nodes.items() for figure in _figures(nodes, states))
    for nodes, states in by_nodes.items():
        yield from paragraphs(f"## {nodes} nodes besides the root")
        yield from row_table(COLUMNS, states.values())
    largest = max(row.largest_difference for row in rows)
    yield f"Largest difference of a log-probability from the cold pass's: {largest:.1e}."


def _figures(nodes: int, rows: Mapping[str, PrefixRow]) -> Iterator[tuple[str, str]]:
    """Yield the mean speed-up over cold passes of each state."""
    measured, suffix = rows[PrefixState.MEASURED], f", {nodes} nodes"
    yield f"returning user with one new item against a cold prefix{suffix}", rows[PrefixState.NEW_ITEM].speedup
    yield f"all of the prompt in memory against a cold prefix{suffix}", rows[PrefixState.MEMORY].speedup
    yield f"all of the prompt in Redis, always read, against a cold prefix{suffix}", rows[PrefixState.REDIS].speedup
    yield (
        f"users for whom the measured fetch policy reads Redis{suffix}",
        f"{measured.redis_users} of {measured.users}",
    )
    yield f"a prefix under the measured fetch policy against a cold prefix{suffix}", measured.speedup
