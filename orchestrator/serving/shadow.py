"""Shadow checks: the target computes a share of the strict lists again, alone.

The check runs after the reply and compares both lists, bit for bit. Strict lists are exact by construction, so a difference is a
fault below the search: a kernel whose scores depend on the rest of the pass, a damaged cache, a replica with wrong weights. Too
many differences disable speculation, and lists are then the target's own. A target that is not plan-invariant promises no bits:
there the items are compared, and differences are counted only.
"""

from __future__ import annotations

from collections import Counter
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from typing import Protocol

import structlog

from atspeed.concurrency.deadline import Deadline
from atspeed.concurrency.tasks import TaskSet
from atspeed.engine.bundle.catalogue import Catalogue
from atspeed.engine.search.list_comparison import RankedList, largest_gap
from atspeed.engine.search.mode import Mode
from atspeed.errors import ResourceExhaustedError, ServiceError
from atspeed.observability import tracing
from atspeed.rpc.admission import Admission, Priority
from orchestrator.recommend import Recommender
from orchestrator.recommendation import Recommendation, RecommendParams
from orchestrator.speculation_breaker import SpeculationBreaker

_log: structlog.stdlib.BoundLogger = structlog.get_logger(__name__)


class RecommenderLease(Protocol):
    """The snapshot that made a list; see `snapshots.Snapshot`."""

    @property
    def recommender(self) -> Recommender:
        """Return the recommender that made the list."""

    def in_use(self) -> AbstractContextManager[object]:
        """Keep the snapshot open for the length of the block."""


@dataclass(frozen=True)
class ShadowLimits:
    """Limits of shadow checks.

    Attributes:
        share: share of the strict lists that are checked.
        concurrency: number of checks at once; further lists are dropped.
        seconds: longest time of a check.
    """

    share: float
    concurrency: int = 1
    seconds: float = 10.0


class ShadowChecks:
    """Checks of lists after their replies. Not thread-safe.

    Attributes:
        outcomes: number of checks by outcome: identical, different, failed, or dropped because the service was busy.
        largest_gap: largest score difference at one rank.
    """

    OUTCOMES = ("identical", "different", "failed", "dropped")

    def __init__(
        self,
        limits: ShadowLimits,
        admission: Admission,
        speculation_breaker: SpeculationBreaker,
    ) -> None:
        self._limits = limits
        self._admission = admission
        self._speculation_breaker = speculation_breaker
        self._due = 0.0  # checks that the share asks for and that were not made yet
        self._running = TaskSet()
        self.outcomes: Counter[str] = Counter(dict.fromkeys(self.OUTCOMES, 0))
        self.largest_gap = 0.0

    def offer(self, served: Recommendation, lease: RecommenderLease) -> None:
        """Offer a list for a check. Only lists with drafted or prefetched nodes are checked: the others are the target's own."""
        memo = served.diagnostics.memo
        if not served.params.mode.properties.shadow_checked or not (memo.drafted or memo.prefetched):
            return
        self._due += self._limits.share
        if self._due < 1:
            return
        self._due -= 1
        if len(self._running) >= self._limits.concurrency or self._admission.running >= self._admission.slots:
            self.outcomes["dropped"] += 1
            return
        self._running.start(self._check(served, lease), "shadow-check")

    async def settle(self) -> None:
        """Wait for the running checks."""
        await self._running.join()

    async def close(self) -> None:
        """Cancel the running checks."""
        await self._running.cancel()

    async def _check(self, served: Recommendation, lease: RecommenderLease) -> None:
        recommender = lease.recommender
        try:
            with lease.in_use(), tracing.span("shadow check", k=served.params.k) as span:
                async with self._admission.slot(Priority.BATCH):
                    params = _target_only_params(served, recommender.catalogue)
                    alone = await recommender.recommend(params, Deadline(self._limits.seconds))
                outcome = self._compare(served, alone, recommender)
                span.set(outcome=outcome)
        except ResourceExhaustedError:
            outcome = "dropped"
        except ServiceError as error:
            outcome = "failed"
            _log.warning("shadow_check_failed", code=error.code)
        except Exception as error:  # noqa: BLE001 - this task has no awaiter
            outcome = "failed"
            _log.error("shadow_check_failed", exc_info=error)
        self.outcomes[outcome] += 1

    def _compare(self, served: Recommendation, alone: Recommendation, recommender: Recommender) -> str:
        sent, expected = RankedList.of(served.items), RankedList.of(alone.items)
        self.largest_gap = max(self.largest_gap, largest_gap(sent, expected))
        if not (served.plan_invariant and alone.plan_invariant):  # scores are not promised, and swaps are no fault
            return "identical" if sent.items == expected.items else "different"
        if sent == expected:
            return "identical"
        self._speculation_breaker.record_mismatch()
        self._log_mismatch(served, sent, expected, recommender.catalogue)
        return "different"

    def _log_mismatch(
        self, served: Recommendation, sent: RankedList, expected: RankedList, catalogue: Catalogue
    ) -> None:
        diagnostics = served.diagnostics
        _log.error(
            "shadow_check_mismatch",
            k=served.params.k,
            beam_widths=served.params.beam_widths.listed,
            strict=_leaf_scores(sent, catalogue),
            target_only=_leaf_scores(expected, catalogue),
            target_passes=diagnostics.memo.passes,
            target_version=diagnostics.target.model_version,
            draft_version=diagnostics.draft.model_version,
            catalogue_version=catalogue.version,
            speculation="on" if self._speculation_breaker.enabled else "off",
        )


def _target_only_params(served: Recommendation, catalogue: Catalogue) -> RecommendParams:
    """Return the same request for the target alone, with the history as it was read, at the priority of batches.

    A stored user stays the subject: keys and values that the check leaves in caches belong to the user, on the same replicas.
    """
    history = [catalogue.id_of(int(item)) for item in served.history.known]
    return replace(served.params, mode=Mode.TARGET_ONLY, history=history, priority=Priority.BATCH)


def _leaf_scores(ranked: RankedList, catalogue: Catalogue) -> list[tuple[int, float]]:
    """Return trie leaves and scores for the log. They name no user, and mean nothing without the catalogue."""
    leaves = catalogue.leaf_of(catalogue.find(ranked.items)).tolist()
    return list(zip(leaves, ranked.scores, strict=True))
