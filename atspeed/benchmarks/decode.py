"""Time of a list: our modes, Hugging Face `generate` and onnxruntime-genai.

One request at a time. All variants are measured for a user before the next user, in a random order for each user, so that a
disturbance of the machine meets all of them. Times are the caller's, from the request to the whole list.

    cold    no service has KV of the prompt: each request has its own tenant
    warm    the same request was served before the user's last item came, for the same tenant

The other engines have no prefix cache for beam search, so their one time is compared with both. An oracle plan bounds what any
draft could do (`oracle_plan`). Lists are compared with those of cold target-only, and exact samples with cold ones by the same
seed.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from rich.progress import Progress

from atspeed.benchmarks.decode_rows import (
    ENGINE,
    NAME,
    ORACLE_PLAN,
    STAGES,
    DecodeRow,
    ListSample,
    Prefix,
    Samples,
    Variant,
    summary,
)
from atspeed.benchmarks.histories import History
from atspeed.benchmarks.oracle_plan import OraclePlans, oracle_plans
from atspeed.benchmarks.services import ServiceOptions, healthy_reply, progress_bar, running_services
from atspeed.engine.bundle.manifest import read_manifest
from atspeed.engine.search.list_comparison import RankedList
from atspeed.engine.search.mode import Mode
from atspeed_client import AsyncClient, Recommendation, RecommendRequest

WIDTHS = (1, 3, 5, 10, 20, 50)  # from one item to a page of candidates for a ranker
MODES = tuple(Mode)


@dataclass(frozen=True)
class DecodeConfig:
    """Configuration of the measurement.

    Attributes:
        peer_users: users whose lists the other engines make.
        perfect: True if lists with oracle plans are measured too.
        settle: users before the others, who are not counted. They warm up the services, and the planner learns from them.
        seed: seed of the order and of sampled lists.
    """

    widths: Sequence[int] = WIDTHS
    modes: Sequence[Mode] = MODES
    prefixes: Sequence[Prefix] = tuple(Prefix)
    tolerance: float = 0.1
    peer_users: int = 0
    perfect: bool = True
    settle: int = 1
    seed: int = 1


class Peer(Protocol):
    """Another engine with the same weights.

    Attributes:
        mode: the name of its search.
        about: a description for readers of the result.
        max_beams: the largest K that it supports.
    """

    engine: str
    mode: str
    about: str
    max_beams: float

    def measure(self, history: History, k: int) -> ListSample:
        """Make and measure one list."""


async def run(
    root: Path, histories: Sequence[History], config: DecodeConfig, peers: Sequence[Peer], options: ServiceOptions
) -> list[DecodeRow]:
    """Measure every variant for every user; the first `settle` users are not counted.

    Raises BenchmarkError where a service failed.
    """
    settling, histories = histories[: config.settle], histories[config.settle :]
    perfect = config.perfect and read_manifest(root).draft is not None
    modes = [*map(str, config.modes), *([ORACLE_PLAN] if perfect else [])]
    own = [Variant(ENGINE, mode, k, prefix) for prefix in config.prefixes for k in config.widths for mode in modes]
    others = [
        (peer, Variant(peer.engine, peer.mode, k, Prefix.COLD))
        for peer in peers
        for k in config.widths
        if k <= peer.max_beams
    ]
    samples: Samples = {variant: [] for variant in [*own, *(variant for _, variant in others)]}
    async with AsyncExitStack() as stack:
        services = await stack.enter_async_context(running_services(root, options))
        plans = await stack.enter_async_context(oracle_plans(root, services)) if perfect else None
        timer = _ListTimer(services.client, plans, config)
        with progress_bar() as progress:
            await _settle(timer, settling, own, peers, progress)
            task = progress.add_task("users", total=len(histories))
            for number, history in enumerate(histories):
                turns: list[tuple[Peer | None, Variant]] = [(None, variant) for variant in own]
                turns += others if number < config.peer_users else []
                for index in np.random.default_rng([config.seed, number]).permutation(len(turns)):
                    peer, variant = turns[index]
                    samples[variant].append(await timer.measure(peer, variant, history, number))
                progress.advance(task)
    return summary(samples)


async def _settle(
    timer: _ListTimer,
    histories: Sequence[History],
    variants: Sequence[Variant],
    peers: Sequence[Peer],
    progress: Progress,
) -> None:
    task = progress.add_task("users that are not counted", total=len(histories))
    for history in histories:
        for variant in variants:
            await timer.measure(None, variant, history, number=-1)
        progress.advance(task)
    for peer in peers:
        peer.measure(histories[0], variants[0].k)
    progress.remove_task(task)


class _ListTimer:
    """Measures lists of the services and of other engines."""

    def __init__(self, client: AsyncClient, plans: OraclePlans | None, config: DecodeConfig) -> None:
        self._client = client
        self._plans = plans
        self._config = config
        self._tenants = 0

    async def measure(self, peer: Peer | None, variant: Variant, history: History, number: int) -> ListSample:
        """Measure the list of user `number`."""
        if peer is not None:
            return await asyncio.to_thread(peer.measure, history, variant.k)
        self._tenants += 1
        if self._plans is not None and variant.mode == ORACLE_PLAN:
            await self._plans.prepare(history, variant.k)
            mode, before = Mode.STRICT, Mode.TARGET_ONLY
            return _without_draft_wait(await self._own(self._plans.client, variant, mode, before, history, number))
        return await self._own(self._client, variant, Mode(variant.mode), Mode(variant.mode), history, number)

    async def _own(
        self, client: AsyncClient, variant: Variant, mode: Mode, before: Mode, history: History, number: int
    ) -> ListSample:
        """Measure a list of the services. before: the mode of the request that warms the prefix."""
        if variant.prefix is Prefix.WARM:
            await healthy_reply(client, self._request(before, variant.k, history[:-1], number))
        request = self._request(mode, variant.k, history, number)
        begun = time.perf_counter()
        reply = await healthy_reply(client, request)
        return _sample(reply, 1e3 * (time.perf_counter() - begun))

    def _request(self, mode: Mode, k: int, history: History, number: int) -> RecommendRequest:
        return RecommendRequest(
            history=history,
            k=k,
            beam_width=k,
            mode=mode,
            tolerance=self._config.tolerance if mode is Mode.TOLERANCE else 0.0,
            seed=self._config.seed + max(0, number) if mode.samples else None,
            tenant=f"decode-{self._tenants}",
        )


def _without_draft_wait(sample: ListSample) -> ListSample:
    """Take off the wait for an oracle plan, which no model drafted."""
    wait = sample.stages_ms["draft"]
    stages = {**sample.stages_ms, "draft": 0.0, "total": sample.stages_ms["total"] - wait}
    return replace(sample, milliseconds=sample.milliseconds - wait, stages_ms=stages)


def header(
    config: DecodeConfig, peers: Sequence[Peer], options: ServiceOptions, *, users: int, items: tuple[int, int | None]
) -> dict[str, Any]:
    """Return the header's fields. items: the least and the most of a user."""
    return {
        "benchmark": NAME,
        "users": users,
        "items": items,
        "settle": config.settle,
        "peer_users": config.peer_users,
        "peers": {peer.engine: peer.about for peer in peers},
        "tolerance": config.tolerance,
        "threads": options.threads,
        "provider": options.provider,
        "planner": options.planner,
    }


def _sample(reply: Recommendation, milliseconds: float) -> ListSample:
    took = reply.statistics
    return ListSample(
        milliseconds=milliseconds,
        ranked=RankedList.of(reply.items),
        target_passes=took.target_passes,
        draft_passes=took.draft_passes,
        nodes_drafted=took.nodes_drafted,
        prompt_tokens=took.prompt_tokens,
        cached_tokens=sum(took.cached_tokens.values()),
        expected_passes=took.expected_passes,
        stages_ms={name: getattr(took.stage_times, f"{name}_ms") for name in STAGES},
        predicted_ms={
            name: milliseconds
            for name, milliseconds in (("target", took.target_predicted_ms), ("draft", took.draft_predicted_ms))
            if milliseconds
        },
    )
