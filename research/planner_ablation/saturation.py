"""Detection of a saturated model: passes that wait longer than a plain pass takes."""

from __future__ import annotations

from collections.abc import Iterable

from atspeed.engine.ewma import Ewma
from atspeed.engine.model.pass_stats import PassStats

# Passes whose queue is remembered: load changes sooner than what a plan is worth.
_QUEUE_MEMORY = 10


class Saturation:
    """Queue of a model, and the time of plain passes by beam width. A plain pass holds beams only.

    A pass that finds another one running waits for about as long. If it waits longer, throughput depends on the work of each
    request. Nodes that are not needed add work.
    """

    def __init__(self) -> None:
        self._queue_ns = Ewma(0.0, _QUEUE_MEMORY)
        self._plain_ns: dict[int, Ewma] = {}

    def __call__(self, width: int) -> bool:
        """Return true if passes wait longer than a plain pass takes. width: rounded beam width."""
        plain = self._plain_ns.get(width)
        return plain is not None and self._queue_ns.value > plain.value

    def learn(self, width: int, passes: Iterable[PassStats], plain: Iterable[PassStats]) -> None:
        """Learn from all passes of a request, and from its plain ones. Shared passes take longer and are left out."""
        for one in passes:
            self._queue_ns.add(one.queue_ns)
        for one in plain:
            if one.batch_requests <= 1:
                self._plain_ns.setdefault(width, Ewma(0.0)).add(one.forward_ns)
