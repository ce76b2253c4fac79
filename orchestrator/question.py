"""What both models are asked for one request, by when, and what their answers took."""

from __future__ import annotations

import time
from dataclasses import dataclass, field

from engine.cost import PassCost
from engine.scoring import Perturbation
from engine.trie import Int64, Pruning
from service_kit.admission import Priority
from service_kit.errors import DeadlineExceededError, is_over
from service_kit.logs import request_metadata

PROBE_SECONDS = 1.0
"""How long a question about a service's state may take."""


class Deadline:
    """When a request must be done, on the monotonic clock. The time left travels with every call."""

    def __init__(self, seconds: float) -> None:
        self._seconds, self._at = seconds, time.monotonic() + seconds

    @property
    def passed(self) -> bool:
        """Whether it has passed, as far as the two ends' clocks and gRPC's rounding can tell."""
        return is_over(self._at - time.monotonic(), self._seconds)

    def left(self) -> float:
        """Seconds left. Raises DeadlineExceededError when there are none."""
        left = self._at - time.monotonic()
        if left <= 0:
            raise DeadlineExceededError("the request's deadline has passed")
        return left


@dataclass(frozen=True)
class ModelQuestion:
    """What both models are told of a request. prompt: int64 [prompt], in the vocabulary of the model asked.

    affinity: requests of one affinity should meet the same replicas; empty for any. owner: the stored user's tag, if it is one's.
    """

    prompt: Int64
    pruning: Pruning
    deadline: Deadline
    noise: Perturbation | None = None
    tenant: str = ""
    affinity: str = ""
    owner: bytes = b""
    priority: Priority = Priority.INTERACTIVE

    @property
    def metadata(self) -> tuple[tuple[str, str], ...]:
        """What travels beside a call's message."""
        return (*request_metadata(), *self.priority.metadata)


@dataclass
class Usage:
    """What one model's part of a request took.

    costs: of every answer. waits: nanoseconds that the orchestrator waited for every call, answered or not.
    """

    costs: list[PassCost] = field(default_factory=list)
    waits: list[int] = field(default_factory=list)
    passes: int = 0
    retries: int = 0
    model_version: str = ""

    @property
    def cost(self) -> PassCost:
        """All answers together."""
        return sum(self.costs, PassCost())

    @property
    def wait_ns(self) -> int:
        """All calls together."""
        return sum(self.waits)

    @property
    def clean(self) -> bool:
        """Whether every call had one answer, so that each wait belongs to a cost."""
        return not self.retries and len(self.costs) == len(self.waits)


class BadReplyError(Exception):
    """A service answered something that no honest one could."""
