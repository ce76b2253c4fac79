"""How much to draft."""

from __future__ import annotations

from dataclasses import dataclass

from engine.plan import PlanSize


@dataclass(frozen=True)
class Planner:
    """A plan proportional to the beam width: strict verification needs all beams of a level among the planned ones.

    width_factor: nodes per level as a multiple of the beam width; the AtSpeed paper drafts N = 2K (section 4).
    max_nodes: most nodes of a plan; what is left out is what the draft believes in least.
    """

    width_factor: float
    max_nodes: int

    def size(self, beam_width: int) -> PlanSize:
        """The plan for a search of `beam_width` beams."""
        width = max(1, round(self.width_factor * beam_width))
        return PlanSize(width=min(width, self.max_nodes), max_nodes=self.max_nodes)
