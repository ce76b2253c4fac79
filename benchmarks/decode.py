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
from collections.abc import Mapping, Sequence
from contextlib import AsyncExitStack
from dataclasses import asdict, dataclass, field, replace
from enum import StrEnum
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from atspeed.v1 import recommendation_pb2 as pb
from rich import box
from rich.console import Group
from rich.progress import Progress
from rich.table import Table

from benchmarks.errors import BenchmarkError
from benchmarks.histories import History
from benchmarks.perfect_plan import PerfectPlans, perfect_plans
from benchmarks.results import Result
from benchmarks.services import Running, mean, progress_bar, running_services, undisturbed
from client.recommender import Mode, RecommenderClient, recommend_request
from engine.bundle import read_manifest
from engine.comparison import RankedList, Verdict, compare

NAME = "decode"
ENGINE = "atspeed"
HUGGING_FACE = "transformers"
REFERENCE = "target-only"
PERFECT = "perfect-plan"
WIDTHS = (1, 3, 5, 10, 20, 50)
MODES = tuple(Mode)
_STAGES = ("history", "draft", "draft_forward", "target", "target_forward", "selection", "total")


class Prefix(StrEnum):
    """What the services know of a prompt."""

    COLD = "cold"
    WARM = "warm"


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


@dataclass(frozen=True)
class Way:
    """One way to get K items. engine, mode: as in the result; mode of a peer says what its search is."""

    engine: str
    mode: str
    k: int
    prefix: Prefix


@dataclass(frozen=True)
class Answer:
    """One measured list. stages_ms: where our time went, by the services' own clocks. ranked: None where nothing compares.

    expected_passes: 0 where no plan was weighed. predicted_ms: of the models' passes, by model; empty where nobody predicted.
    """

    milliseconds: float
    ranked: RankedList | None
    target_passes: int
    draft_passes: int = 0
    nodes_drafted: int = 0
    prompt_tokens: int = 0
    cached_tokens: int = 0
    expected_passes: float = 0.0
    stages_ms: Mapping[str, float] = field(default_factory=dict)
    predicted_ms: Mapping[str, float] = field(default_factory=dict)


class Peer(Protocol):
    """Another engine with the same weights. about: what it does, for readers of the result. most_beams: it answers no K above."""

    engine: str
    mode: str
    about: str
    most_beams: float

    def answer(self, history: History, k: int) -> Answer:
        """One list, measured."""


@dataclass(frozen=True)
class DecodeRow:
    """One way over its users. Speed-ups are of medians over the same users, against the same K and prefix (peers: cold).

    identical, near_ties, different: lists against the reference's; None where there is nothing to compare. stages_ms: medians.
    expected_passes_mean: of the requests whose plans were weighed, None without. prediction_error: by model, the median of
    |predicted / measured - 1| of its time in a request.
    """

    engine: str
    mode: str
    k: int
    prefix: str
    users: int
    p50_ms: float
    p99_ms: float
    target_passes_mean: float
    draft_passes_mean: float
    nodes_drafted_mean: float
    prompt_tokens_mean: float
    cached_tokens_mean: float
    speedup_vs_target_only: float | None
    speedup_vs_hf: float | None
    identical: int | None
    near_ties: int | None
    different: int | None
    stages_ms: Mapping[str, float]
    expected_passes_mean: float | None
    prediction_error: Mapping[str, float]

    @property
    def name(self) -> str:
        """The mode, or the other engine."""
        return self.mode if self.engine == ENGINE else self.engine

    @property
    def promises_identity(self) -> bool:
        """Whether lists that differ beyond near-ties are an error."""
        return self.mode not in {Mode.TOLERANCE, Mode.RELAXED_SAMPLING}


Answers = dict[Way, list[Answer]]


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


def table(rows: Sequence[DecodeRow]) -> Group:
    """The rows, for people: a table for each prefix."""
    measured = [prefix for prefix in Prefix if any(row.prefix == prefix for row in rows)]
    return Group(*(_table_of(prefix, [row for row in rows if row.prefix == prefix]) for prefix in measured))


def _table_of(prefix: Prefix, rows: Sequence[DecodeRow]) -> Table:
    users = max((row.users for row in rows), default=0)
    title = f"{prefix} prefix, {users} users"
    shown = Table(title=title, box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False)
    shown.add_column("", overflow="fold")
    for name in ("K", "p50\nms", "p99\nms", "target\npasses", "times\ntarget\nonly", "times\nHF", "same", "differ"):
        shown.add_column(name, justify="right", no_wrap=True)
    for row in sorted(rows, key=lambda row: row.k):
        numbers = (f"{row.p50_ms:.1f}", f"{row.p99_ms:.1f}", f"{row.target_passes_mean:.2f}")
        ratios = ("" if value is None else f"{value:.2f}" for value in (row.speedup_vs_target_only, row.speedup_vs_hf))
        counts = ("" if value is None else str(value) for value in (row.identical, row.different))
        shown.add_row(row.name, str(row.k), *numbers, *ratios, *counts)
    return shown


