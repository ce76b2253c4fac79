"""Memory of the services' processes, and memory and traffic of Redis.

    model's process   process + items + 2.5 weights (while they load) + kv_memory + batch_kv + KV of the open lists
    orchestrator      process + items
    Redis             users * events * bytes of an event + users * KV of a prompt * 1.1
    Redis' traffic    rate * (KV that is read + KV that is written + a history)

A user's KV is read from Redis when the memory of the targets does not hold it. Every token that is computed is written once.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

MIB, GIB = 2**20, 2**30
# Bytes of an item in every process that holds the catalogue: docs/benchmarks/scaling.md, 10^7 items. Bytes of a process without
# one: assumed.
ITEM_BYTES, PROCESS_BYTES = 77.0, 150 * MIB
# A model's weights are in memory 2.5 times while it loads: docs/operations.md.
LOADING = 2.5
# Bytes of an event in a history's hash, and of KV in Redis over its own size: docs/capacity.md.
EVENT_BYTES, KV_OVERHEAD = 85.0, 1.1
# One Redis is assumed to carry this much: 10 Gbit/s, and the calls of its one thread.
REDIS_BYTES_PER_SECOND, REDIS_CALLS_PER_SECOND = 1.25e9, 1e5


@dataclass(frozen=True)
class Sizes:
    """Sizes of models, catalogue and users, in bytes and numbers.

    Attributes:
        weights: bytes of the weights, by role; `draft` only where there is one.
        kv_token: bytes of the keys and values of one prompt token, by role.
        items: items of the catalogue.
        users: users with a stored history; 0: requests carry their histories.
        history_items: events of a stored history.
        prompt_tokens: tokens of a prompt.
        prefix_hit: share of the prompt tokens whose keys and values are found in a cache, 0 to 1.
        kv_memory, batch_kv: bytes that a model's replica keeps for cached prompts, and for one shared pass.
        open_streams: lists that a replica serves at once, with their keys and values in memory.
    """

    weights: Mapping[str, float]
    kv_token: Mapping[str, float]
    items: int
    users: int = 0
    history_items: int = 50
    prompt_tokens: float = 80.0
    prefix_hit: float = 0.0
    kv_memory: float = 512 * MIB
    batch_kv: float = 512 * MIB
    open_streams: int = 16


@dataclass(frozen=True)
class RedisSize:
    """Memory and traffic of Redis, replicas of Redis itself not counted.

    Attributes:
        memory_gib: histories and KV together, in GiB.
        megabytes_per_second: reads and writes of KV, and histories, in 10^6 bytes.
        calls_per_second: round trips.
        memory_share: share of the cached tokens that the targets' own memory holds.
    """

    memory_gib: float
    histories_gib: float
    kv_gib: float
    megabytes_per_second: float
    calls_per_second: float
    memory_share: float


def model_gib(role: str, sizes: Sizes) -> float:
    """Return the memory limit of a model's process, in GiB. role: `target` or `draft`."""
    open_lists = sizes.open_streams * sizes.prompt_tokens * sizes.kv_token[role]
    kept = sizes.kv_memory + sizes.batch_kv + open_lists
    return _gib(PROCESS_BYTES + sizes.items * ITEM_BYTES + LOADING * sizes.weights[role] + kept)


def orchestrator_gib(sizes: Sizes) -> float:
    """Return the memory limit of an orchestrator, in GiB."""
    return _gib(PROCESS_BYTES + sizes.items * ITEM_BYTES)


def redis_size(rate: float, targets: int, sizes: Sizes) -> RedisSize:
    """Return what Redis needs at `rate` lists per second with so many target replicas.

    Nothing of the KV is kept where `prefix_hit` is 0.
    """
    cached = sizes.prefix_hit > 0
    prompt = sizes.prompt_tokens * sum(sizes.kv_token.values()) if cached else 0.0
    memory = targets * sizes.kv_memory
    share = min(1.0, memory / (sizes.users * sizes.prompt_tokens * sizes.kv_token["target"])) if cached else 1.0
    history = sizes.history_items * EVENT_BYTES
    histories, kv = sizes.users * history, sizes.users * prompt * KV_OVERHEAD
    moved = prompt * (sizes.prefix_hit * (1 - share) + 1 - sizes.prefix_hit) + history
    calls = 1 + (2 - share if cached else 0)
    return RedisSize(
        (histories + kv) / GIB, histories / GIB, kv / GIB, rate * moved / 1e6, rate * calls, share if cached else 0.0
    )


def _gib(size: float) -> float:
    """Return bytes as GiB, rounded up to tenths."""
    return math.ceil(size / GIB * 10) / 10
