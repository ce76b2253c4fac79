"""Shadow checks over a table in place of the target, and the speculation breaker."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Iterator, Sequence
from contextlib import AsyncExitStack, contextmanager
from dataclasses import dataclass, field, replace
from typing import Any, cast

import numpy as np
import pytest
import structlog

from atspeed.concurrency.deadline import Deadline
from atspeed.engine.arrays import Int64
from atspeed.engine.bundle.manifest import ROLES, Manifest, ModelEntry, Precision
from atspeed.engine.bundle.prompt import PromptTemplate
from atspeed.engine.bundle.prompts import Prompts
from atspeed.engine.search.beam_widths import BeamWidths
from atspeed.engine.search.beams import Beams
from atspeed.engine.search.mode import Mode
from atspeed.engine.search.plan import Plan, PlanSize, Proposal
from atspeed.engine.search.scoring import Evaluation, ScoringRule
from atspeed.errors import UnavailableError
from atspeed.rpc.admission import Admission, Priority
from orchestrator.degraded_reason import DegradedReason
from orchestrator.model_clients.model_request import ModelRequest
from orchestrator.planning.planner import PlanLimits, Planner
from orchestrator.planning.usage import Usage
from orchestrator.recommend import Recommender
from orchestrator.recommendation import Recommendation, RecommendParams
from orchestrator.serving.shadow import ShadowChecks, ShadowLimits
from orchestrator.speculation_breaker import SpeculationBreaker
from orchestrator.user_key import user_cache_key
from tests.oracles.naive_trie import NaiveTrie
from tests.oracles.worlds import ScriptedDraft, World, at_random

USER, SECONDS = "a user", 60.0


@dataclass
class Table:
    """Stands for the target's client. With a fault, a pass over several levels is answered from another table."""

    world: World
    other: World
    fault: bool = False
    down: bool = False
    gate: asyncio.Event | None = None
    usage: Usage = field(default_factory=Usage)
    asked: list[ModelRequest] = field(default_factory=list)

    has_next_pass = prefetches = False

    def session(
        self,
        request: ModelRequest,
        *,
        max_children: int | None,
        beam_widths: BeamWidths | None,
        prefetches: bool,
        speculates: bool,
    ) -> Table:
        self.prefetches = prefetches
        self.request, self.limit = request, max_children or 1_000_000
        self.asked.append(request)
        return self

    async def evaluate(self, nodes: Int64) -> Evaluation:
        if self.gate:
            await self.gate.wait()
        if self.down:
            raise UnavailableError("no target replica could answer")
        depths = self.world.trie.depth(nodes)
        with_others = depths[0] != depths[-1]
        world = self.other if self.fault and with_others else self.world
        return world.evaluate(nodes, self.request.pruning, self.limit)

    def close(self) -> None:
        pass


@dataclass
class Half:
    """Stands for the draft's client: plans half of what there is."""

    draft: ScriptedDraft
    usage: Usage = field(default_factory=Usage)
    prompt_tokens: int = 1
    degraded_reason: DegradedReason | None = None

    def session(self, request: ModelRequest, proposal: Proposal) -> Half:
        return self

    async def plan(self, below: Beams, size: PlanSize, seconds: float = math.inf) -> Plan:
        return await self.draft.plan(below)


@dataclass
class Histories:
    """Stands for the store: every user has the same history."""

    items: list[str]

    async def get(self, user_id: str, *, tenant: str) -> list[str]:
        return self.items


def world(seed: int) -> World:
    rng = np.random.default_rng(0)
    paths = {f"item-{n}": tuple(rng.integers(0, 6, 3).tolist()) for n in range(120)}
    return World.random(NaiveTrie(paths, [6, 6, 6]), ScoringRule.VOCAB, seed)


