"""What the loop asks of draft and target, as spans: a request's trace reads like the loop."""

from __future__ import annotations

from dataclasses import dataclass

from atspeed.engine.search.beams import Beams
from atspeed.engine.search.plan import Plan
from atspeed.engine.search.scoring import Evaluation
from atspeed.engine.search.trie import Int64
from atspeed.observability import tracing
from orchestrator.search.beam_loop import Draft, Target


@dataclass(frozen=True)
class TracedDraft:
    """A draft whose plans are spans."""

    draft: Draft

    async def plan(self, below: Beams) -> Plan:
        """As the draft's."""
        with tracing.span("plan", beams=len(below)) as span:
            plan = await self.draft.plan(below)
            span.set(nodes=len(plan.node))
        return plan


@dataclass
class TracedTarget:
    """A target whose passes are spans, numbered from 1."""

    target: Target
    passes: int = 0

    async def evaluate(self, nodes: Int64) -> Evaluation:
        """As the target's."""
        self.passes += 1
        with tracing.span("evaluate", number=self.passes, nodes=len(nodes)):
            return await self.target.evaluate(nodes)
