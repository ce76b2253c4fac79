"""Ledger of the passes of one request, used ones and ones made in advance."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass, replace

from atspeed.engine.arrays import Int64
from atspeed.engine.model.pass_stats import PassStats
from atspeed.engine.search.scoring import Evaluation
from atspeed.engine.search.trie import among
from orchestrator.planning.usage import Usage


@dataclass(frozen=True)
class MadePass:
    """A pass that the target has made."""

    evaluation: Evaluation
    stats: PassStats


class PassLedger:
    """Passes of one request.

    Attributes:
        usage: stats of the passes that the search has used.
    """

    def __init__(self) -> None:
        self.usage = Usage()
        self._ahead: deque[MadePass] = deque()

    @property
    def has_next(self) -> bool:
        """Return whether the next pass was made in advance."""
        return bool(self._ahead)

    def add_ahead(self, passes: Iterable[MadePass]) -> None:
        """Keep passes of the autonomous search, which no call has asked for yet."""
        self._ahead.extend(passes)

    def next_for(self, nodes: Int64) -> Evaluation | None:
        """Return the next pass made in advance if it evaluates `nodes`, else None.

        Its time counts as a wait of its own, not as that of the first call.
        """
        if not self._ahead or not among(self._ahead[0].evaluation.node, nodes).all():
            return None
        made = self._ahead.popleft()
        pass_ns = made.stats.queue_ns + made.stats.forward_ns + made.stats.selection_ns
        self.usage.waits[0] -= pass_ns
        self.usage.waits.append(pass_ns)
        return self.count(made)

    def count(self, made: MadePass) -> Evaluation:
        """Count a pass that the search uses, and return its evaluation."""
        stats = made.stats
        if self.usage.passes:  # a second session opens on the same prompt, which was counted on the first
            stats = replace(stats, cached_tokens_by_tier={})
        self.usage.costs.append(stats)
        self.usage.passes += 1
        return made.evaluation

    def clear(self) -> None:
        """Forget the passes made in advance."""
        self._ahead.clear()
