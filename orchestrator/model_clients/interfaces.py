"""Interfaces of the two models, as the recommender uses them.

`TargetClient` and `DraftClient` reach them over gRPC. `atspeed.local.in_process_models` runs them in this process.
"""

from __future__ import annotations

from typing import Protocol

from atspeed.engine.arrays import Int64
from atspeed.engine.search.beam_widths import BeamWidths
from atspeed.engine.search.plan import Proposal
from atspeed.engine.search.scoring import Evaluation
from orchestrator.model_clients.model_request import ModelRequest
from orchestrator.planning.sized_draft import DraftSource
from orchestrator.planning.usage import Usage


class RequestTarget(Protocol):
    """The target for one request."""

    @property
    def usage(self) -> Usage:
        """Return the stats of the passes that the search has used."""

    @property
    def has_next_pass(self) -> bool:
        """Return whether the target has made the next pass already."""

    async def evaluate(self, nodes: Int64) -> Evaluation:
        """Make one pass over int64 `nodes` [n]; see `beam_loop.Target`.

        Raises UnavailableError when the model has no answer, and DeadlineExceededError when the request's time is up. Raises
        PlanUnansweredError, once, when a plan may be the cause: the caller then searches again without one.
        """

    def close(self) -> None:
        """Free the state of the request."""


class TargetModel(Protocol):
    """The target model."""

    def session(
        self,
        request: ModelRequest,
        *,
        max_children: int | None,
        beam_widths: BeamWidths | None = None,
        prefetches: bool = False,
        speculates: bool = False,
    ) -> RequestTarget:
        """Open the target for one request. Close it to free its state.

        Args:
            request: the prompt and everything else that the model needs.
            max_children: number of children per node that the target returns; None for all.
            beam_widths: beam widths of the target's autonomous search; None for no such search.
            prefetches: whether the target may evaluate nodes in advance.
            speculates: whether the caller may ask for more nodes than the search needs. If the target has no valid answer to
                those, the caller asks again without them.
        """


class DraftModel(Protocol):
    """The draft model."""

    def session(self, request: ModelRequest, proposal: Proposal) -> DraftSource:
        """Return the draft for one request."""
