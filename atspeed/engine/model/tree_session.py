"""The state of a request in a model service: token tree, passes, program."""

from __future__ import annotations

import time
from collections.abc import Generator
from dataclasses import dataclass, field
from typing import Any, TypeVar

from atspeed.engine.arrays import Float32, Int64, KvArray
from atspeed.engine.model.batcher import QueuedRequest
from atspeed.engine.model.pass_stats import PassStats
from atspeed.engine.model.token_tree import TokenTree
from atspeed.engine.search.scoring import Evaluation, Perturbation
from atspeed.engine.search.trie import Pruning

Found = TypeVar("Found")

PassProgram = Generator[Int64, Evaluation, Found]
"""Passes that depend on each other: yields the nodes of a pass, receives their evaluation, returns its result."""


@dataclass(frozen=True)
class Selection:
    """The choice of an evaluated node's children: the best `limit` live ones.

    Attributes:
        pruning: the nodes that the request removes.
        limit: children per node.
        perturbation: None for the order by score; else the Gumbel noise of exact sampling.
    """

    pruning: Pruning
    limit: int
    perturbation: Perturbation | None = None


@dataclass(frozen=True)
class CompletedPass:
    """A pass that was made.

    Attributes:
        nodes: the number of nodes that it evaluated.
        stats: its tokens and times.
        queued_ns: the time at which it was queued, by `time.perf_counter_ns`.
        done_ns: the time at which it was done.
        valid: whether its scores are finite.
    """

    nodes: int
    stats: PassStats
    queued_ns: int
    done_ns: int
    valid: bool = True


@dataclass
class TreeSession:
    """The state of one request in a model service: its token tree, and its place in the queue.

    It has no KV memory before its first pass. While `last_request` is not done, only the worker thread touches the session.

    Attributes:
        tokens: the token tree.
        keys: the block keys of the prompt's whole blocks.
        cached_blocks: the blocks that the prefix cache had on the host, until the first pass has read them.
        lookup_stats: the statistics of the lookup, the encoder and earlier parts of the prompt, until the first pass with nodes
            reports them as part of its own.
        opened_at: the time by `time.monotonic`. Passes of older sessions come first.
        synthetic: true for measurements and checks, which no request waits for: their passes wait for no co-batched request.
        capacity: tokens of KV that are reserved on the host.
        new_blocks: the blocks that no cache had, from their pass until the cache has them; on the host.
        pages: the device's pages that are held, in the order of the tree's tokens; none on the host.
        known_blocks: the prompt's blocks that a cache had, on the device or on the host.
        new_from: on a device, the first block that no cache had, from the first pass until the cache has it.
        passes: the passes that were made.
        last_request: the request that was queued last.
        state: the state after the prompt, float32 [state_size], after the first pass of a graph that gives it.
    """

    tokens: TokenTree
    keys: list[bytes]
    cached_blocks: tuple[KvArray, ...]
    lookup_stats: PassStats
    opened_at: float = field(default_factory=time.monotonic)
    synthetic: bool = False
    capacity: int = 0
    new_blocks: list[KvArray] = field(default_factory=list)
    pages: list[int] = field(default_factory=list)
    known_blocks: int = 0
    new_from: int | None = None
    passes: list[CompletedPass] = field(default_factory=list)
    last_request: QueuedRequest[ProgramRun, object] | None = None
    state: Float32 | None = None


@dataclass
class ProgramRun:
    """A program of passes over one tree while it runs.

    Attributes:
        tree: the session.
        steps: the program.
        selection: the choice of children.
        nodes: the nodes of its next pass, int64 [n].
        queued_ns: the time at which that pass was queued, by `time.perf_counter_ns`.
        waiting_ns: the same, of the part of a long prompt that comes next.
    """

    tree: TreeSession
    steps: PassProgram[Any]
    selection: Selection
    nodes: Int64
    queued_ns: int
    waiting_ns: int
