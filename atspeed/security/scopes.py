"""What each method of every service needs of its caller. A method that is not here is refused wherever tokens are asked for."""

from __future__ import annotations

from collections.abc import Mapping
from enum import StrEnum
from typing import Final

from atspeed.rollout.release_track import TRACK_HEADER


class Scope(StrEnum):
    """What a token allows. No scope includes another."""

    READ = "read"
    """Recommendations, histories, versions, and the schema by reflection."""
    WRITE = "write"
    """Changes of histories."""
    ADMIN = "admin"
    """What is served to whom: a track of one's choice."""
    SERVICE = "service"
    """The models, as an orchestrator asks them: past every limit on users' requests."""


_RECOMMENDATION, _DRAFT, _TARGET = (f"/atspeed.v1.{name}Service" for name in ("Recommendation", "Draft", "Target"))

METHOD_SCOPES: Final[Mapping[str, Scope]] = {
    f"{_RECOMMENDATION}/Recommend": Scope.READ,
    f"{_RECOMMENDATION}/RecommendBatch": Scope.READ,
    f"{_RECOMMENDATION}/GetHistory": Scope.READ,
    f"{_RECOMMENDATION}/GetServiceInfo": Scope.READ,
    f"{_RECOMMENDATION}/RecordEvents": Scope.WRITE,
    f"{_RECOMMENDATION}/ForgetUser": Scope.WRITE,
    f"{_DRAFT}/GetModelInfo": Scope.SERVICE,
    f"{_DRAFT}/Plan": Scope.SERVICE,
    f"{_TARGET}/GetModelInfo": Scope.SERVICE,
    f"{_TARGET}/Evaluate": Scope.SERVICE,
    "/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo": Scope.READ,
}

METADATA_SCOPES: Final[Mapping[str, Scope]] = {TRACK_HEADER: Scope.ADMIN}
"""What a call needs beside its method's scope where its metadata have such a key."""

# Load balancers and container runtimes ask for health and hold no tokens; the answer is one word.
OPEN_TO_ALL: Final = frozenset(f"/grpc.health.v1.Health/{method}" for method in ("Check", "List", "Watch"))
