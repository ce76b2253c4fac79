"""Time and passes that a request used of one model, as the orchestrator sees them."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import reduce
from operator import add

from atspeed.engine.model.pass_stats import PassStats


@dataclass
class Usage:
    """Use of one model by a request.

    Attributes:
        costs: stats of every reply.
        waits: nanoseconds that the orchestrator waited for every call, answered or not.
        passes: number of passes.
        retries: number of calls that were made again.
        model_version: version that the model reported; None before the first reply.
    """

    costs: list[PassStats] = field(default_factory=list)
    waits: list[int] = field(default_factory=list)
    passes: int = 0
    retries: int = 0
    model_version: str | None = None

    @property
    def cost(self) -> PassStats:
        """Return the sum of all replies' stats."""
        return reduce(add, self.costs) if self.costs else PassStats()

    @property
    def wait_ns(self) -> int:
        """Return the sum of all waits."""
        return sum(self.waits)

    @property
    def clean(self) -> bool:
        """Return true if every call had one reply, so that each wait belongs to a reply's stats."""
        return not self.retries and len(self.costs) == len(self.waits)
