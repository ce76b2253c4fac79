"""The Python client of AtSpeed Serving's recommendation service.

    with Client("localhost:50051") as client:
        client.record("alice", ["item-1", "item-2"])
        print(client.recommend("alice", k=10).item_ids)

`AsyncClient` has the same calls for async code.
"""

from pathlib import Path as _Path

from atspeed_client.async_client import AsyncClient
from atspeed_client.channels import Tls
from atspeed_client.client import Client
from atspeed_client.enums import (
    ColdStart,
    DegradedReason,
    FewerThanK,
    ItemOutcome,
    Mode,
    NodeOrigin,
    Origin,
    Priority,
    ScoringRule,
    Stage,
    Track,
)
from atspeed_client.errors import (
    ArgumentTypeError,
    ArgumentValueError,
    CallError,
    CertificateError,
    ClientStateError,
    RecommenderError,
    UsageError,
    Violation,
)
from atspeed_client.explanations import Explanation, ItemExplanation, PathStep, SearchNode, StageSpan
from atspeed_client.replies import (
    Backend,
    Exactness,
    History,
    Item,
    Recommendation,
    Recorded,
    ServiceInfo,
    StageTimes,
    Statistics,
    Versions,
)
from atspeed_client.requests import Event, RecommendRequest, UserEvents

PROTOS = _Path(__file__).parent / "protos"
"""Folder of the contract's .proto files, for `protoc -I`."""

__all__ = [
    "PROTOS",
    "ArgumentTypeError",
    "ArgumentValueError",
    "AsyncClient",
    "Backend",
    "CallError",
    "CertificateError",
    "Client",
    "ClientStateError",
    "ColdStart",
    "DegradedReason",
    "Event",
    "Exactness",
    "Explanation",
    "FewerThanK",
    "History",
    "Item",
    "ItemExplanation",
    "ItemOutcome",
    "Mode",
    "NodeOrigin",
    "Origin",
    "PathStep",
    "Priority",
    "RecommendRequest",
    "Recommendation",
    "RecommenderError",
    "Recorded",
    "ScoringRule",
    "SearchNode",
    "ServiceInfo",
    "Stage",
    "StageSpan",
    "StageTimes",
    "Statistics",
    "Tls",
    "Track",
    "UsageError",
    "UserEvents",
    "Versions",
    "Violation",
]
