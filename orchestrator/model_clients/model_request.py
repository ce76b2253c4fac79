"""What both models are asked for one request."""

from __future__ import annotations

from dataclasses import dataclass

from atspeed.concurrency.deadline import Deadline
from atspeed.engine.arrays import Int64
from atspeed.engine.search.scoring import Perturbation
from atspeed.engine.search.trie import Pruning
from atspeed.observability.logs import request_metadata
from atspeed.rpc.admission import Priority

PROBE_SECONDS = 1.0
"""How long a question about a service's state may take."""


@dataclass(frozen=True)
class ModelRequest:
    """What both models are told of a request. prompt: int64 [prompt], in the vocabulary of the model asked.

    affinity: requests of one affinity should meet the same replicas; empty for any. owner: the stored user's tag, if it is one's.
    speculates: whether the target may be asked for more than the search needs, and a failure may be that part's.
    """

    prompt: Int64
    pruning: Pruning
    deadline: Deadline
    noise: Perturbation | None = None
    tenant: str = ""
    affinity: str = ""
    owner: bytes = b""
    priority: Priority = Priority.INTERACTIVE
    speculates: bool = False

    @property
    def metadata(self) -> tuple[tuple[str, str], ...]:
        """What travels beside a call's message."""
        return (*request_metadata(), *self.priority.metadata)


class PlanUnansweredError(Exception):
    """The target has no answer to what was planned or foreseen. It may have one to the search alone."""


class BadReplyError(Exception):
    """A service answered something that no honest one could."""
