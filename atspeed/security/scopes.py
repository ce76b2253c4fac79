"""Scopes that each method needs. A method that is not listed is refused.

The table counts only where a token file is configured.
"""

from __future__ import annotations

from collections.abc import Mapping
from enum import StrEnum
from typing import Final

from atspeed.rollout.release_track import TRACK_HEADER


class Scope(StrEnum):
    """A permission of a token. No scope includes another."""

    READ = "read"
    """Recommendations, histories, versions, and the schema by reflection."""
    WRITE = "write"
    """Changes of histories."""
    EXPLAIN = "explain"
    """Explanations of lists: the nodes of a search, its time, and the places of items."""
    ADMIN = "admin"
    """The choice of a release track."""
    SERVICE = "service"
    """Calls of an orchestrator to the models, beyond every limit on users' requests."""


_RECOMMENDATION, _DRAFT, _TARGET = (f"/atspeed.v1.{name}Service" for name in ("Recommendation", "Draft", "Target"))

METHOD_SCOPES: Final[Mapping[str, Scope]] = {
    f"{_RECOMMENDATION}/Recommend": Scope.READ,
    f"{_RECOMMENDATION}/RecommendBatch": Scope.READ,
    f"{_RECOMMENDATION}/Explain": Scope.EXPLAIN,
    f"{_RECOMMENDATION}/GetHistory": Scope.READ,
    f"{_RECOMMENDATION}/GetServiceInfo": Scope.READ,
    f"{_RECOMMENDATION}/RecordEvents": Scope.WRITE,
    f"{_RECOMMENDATION}/RecordEventsBatch": Scope.WRITE,
    f"{_RECOMMENDATION}/ForgetUser": Scope.WRITE,
    f"{_DRAFT}/GetModelInfo": Scope.SERVICE,
    f"{_DRAFT}/Plan": Scope.SERVICE,
    f"{_TARGET}/GetModelInfo": Scope.SERVICE,
    f"{_TARGET}/Evaluate": Scope.SERVICE,
    "/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo": Scope.READ,
}

METADATA_SCOPES: Final[Mapping[str, Scope]] = {TRACK_HEADER: Scope.ADMIN}
"""Scopes that a call with such a metadata key needs besides its method's scope."""

# Load balancers and container runtimes check health without tokens. The answer is one word.
OPEN_TO_ALL: Final = frozenset(f"/grpc.health.v1.Health/{method}" for method in ("Check", "List", "Watch"))
