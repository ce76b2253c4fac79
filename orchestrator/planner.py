"""How much to draft."""

from __future__ import annotations

from dataclasses import dataclass

from engine.plan import PlanSize


@dataclass(frozen=True)
class Planner:
    """A budget proportional to the beams of all drafted levels; the draft spends it where a miss is likeliest.

    nodes_per_beam: nodes of a plan for each beam of each level 1..L-1; the AtSpeed paper drafts N = 2K per level (section 4).
    max_nodes: most nodes of a plan.
    """

    nodes_per_beam: float
    max_nodes: int

    def size(self, beam_width: int, levels: int) -> PlanSize:
        """The plan for a search of `beam_width` beams through a trie of `levels` levels."""
        nodes = min(self.max_nodes, max(1, round(self.nodes_per_beam * beam_width * (levels - 1))))
        return PlanSize(beam_width=beam_width, width=nodes, max_nodes=nodes)