def manifest(of: World, precision: Precision, *, ordered_sums: bool) -> Manifest:
    columns = of.trie.columns
    entry = ModelEntry(
        path="target/model.onnx",
        architecture="table",
        precision=precision,
        parameters=1,
        vocab_size=columns + 3,
        layers=1,
        kv_heads=1,
        head_dim=1,
        max_positions=100,
        code_tokens=tuple(range(3, columns + 3)),
        prompt=PromptTemplate(prefix=(1,), suffix=(2,), max_items=8),
        fingerprint="table",
        ordered_sums=ordered_sums,
    )
    return Manifest(
        name="table",
        scoring_rule=of.rule,
        catalogue_version=of.catalogue.version,
        target=entry,
        draft=entry,
        files={},
    )


class Service:
    """A recommender over the table, with its shadow checks."""

    def __init__(
        self,
        *,
        share: float = 1.0,
        concurrency: int = 1_000,
        speculation_breaker: SpeculationBreaker | None = None,
        precision: Precision = "float32",
        ordered_sums: bool = True,
        worlds: tuple[World, World] | None = None,
    ) -> None:
        self.world, other = worlds or (world(1), world(2))
        self.target = Table(self.world, other)
        self.speculation_breaker = speculation_breaker or SpeculationBreaker()
        half = Half(ScriptedDraft(self.world.trie, at_random(3, 0.5)))
        self.recommender = Recommender(
            manifest(self.world, precision, ordered_sums=ordered_sums and precision == "float32"),
            self.world.catalogue,
            dict.fromkeys(
                ROLES,
                Prompts.of(manifest(self.world, precision, ordered_sums=ordered_sums).target, self.world.catalogue),
            ),
            cast("Any", self.target),
            cast("Any", half),
            Planner(self.world.trie, PlanLimits()),
            cast("Any", Histories(sorted(self.world.naive.items)[:6])),
            self.speculation_breaker,
        )
        limits = ShadowLimits(share, concurrency, SECONDS)
        self.admission = Admission(8, 0)
        self.shadow = ShadowChecks(limits, self.admission, self.speculation_breaker)
        self.held = 0

    @contextmanager
    def in_use(self) -> Iterator[None]:
        self.held += 1
        try:
            yield
        finally:
            self.held -= 1

    async def ask(self, seed: int, mode: Mode = Mode.STRICT, **fields: Any) -> Recommendation:
        """A random request, offered to the checks."""
        rng = np.random.default_rng(seed)
        chosen = rng.choice(sorted(self.world.naive.items), 12, replace=False).tolist()
        params = RecommendParams(
            k=5, beam_widths=BeamWidths.of(5), mode=mode, history=chosen[:6], excluded=chosen[6:], **fields
        )
        made = await self.recommender.recommend(params, Deadline(SECONDS))
        self.shadow.offer(made, self)
        return made

    async def ask_all(self, seeds: Sequence[int]) -> None:
        """Requests one after the other, each with its check."""
        for seed in seeds:
            await self.ask(seed)
            await self.shadow.settle()


async def test_shadow_checks_of_correct_lists_are_all_identical() -> None:
    service = Service()
    await service.ask_all(range(100))
    assert service.shadow.outcomes == {"identical": 100, "different": 0, "failed": 0, "dropped": 0}
    assert service.speculation_breaker.enabled
    assert service.shadow.largest_gap == 0


async def test_target_whose_scores_depend_on_the_pass_is_detected_and_speculation_disabled() -> None:
    service = Service()
    service.target.fault = True
    with structlog.testing.capture_logs() as logs:
        await service.ask_all(range(30))
    assert service.shadow.outcomes["different"] == 3
    assert not service.speculation_breaker.enabled
    alone = await service.ask(1, mode=Mode.TARGET_ONLY)
    strict = await service.ask(1)
    assert strict.items == alone.items
    assert list(strict.degraded_reasons) == [DegradedReason.SPECULATION_DISABLED]
    assert list(alone.degraded_reasons) == []
    assert not strict.diagnostics.memo.drafted
    (first, *_) = mismatches = [line for line in logs if line["event"] == "shadow_check_mismatch"]
    assert [line["speculation"] for line in mismatches] == ["on", "on", "off"]
    leaves = {leaf for leaf, _ in first["strict"]}
    assert leaves <= set(range(int(service.world.trie.level_start[-2]), service.world.trie.nodes))
    assert first["strict"] != first["target_only"]
    assert "item-" not in str(logs)


