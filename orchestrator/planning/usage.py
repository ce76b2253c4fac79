"""What one model's part of a request took, as the orchestrator sees it."""

from __future__ import annotations

from dataclasses import dataclass, field

from atspeed.engine.model.pass_stats import PassStats


@dataclass
class Usage:
    """What one model's part of a request took.

    costs: of every answer. waits: nanoseconds that the orchestrator waited for every call, answered or not.
    """

    costs: list[PassStats] = field(default_factory=list)
    waits: list[int] = field(default_factory=list)
    passes: int = 0
    retries: int = 0
    model_version: str = ""

    @property
    def cost(self) -> PassStats:
        """All answers together."""
        return sum(self.costs, PassStats())

    @property
    def wait_ns(self) -> int:
        """All calls together."""
        return sum(self.waits)

    @property
    def clean(self) -> bool:
        """Whether every call had one answer, so that each wait belongs to a cost."""
        return not self.retries and len(self.costs) == len(self.waits)
