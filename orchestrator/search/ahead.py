"""A draft beside a target that goes on by itself: what it would plan for is being evaluated anyway."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from atspeed.engine.search.beams import Beams
from atspeed.engine.search.plan import Plan
from orchestrator.search.beam_loop import Draft


class GoingOn(Protocol):
    """A target that may be ahead of the search."""

    @property
    def ahead(self) -> bool:
        """Whether the next pass has been made."""


@dataclass(frozen=True)
class DraftWhereNeeded:
    """A draft that is asked as long as the target is not ahead."""

    draft: Draft
    target: GoingOn

    async def plan(self, below: Beams) -> Plan:
        """As the draft's, or an empty one."""
        return Plan.empty(below) if self.target.ahead else await self.draft.plan(below)
