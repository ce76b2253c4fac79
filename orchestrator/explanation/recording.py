"""Recording of one search: its plans, its passes and when they were made.

The recording stands around target and draft of the request's session, so a request that is not explained has no part of it.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from atspeed.engine.arrays import Int64
from atspeed.engine.search.beams import Beams
from atspeed.engine.search.plan import Plan
from atspeed.engine.search.scoring import Evaluation
from atspeed.engine.search.trie import ROOT
from orchestrator.degraded_reason import DegradedReason
from orchestrator.explanation.explanation import Stage, StageSpan
from orchestrator.model_clients.interfaces import RequestTarget
from orchestrator.planning.sized_draft import RequestDraft
from orchestrator.planning.usage import Usage
from orchestrator.request_session import RequestSession


@dataclass(frozen=True)
class RecordedSearch:
    """Plans and passes of a search that ended.

    Attributes:
        session: the session of the request.
        plans: the plans, in order, of a search that was given up too.
        passes: the nodes that each pass evaluated.
        stages: all stages, in time order, of a search that was given up too.
    """

    session: RequestSession
    plans: Sequence[Plan]
    passes: Sequence[Int64]
    stages: Sequence[StageSpan]


class Recording:
    """Recording of the search of one request. It begins when the request arrives."""

    def __init__(self) -> None:
        self._arrived_ns = self._done_ns = time.perf_counter_ns()
        self._session: RequestSession | None = None
        self._plans: list[Plan] = []
        self._passes: list[Int64] = []
        self._stages: list[StageSpan] = []

    def admitted(self) -> None:
        """Record the end of the wait for admission."""
        self._add(Stage.ADMISSION)

    def opened(self, session: RequestSession) -> RequestSession:
        """Record the end of the history's stage, and return the session with its target and draft recorded."""
        self._add(Stage.HISTORY)
        self._session = session
        return replace(session, target=_RecordedTarget(session.target, self), draft=_RecordedDraft(session.draft, self))

    def ended(self) -> RecordedSearch:
        """Record the end of the last selection, and return everything."""
        self._add(Stage.SELECTION)
        if self._session is None:
            raise RuntimeError("the request opened no session")
        return RecordedSearch(self._session, self._plans, self._passes, self._stages)

    def called(self) -> None:
        """Record that the loop calls a model, which ends a selection."""
        if self._stages[-1].stage is Stage.PASS:
            self._add(Stage.SELECTION)

    def planned(self, plan: Plan) -> None:
        """Record a plan."""
        self._plans.append(plan)
        self._add(Stage.PLAN, nodes=len(plan.node))

    def evaluated(self, nodes: Int64, evaluation: Evaluation, usage: Usage, *, in_advance: bool) -> None:
        """Record a pass that was asked for `nodes`. A search that asks for the root starts anew."""
        if int(nodes[0]) == ROOT:
            self._passes.clear()
        self._passes.append(evaluation.node.astype(np.int64))
        stats = usage.costs[-1]
        self._add(
            Stage.PASS,
            pass_number=len(self._passes),
            nodes=len(evaluation.node),
            in_advance=in_advance,
            queue_ns=stats.queue_ns,
            forward_ns=stats.forward_ns,
            selection_ns=stats.selection_ns,
            new_tokens=stats.new_tokens,
        )

    def _add(self, stage: Stage, **facts: Any) -> None:
        """Add a stage from the end of the last one to now."""
        now = time.perf_counter_ns()
        self._stages.append(StageSpan(stage, self._done_ns - self._arrived_ns, now - self._done_ns, **facts))
        self._done_ns = now


class _RecordedTarget:
    """Target whose passes are recorded; see `interfaces.RequestTarget`."""

    def __init__(self, target: RequestTarget, recording: Recording) -> None:
        self._target = target
        self._recording = recording

    @property
    def usage(self) -> Usage:
        """Return the stats of the passes that the search has used."""
        return self._target.usage

    @property
    def has_next_pass(self) -> bool:
        """Return whether the target has made the next pass already."""
        return self._target.has_next_pass

    async def evaluate(self, nodes: Int64) -> Evaluation:
        """Make one pass."""
        in_advance = self._target.has_next_pass
        self._recording.called()
        evaluation = await self._target.evaluate(nodes)
        self._recording.evaluated(nodes, evaluation, self._target.usage, in_advance=in_advance)
        return evaluation

    def close(self) -> None:
        """Free the state of the request."""
        self._target.close()


class _RecordedDraft:
    """Draft whose plans are recorded; see `sized_draft.RequestDraft`."""

    def __init__(self, draft: RequestDraft, recording: Recording) -> None:
        self._draft = draft
        self._recording = recording

    @property
    def usage(self) -> Usage:
        """Return the costs of the draft's calls."""
        return self._draft.usage

    @property
    def degraded_reason(self) -> DegradedReason | None:
        """Return why the draft failed; None if it did not."""
        return self._draft.degraded_reason

    async def plan(self, below: Beams) -> Plan:
        """Return a plan below these beams."""
        self._recording.called()
        plan = await self._draft.plan(below)
        self._recording.planned(plan)
        return plan