def to_json(rows: Sequence[DecodeRow]) -> list[dict[str, Any]]:
    """The rows, for a result file."""
    return [asdict(row) for row in rows]


def from_json(result: Result) -> list[DecodeRow]:
    """The rows of a result file. Raises BenchmarkError when it is another benchmark's."""
    if result.header.get("benchmark") != NAME:
        raise BenchmarkError("the result is not one of bench decode")
    return [DecodeRow(**row) for row in result.rows]


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
        cached_tokens=took.memory_cached_tokens + took.redis_cached_tokens,
        expected_passes=took.expected_passes,
        stages_ms={name: getattr(took.stage_times, f"{name}_ns") / 1e6 for name in _STAGES},
        predicted_ms={
            name: nanoseconds / 1e6
            for name, nanoseconds in (("target", took.target_predicted_ns), ("draft", took.draft_predicted_ns))
            if nanoseconds
        },
    )


def summary(answers: Answers) -> list[DecodeRow]:
    """A row for each way that was gone. answers: by user, in the same order for all ways; peers have the first users'."""
    return [_row(way, found, answers) for way, found in answers.items() if found]


def _row(way: Way, found: Sequence[Answer], answers: Answers) -> DecodeRow:
    times = [answer.milliseconds for answer in found]
    verdicts = _verdicts(way, found, answers)
    expected = [answer.expected_passes for answer in found if answer.expected_passes]
    counts = [None if verdicts is None else verdicts.count(verdict) for verdict in Verdict]
    return DecodeRow(
        **asdict(way),
        users=len(found),
        p50_ms=_percentile(times, 50),
        p99_ms=_percentile(times, 99),
        target_passes_mean=mean([answer.target_passes for answer in found]),
        draft_passes_mean=mean([answer.draft_passes for answer in found]),
        nodes_drafted_mean=mean([answer.nodes_drafted for answer in found]),
        prompt_tokens_mean=mean([answer.prompt_tokens for answer in found]),
        cached_tokens_mean=mean([answer.cached_tokens for answer in found]),
        speedup_vs_target_only=_speedup(found, answers.get(_target_only(way, way.prefix))),
        speedup_vs_hf=_speedup(found, _hugging_face(way.k, answers)),
        identical=counts[0],
        near_ties=counts[1],
        different=counts[2],
        stages_ms={
            name: _percentile([answer.stages_ms[name] for answer in found], 50)
            for name in (_STAGES if found[0].stages_ms else ())
        },
        expected_passes_mean=mean(expected) if expected else None,
        prediction_error=_prediction_error(found),
    )


def _prediction_error(found: Sequence[Answer]) -> dict[str, float]:
    """By model, over the requests for which its time was predicted."""
    errors = {
        model: [
            abs(answer.predicted_ms[model] / answer.stages_ms[f"{model}_forward"] - 1)
            for answer in found
            if model in answer.predicted_ms and answer.stages_ms[f"{model}_forward"]
        ]
        for model in ("target", "draft")
    }
    return {model: _percentile(some, 50) for model, some in errors.items() if some}


def _target_only(way: Way, prefix: Prefix) -> Way:
    return Way(ENGINE, str(Mode.TARGET_ONLY), way.k, prefix)


def _hugging_face(k: int, answers: Answers) -> Sequence[Answer] | None:
    return next((found for way, found in answers.items() if way.engine == HUGGING_FACE and way.k == k), None)


def _speedup(found: Sequence[Answer], reference: Sequence[Answer] | None) -> float | None:
    """Of medians, over the users that both have: the first ones."""
    both = min(len(found), len(reference or ()))
    if not both or reference is None:
        return None
    ours, theirs = ([answer.milliseconds for answer in some[:both]] for some in (found, reference))
    return round(float(np.median(theirs) / np.median(ours)), 3)


def _verdicts(way: Way, found: Sequence[Answer], answers: Answers) -> list[Verdict] | None:
    """Each list against the reference's; None where the mode makes lists of its own, or the reference was not asked."""
    exact_sample = Way(ENGINE, way.mode, way.k, Prefix.COLD)
    reference = answers.get(exact_sample if way.mode == Mode.EXACT_SAMPLING else _target_only(way, Prefix.COLD))
    if reference is None or reference is found or way.mode == Mode.RELAXED_SAMPLING:
        return None
    pairs = [
        (one.ranked, other.ranked)
        for one, other in zip(found, reference, strict=False)  # peers answered the first users only
        if one.ranked is not None and other.ranked is not None
    ]
    return [compare(one, other) for one, other in pairs] or None


def _percentile(values: Sequence[float], share: float) -> float:
    return round(float(np.percentile(values, share)), 3)
