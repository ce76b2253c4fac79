"""Passes that a draft makes for a plan: one for each level, or one in all."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from atspeed.engine.arrays import Float64, Int64
from atspeed.engine.bundle.manifest import LEVEL_HEADS, ModelEntry
from atspeed.engine.model.pass_stats import PassStats
from atspeed.engine.speculation.latency_model import LatencyModel, Pass

# Prompt tokens that a second plan computes again: half of a block of 16 tokens, since only full blocks are cached. Smaller
# blocks make it fewer; a few tokens hardly change the time of a pass.
_PARTIAL_BLOCK_TOKENS = 8


@dataclass(frozen=True)
class PlanPlace:
    """Where a plan hangs, and how deep it is.

    Attributes:
        start: level of the beams that it hangs below.
        beams: their number.
        levels: levels below the beams.
    """

    start: int
    beams: int
    levels: int


@dataclass(frozen=True)
class PlanPasses:
    """Passes of a draft for its plans.

    The first pass of a language model reads the prompt and the beams, and each other one a level. A draft with heads reads the
    prompt only, in one pass. What its heads take is part of a call's overhead. That is a line in the number of nodes, with a
    constant for each number of levels, and both are learned.

    Attributes:
        one: true if a plan takes one pass, whatever its levels.
    """

    one: bool = False

    @classmethod
    def of(cls, draft: ModelEntry | None) -> PlanPasses:
        """Return the passes of a bundle's draft. A kind that is not known here makes one for each level."""
        return cls(one=draft is not None and draft.draft_kind == LEVEL_HEADS)

    def count(self, levels: int) -> int:
        """Return the number of passes for a plan of so many levels."""
        return 1 if self.one else levels

    def expected_ns(
        self, draft: LatencyModel, place: PlanPlace, nodes: Int64, prompt_tokens: int, computed_share: float
    ) -> Float64:
        """Return the time of a call for plans of so many nodes [c].

        computed_share: expected share of the prompt that the draft computes at the root, because it is not cached.
        """
        if place.start == 0:
            first_tokens = max(1.0, computed_share * prompt_tokens)
        else:
            first_tokens = _PARTIAL_BLOCK_TOKENS + self._beam_tokens(place)
        passes = self.count(place.levels)
        first = draft.forward_ns(first_tokens, max(0.0, prompt_tokens - first_tokens))
        later = (passes - 1) * draft.forward_ns(nodes / place.levels, prompt_tokens) + passes * draft.queue_ns
        return np.asarray(first + later + draft.overhead_ns(nodes, call=place.levels))

    def made(self, place: PlanPlace, nodes: int, prompt_tokens: int, stats: PassStats) -> list[Pass]:
        """Return the passes of a plan of so many nodes, by the tokens of all of them together."""
        passes, total, cached = self.count(place.levels), stats.new_tokens, stats.cached_tokens
        first = total if passes == 1 else min(total, max(0, prompt_tokens - cached) + self._beam_tokens(place))
        later = (total - first) // max(1, passes - 1)
        call = place.levels
        return [Pass(first, cached, nodes, call), *(Pass(later, cached + first, 0, call) for _ in range(passes - 1))]

    def _beam_tokens(self, place: PlanPlace) -> int:
        """Return the tokens of the beams and their ancestors, which a language model evaluates in its first pass."""
        return 0 if self.one else place.beams * place.start
