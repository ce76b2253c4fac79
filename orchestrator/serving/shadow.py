"""Shadow checks: a share of the strict lists is made again by the target alone, after the reply, and compared with what was sent.

Strict lists are exact by construction, so what this finds is a fault below it: a kernel whose scores depend on what else is in
the pass, a damaged cache, a replica that lies. Too many of them switch speculation off; lists are then the target's own.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from typing import Protocol

import structlog

from atspeed.concurrency.deadline import Deadline
from atspeed.engine.bundle.catalogue import Catalogue
from atspeed.engine.search.list_comparison import RankedList, Verdict, compare_searches, largest_gap
from atspeed.engine.search.mode import Mode
from atspeed.errors import ResourceExhaustedError, ServiceError
from atspeed.observability import tracing
from atspeed.rpc.admission import Admission, Priority
from orchestrator.recommend import Recommender
from orchestrator.recommendation import Recommendation, RecommendParams
from orchestrator.speculation_breaker import SpeculationBreaker

_log: structlog.stdlib.BoundLogger = structlog.get_logger(__name__)


class Served(Protocol):
    """What a list was made with; see `snapshots.Snapshot`."""

    @property
    def recommender(self) -> Recommender:
        """Makes it again."""

    def in_use(self) -> AbstractContextManager[object]:
        """For as long as it is needed."""


@dataclass(frozen=True)
class ShadowLimits:
    """share: of the strict lists that are checked. concurrency: checks at once. What comes on top of them, or while all places
    are taken, is not checked.

    seconds: how long a check may take.
    """

    share: float
    concurrency: int = 1
    seconds: float = 10.0


class ShadowChecks:
    """Checks lists behind their requests' backs. For the event loop only.

    outcomes: how many lists turned out identical, near-tie or different, how many checks failed, and how many were
    dropped because the service was busy.
    """

    OUTCOMES = (*(verdict.value for verdict in Verdict), "failed", "dropped")

    def __init__(
        self,
        limits: ShadowLimits,
        admission: Admission,
        speculation_breaker: SpeculationBreaker,
    ) -> None:
        self._limits = limits
        self._admission = admission
        self._draft_switch = speculation_breaker
        self._due = 0.0
        # The event loop itself only keeps weak references to tasks.
        self._running: set[asyncio.Task[None]] = set()
        self.outcomes: Counter[str] = Counter(dict.fromkeys(self.OUTCOMES, 0))
        self.largest_gap = 0.0

    def offer(self, made: Recommendation, served: Served) -> None:
        """Offer a list for a check. A share of the strict lists is checked, if a plan or target prefetch had a part in them."""
        if not made.order.mode.properties.shadow_checked or not (made.memo.drafted or made.memo.prefetched):
            return
        self._due += self._limits.share
        if self._due < 1:
            return
        self._due -= 1
        if len(self._running) >= self._limits.concurrency or self._admission.running >= self._admission.places:
            self.outcomes["dropped"] += 1
            return
        task = asyncio.get_running_loop().create_task(self._check(made, served), name="shadow-check")
        self._running.add(task)
        task.add_done_callback(self._running.discard)

    async def settle(self) -> None:
        """Wait for the checks that run."""
        await asyncio.gather(*self._running)

    async def close(self) -> None:
        """Give them up."""
        for task in self._running:
            task.cancel()
        await asyncio.gather(*self._running, return_exceptions=True)

    async def _check(self, made: Recommendation, served: Served) -> None:
        try:
            with served.in_use(), tracing.span("shadow check", k=made.order.k) as span:
                async with self._admission.place(Priority.BATCH):
                    again = _again(made, served.recommender.catalogue)
                    alone = await served.recommender.recommend(again, Deadline(self._limits.seconds))
                outcome = self._judge(made, alone, served.recommender)
                span.set(outcome=outcome)
        except ResourceExhaustedError:
            outcome = "dropped"
        except ServiceError as error:
            outcome = "failed"
            _log.warning("shadow check failed", code=error.code)
        except Exception as error:  # noqa: BLE001 - nobody waits for this task
            outcome = "failed"
            _log.error("shadow check failed", exc_info=error)
        self.outcomes[outcome] += 1

    def _judge(self, made: Recommendation, alone: Recommendation, recommender: Recommender) -> str:
        sent, expected = RankedList.of(made.items), RankedList.of(alone.items)
        verdict = compare_searches([*_levels(made), sent], [*_levels(alone), expected])
        if verdict is not Verdict.NEAR_TIE:  # searches that parted within rounding may end anywhere
            self.largest_gap = max(self.largest_gap, largest_gap(sent, expected))
        if verdict is Verdict.DIFFERENT:
            if recommender.manifest.target.plan_invariant:  # float16 rounds too coarsely for exact lists
                self._draft_switch.mismatch()
            _log.error(
                "a strict list is not the target's own",
                k=made.order.k,
                beam_width=made.order.beam_width,
                strict=_shown(sent, recommender.catalogue),
                target_only=_shown(expected, recommender.catalogue),
                target_passes=made.memo.passes,
                target_version=made.target.model_version,
                draft_version=made.draft.model_version,
                catalogue_version=recommender.catalogue.version,
                speculation="on" if self._draft_switch.on else "off",
            )
        return verdict.value


def _levels(made: Recommendation) -> list[RankedList]:
    """The beams that a search went through, level by level."""
    return [RankedList(tuple(map(str, beams.node.tolist())), tuple(beams.score.tolist())) for beams in made.memo.levels]


def _again(made: Recommendation, catalogue: Catalogue) -> RecommendParams:
    """The same order by the target alone, on the history as it was then; it gives way to those that somebody waits for.

    A stored user stays its subject: what the check leaves in caches is that user's too, and on the same replicas.
    """
    history = [catalogue.id_of(int(item)) for item in made.history.known]
    return replace(made.order, mode=Mode.TARGET_ONLY, history=history, priority=Priority.BATCH)


def _shown(ranked: RankedList, catalogue: Catalogue) -> list[tuple[int, float]]:
    """Trie leaves and their scores, which name no user and mean nothing without the catalogue."""
    leaves = catalogue.leaf_of(catalogue.find(ranked.items)).tolist()
    return list(zip(leaves, ranked.scores, strict=True))
