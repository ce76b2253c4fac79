"""How long a list takes, side by side: our modes through the real services, Hugging Face `generate`, onnxruntime-genai.

One request at a time. All that is compared is asked about a user before the next user's turn, in an order of the user's own, so
that a machine that has other work slows all alike. Times are the caller's, from the request to the whole answer.

    cold    no service has keys and values of the prompt: the request's tenant is its own
    warm    the same request was served before the user's last item came, for the same tenant

The peers have no prefix cache for beam search; their one time stands beside both. A plan that is perfect and free is the limit of
what any draft could do (`perfect_plan`). Lists are compared with those of cold target-only, exact samples with cold ones by the
same seed.
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
    PERFECT,
    STAGES,
    Answer,
    Answers,
    DecodeRow,
    Prefix,
    Way,
    summary,
)
from atspeed.benchmarks.histories import History
from atspeed.benchmarks.oracle_plan import PerfectPlans, perfect_plans
from atspeed.benchmarks.services import Running, progress_bar, running_services, undisturbed
from atspeed.client.recommender import RecommenderClient, recommend_request
from atspeed.engine.bundle.manifest import read_manifest
from atspeed.engine.search.list_comparison import RankedList
from atspeed.engine.search.mode import Mode
from atspeed.v1 import recommendation_pb2 as pb

WIDTHS = (1, 3, 5, 10, 20, 50)
MODES = tuple(Mode)


@dataclass(frozen=True)
class Question:
    """What is asked about every user. seed: of the order and of sampled lists. peer_users: how many users the peers answer.

    perfect: whether plans that hold exactly what is needed, and cost nothing, are measured beside the modes.

    settle: users before these, who are asked everything of us and do not count: what is done once is then done, and the planner
    knows what passes take and what plans are good for.
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
    """Another engine with the same weights. about: what it does, for readers of the result. most_beams: it answers no K above."""

    engine: str
    mode: str
    about: str
    most_beams: float

    def answer(self, history: History, k: int) -> Answer:
        """One list, measured."""


async def run(
    root: Path, histories: Sequence[History], question: Question, peers: Sequence[Peer], running: Running
) -> list[DecodeRow]:
    """Ask everything about every user; the first `settle` of them do not count. Raises BenchmarkError where a service failed."""
    unmeasured, histories = histories[: question.settle], histories[question.settle :]
    perfect = question.perfect and read_manifest(root).draft is not None
    modes = [*map(str, question.modes), *([PERFECT] if perfect else [])]
    ways = [Way(ENGINE, mode, k, prefix) for prefix in question.prefixes for k in question.widths for mode in modes]
    others = [
        (peer, Way(peer.engine, peer.mode, k, Prefix.COLD))
        for peer in peers
        for k in question.widths
        if k <= peer.most_beams
    ]
    answers: Answers = {way: [] for way in [*ways, *(way for _, way in others)]}
    async with AsyncExitStack() as stack:
        services = await stack.enter_async_context(running_services(root, running))
        plans = await stack.enter_async_context(perfect_plans(root, services)) if perfect else None
        asker = _Asker(services.client, plans, question)
        with progress_bar() as progress:
            await _settle(asker, unmeasured, ways, peers, progress)
            task = progress.add_task("users", total=len(histories))
            for number, history in enumerate(histories):
                turns: list[tuple[Peer | None, Way]] = [(None, way) for way in ways]
                turns += others if number < question.peer_users else []
                for index in np.random.default_rng([question.seed, number]).permutation(len(turns)):
                    peer, way = turns[index]
                    answers[way].append(await asker.answer(peer, way, history, number))
                progress.advance(task)
    return summary(answers)


async def _settle(
    asker: _Asker, histories: Sequence[History], ways: Sequence[Way], peers: Sequence[Peer], progress: Progress
) -> None:
    task = progress.add_task("users that do not count", total=len(histories))
    for history in histories:
        for way in ways:
            await asker.answer(None, way, history, number=-1)
        progress.advance(task)
    for peer in peers:
        peer.answer(histories[0], ways[0].k)
    progress.remove_task(task)


class _Asker:
    """Asks the services or a peer for a list."""

    def __init__(self, client: RecommenderClient, plans: PerfectPlans | None, question: Question) -> None:
        self._client, self._plans, self._question, self._tenants = client, plans, question, 0

    async def answer(self, peer: Peer | None, way: Way, history: History, number: int) -> Answer:
        """User `number`'s list, measured."""
        if peer is not None:
            return await asyncio.to_thread(peer.answer, history, way.k)
        self._tenants += 1
        if self._plans is not None and way.mode == PERFECT:
            await self._plans.foresee(history, way.k)
            mode, before = Mode.STRICT, Mode.TARGET_ONLY
            return _undrafted(await self._ours(self._plans.client, way, mode, before, history, number))
        return await self._ours(self._client, way, Mode(way.mode), Mode(way.mode), history, number)

    async def _ours(
        self, client: RecommenderClient, way: Way, mode: Mode, before: Mode, history: History, number: int
    ) -> Answer:
        """before: the mode of the request that warms the prefix."""
        if way.prefix is Prefix.WARM:
            await undisturbed(client, self._request(before, way.k, history[:-1], number))
        request = self._request(mode, way.k, history, number)
        begun = time.perf_counter()
        reply = await undisturbed(client, request)
        return _answer(reply, 1e3 * (time.perf_counter() - begun))

    def _request(self, mode: Mode, k: int, history: History, number: int) -> pb.RecommendRequest:
        return recommend_request(
            history=history,
            k=k,
            beam_width=k,
            mode=mode,
            tolerance=self._question.tolerance if mode is Mode.TOLERANCE else 0.0,
            seed=self._question.seed + max(0, number) if mode.samples else None,
            tenant=f"decode-{self._tenants}",
        )


def _undrafted(answer: Answer) -> Answer:
    """Without the wait for a plan that nobody drafted."""
    wait = answer.stages_ms["draft"]
    stages = {**answer.stages_ms, "draft": 0.0, "total": answer.stages_ms["total"] - wait}
    return replace(answer, milliseconds=answer.milliseconds - wait, stages_ms=stages)


def header(
    question: Question, peers: Sequence[Peer], running: Running, *, users: int, items: tuple[int, int | None]
) -> dict[str, Any]:
    """What the rows were asked for, beside where they come from. items: the least and the most of a user."""
    return {
        "benchmark": NAME,
        "users": users,
        "items": items,
        "settle": question.settle,
        "peer_users": question.peer_users,
        "peers": {peer.engine: peer.about for peer in peers},
        "tolerance": question.tolerance,
        "threads": running.threads,
        "provider": running.provider,
        "planner": running.planner,
    }


def _answer(reply: pb.RecommendResponse, milliseconds: float) -> Answer:
    took = reply.statistics
    return Answer(
        milliseconds=milliseconds,
        ranked=RankedList.of(reply.items),
        target_passes=took.target_passes,
        draft_passes=took.draft_passes,
        nodes_drafted=took.nodes_drafted,
        prompt_tokens=took.prompt_tokens,
        cached_tokens=sum(took.cached_tokens.values()),
        expected_passes=took.expected_passes,
        stages_ms={name: getattr(took.stage_times, f"{name}_ns") / 1e6 for name in STAGES},
        predicted_ms={
            name: nanoseconds / 1e6
            for name, nanoseconds in (("target", took.target_predicted_ns), ("draft", took.draft_predicted_ns))
            if nanoseconds
        },
    )
