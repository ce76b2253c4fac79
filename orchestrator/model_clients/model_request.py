"""Request of one recommendation to a model, and the errors of both clients."""

from __future__ import annotations

from dataclasses import dataclass

from atspeed.concurrency.deadline import Deadline
from atspeed.engine.arrays import Int64
from atspeed.engine.search.scoring import Perturbation
from atspeed.engine.search.trie import Pruning
from atspeed.observability.logs import request_metadata
from atspeed.rpc.admission import Priority

# Longest wait for GetModelInfo: a healthy replica answers it in milliseconds, and GetServiceInfo waits for it.
PROBE_SECONDS = 1.0


@dataclass(frozen=True)
class ModelRequest:
    """Prompt and conditions of one request to a model.

    Attributes:
        prompt: int64 [prompt], in the vocabulary of the model.
        pruning: nodes that the request's exclusions or allow-list remove.
        noise: perturbation of a sampling mode, else None.
        affinity: requests of one affinity go to the same replica; empty for any replica.
        user_key: key of the stored user, whose keys and values are erased with the user; None without a stored user.
    """

    prompt: Int64
    pruning: Pruning
    deadline: Deadline
    noise: Perturbation | None = None
    tenant: str = ""
    affinity: str = ""
    user_key: bytes | None = None
    priority: Priority = Priority.INTERACTIVE

    @property
    def metadata(self) -> tuple[tuple[str, str], ...]:
        """Return the metadata of a call: request id, trace and priority."""
        return (*request_metadata(), *self.priority.metadata)


class PlanUnansweredError(Exception):
    """The target has no valid answer to a plan or to prefetched nodes. It may have one to the search alone."""


class BadReplyError(Exception):
    """A reply is not one that the contract allows."""