@pytest.mark.parametrize("ordered", [True, False])
async def test_a_list_that_differs_by_rounding_is_a_fault_of_a_plan_invariant_target_only(ordered: bool) -> None:
    """One of two beams survives whose scores differ in the last bits. The items below them differ."""
    even = World.random(NaiveTrie({"left": (0, 0), "right": (1, 1)}, (2, 2)), ScoringRule.VOCAB, 0)
    even.logits[:] = [[1, 1, 0, 0], [0, 0, 2, 0], [0, 0, 0, -2], *[[0] * 4] * (len(even.logits) - 3)]
    tilted = even.logits.copy()
    tilted[0, 1] += 1e-6
    breaker = SpeculationBreaker(mismatches=1)
    service = Service(worlds=(even, replace(even, logits=tilted)), speculation_breaker=breaker, ordered_sums=ordered)
    service.target.fault = True
    made = None
    while made is None or not made.diagnostics.memo.drafted:  # the draft plans at random
        made = await service.recommender.recommend(
            RecommendParams(k=1, beam_widths=BeamWidths.of(1), history=["left"]), Deadline(SECONDS)
        )
    assert [item.item_id for item in made.items] == ["right"]
    assert made.exact is ordered
    service.shadow.offer(made, service)
    await service.shadow.settle()
    assert {name for name, count in service.shadow.outcomes.items() if count} == {"different"}
    assert service.speculation_breaker.enabled is not ordered


async def test_target_prefetches_only_for_requests_that_speculate() -> None:
    """Target-only requests do not, and no request does after speculation is disabled."""
    service = Service()
    for mode in (Mode.STRICT, Mode.TARGET_ONLY):
        await service.ask(0, mode)
        assert service.target.prefetches is (mode is Mode.STRICT)
    for _ in range(100):
        service.speculation_breaker.record_mismatch()
    await service.ask(0, Mode.STRICT)
    assert not service.target.prefetches


async def test_list_with_prefetched_nodes_only_is_checked() -> None:
    service = Service()
    made = await service.recommender.recommend(_params(service), Deadline(SECONDS))
    memo = made.diagnostics.memo
    memo.prefetched, memo.drafted = memo.drafted, set()
    service.shadow.offer(made, service)
    await service.shadow.settle()
    assert service.shadow.outcomes["identical"] == 1


async def test_shadow_share_of_strict_lists_is_checked_and_no_other_mode() -> None:
    service = Service(share=0.25)
    await service.ask_all(range(40))
    assert service.shadow.outcomes["identical"] == 10
    for mode in (Mode.TARGET_ONLY, Mode.TOLERANCE, Mode.EXACT_SAMPLING, Mode.RELAXED_SAMPLING):
        for seed in range(8):
            await service.ask(seed, mode)
    await service.shadow.settle()
    assert service.shadow.outcomes.total() == 10


async def test_shadow_share_of_zero_checks_no_list() -> None:
    service = Service(share=0)
    await service.ask_all(range(20))
    assert service.shadow.outcomes.total() == 0


async def test_checks_beyond_the_concurrency_are_dropped() -> None:
    service = Service(concurrency=2)
    made = [await service.recommender.recommend(_params(service), Deadline(SECONDS)) for _ in range(5)]
    service.target.gate = asyncio.Event()
    for one in made:
        service.shadow.offer(one, service)
    assert service.shadow.outcomes["dropped"] == 3
    service.target.gate.set()
    await service.shadow.settle()
    assert service.shadow.outcomes["identical"] == 2


async def test_check_without_a_free_place_is_dropped() -> None:
    service = Service()
    made = await service.recommender.recommend(_params(service), Deadline(SECONDS))
    async with AsyncExitStack() as places:
        for _ in range(service.admission.slots):
            await places.enter_async_context(service.admission.slot(Priority.INTERACTIVE))
        service.shadow.offer(made, service)
        await service.shadow.settle()
    assert service.shadow.outcomes["dropped"] == service.shadow.outcomes.total() == 1
    assert service.admission.running == 0


async def test_failed_check_does_not_count_as_mismatch() -> None:
    service = Service(speculation_breaker=SpeculationBreaker(mismatches=1))
    made = await service.recommender.recommend(_params(service), Deadline(SECONDS))
    service.target.down = True
    service.shadow.offer(made, service)
    await service.shadow.settle()
    assert service.shadow.outcomes["failed"] == 1
    assert service.speculation_breaker.enabled


async def test_check_of_a_stored_users_list_keeps_the_user_key() -> None:
    """Without the key, the check once cached the prompt where no erasure reached it, and on other replicas than the list's."""
    service = Service()
    made = await service.recommender.recommend(
        RecommendParams(k=5, beam_widths=BeamWidths.of(5), user_id=USER, tenant="t"), Deadline(SECONDS)
    )
    service.shadow.offer(made, service)
    await service.shadow.settle()
    first, again = service.target.asked
    assert first.user_key == again.user_key == user_cache_key("t", USER)
    assert first.affinity == again.affinity
    assert again.prompt.tolist() == first.prompt.tolist()
    assert service.shadow.outcomes["identical"] == 1


async def test_check_uses_the_history_that_the_list_was_made_from() -> None:
    """Events that came in since then do not matter."""
    service = Service()
    made = await service.recommender.recommend(
        RecommendParams(k=5, beam_widths=BeamWidths.of(5), user_id=USER), Deadline(SECONDS)
    )
    service.recommender.histories = None
    service.shadow.offer(made, service)
    await service.shadow.settle()
    assert service.shadow.outcomes["identical"] == 1


async def test_close_cancels_running_checks() -> None:
    service = Service()
    made = await service.recommender.recommend(_params(service), Deadline(SECONDS))
    service.target.gate = asyncio.Event()
    service.shadow.offer(made, service)
    await service.shadow.close()
    await service.shadow.settle()
    assert service.shadow.outcomes.total() == 0


@pytest.mark.parametrize(("precision", "exact"), [("float32", True), ("int8", True), ("float16", False)])
async def test_list_is_exact_only_if_rounding_does_not_depend_on_the_plan(precision: Precision, exact: bool) -> None:
    """Replies once promised it for float16 too, whose log-probabilities move by 1e-2 with what else is in the pass."""
    service = Service(precision=precision)
    for mode in (Mode.TARGET_ONLY, Mode.STRICT, Mode.EXACT_SAMPLING):
        assert (await service.ask(1, mode)).exact is exact
    assert not (await service.ask(1, Mode.RELAXED_SAMPLING)).exact


def _params(service: Service) -> RecommendParams:
    return RecommendParams(k=5, beam_widths=BeamWidths.of(5), history=sorted(service.world.naive.items)[:6])


@pytest.mark.parametrize(
    ("times", "mismatches", "on"),
    [
        ([0, 1], 3, True),
        ([0, 1, 2], 3, False),
        ([0, 6, 12], 3, True),
        ([0, 6, 12, 14, 15], 3, False),
        ([0, 0, 0, 0], 0, True),
        ([0], 1, False),
    ],
)
def test_breaker_disables_speculation_after_mismatches_within_the_window(
    times: list[float], mismatches: int, on: bool
) -> None:
    """The window is ten seconds."""
    clock = iter(times)
    speculation_breaker = SpeculationBreaker(mismatches, 10, clock=lambda: next(clock))
    for _ in times:
        speculation_breaker.record_mismatch()
    assert speculation_breaker.enabled is on
