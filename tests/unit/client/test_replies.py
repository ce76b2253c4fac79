"""Replies of the client: complete, frozen, and written as JSON and as tables."""

from __future__ import annotations

import dataclasses
import json
import sys
from datetime import UTC, datetime
from types import ModuleType
from typing import Any

import pytest
from google.protobuf.descriptor import Descriptor
from google.protobuf.timestamp_pb2 import Timestamp

from atspeed_client import (
    Event,
    Exactness,
    Explanation,
    History,
    Item,
    ItemExplanation,
    PathStep,
    Recommendation,
    Recorded,
    SearchNode,
    StageSpan,
    StageTimes,
    Statistics,
    Versions,
    enums,
    reading,
)
from atspeed_client.v1 import explanation_pb2, types_pb2
from atspeed_client.v1 import recommendation_pb2 as pb

REPLY = pb.RecommendResponse(
    recommendation_id="r",
    items=[
        pb.RecommendedItem(rank=1, item_id="a", score=-0.5, code_path=[3, 1], origin=pb.ORIGIN_FORCED, path_items=2)
    ],
    versions=pb.Versions(target_model="t", bundle="b"),
    scoring_rule=types_pb2.SCORING_RULE_TRIE,
    mode=pb.MODE_EXACT_SAMPLING,
    seed=2**63 - 1,
    degraded_reasons=[pb.DEGRADED_REASON_DRAFT_BUSY, 99],  # type: ignore[list-item]
    cold_start=pb.COLD_START_EMPTY_HISTORY,
    fewer_than_k_reasons=[pb.FEWER_THAN_K_REASON_SEARCH],
    statistics=pb.Statistics(target_passes=2, cached_tokens={"redis": 5}, stage_times=pb.StageTimes(total_ms=1.5)),
)


@pytest.mark.parametrize(
    ("kind", "message", "own"),
    [
        (Recommendation, pb.RecommendResponse, {"request_id"}),
        (Item, pb.RecommendedItem, set()),
        (Versions, pb.Versions, set()),
        (Exactness, pb.Exactness, set()),
        (Statistics, pb.Statistics, set()),
        (StageTimes, pb.StageTimes, set()),
        (Event, pb.Event, set()),
        (History, pb.GetHistoryResponse, {"request_id"}),
        (Recorded, pb.RecordEventsResponse, {"request_id"}),
        (Explanation, pb.ExplainResponse, set()),
        (SearchNode, explanation_pb2.SearchNode, set()),
        (StageSpan, explanation_pb2.StageSpan, set()),
        (ItemExplanation, explanation_pb2.ItemExplanation, set()),
        (PathStep, explanation_pb2.PathStep, set()),
    ],
)
def test_a_value_has_the_fields_of_its_message(kind: Any, message: Any, own: set[str]) -> None:
    descriptor: Descriptor = message.DESCRIPTOR
    assert {one.name for one in dataclasses.fields(kind)} == {field.name for field in descriptor.fields} | own


@pytest.mark.parametrize(
    ("kind", "name", "file"),
    [
        (enums.Mode, "Mode", pb),
        (enums.Origin, "Origin", pb),
        (enums.ColdStart, "ColdStart", pb),
        (enums.FewerThanK, "FewerThanKReason", pb),
        (enums.DegradedReason, "DegradedReason", pb),
        (enums.ScoringRule, "ScoringRule", types_pb2),
        (enums.NodeOrigin, "NodeOrigin", explanation_pb2),
        (enums.Stage, "Stage", explanation_pb2),
        (enums.ItemOutcome, "ItemOutcome", explanation_pb2),
    ],
)
def test_an_enum_has_the_values_of_the_contract(kind: Any, name: str, file: Any) -> None:
    first, *others = file.DESCRIPTOR.enum_types_by_name[name].values
    prefix = first.name.removesuffix("UNSPECIFIED")
    known = {one.name for one in kind}
    assert known == {"UNKNOWN"} | {value.name.removeprefix(prefix) for value in others}
    assert {str(one) for one in kind} == {one.name.lower().replace("_", "-") for one in kind}


def test_a_reply_is_a_frozen_value() -> None:
    reply = reading.to_recommendation(REPLY, "call-1")
    assert (reply.item_ids, reply.recommendation_id, reply.request_id) == (["a"], "r", "call-1")
    assert (reply.mode, reply.items[0].origin, reply.items[0].code_path) == ("exact-sampling", "forced", (3, 1))
    assert reply.degraded_reasons == (enums.DegradedReason.DRAFT_BUSY, enums.DegradedReason.UNKNOWN)
    assert (reply.cold_start, reply.fewer_than_k_reasons) == ("empty-history", ("search",))
    assert (reply.seed, reply.statistics.cached_tokens["redis"]) == (2**63 - 1, 5)
    with pytest.raises(dataclasses.FrozenInstanceError):
        reply.degraded = True  # type: ignore[misc]
    empty = reading.to_recommendation(pb.RecommendResponse(), "")
    assert (empty.cold_start, empty.seed, empty.items) == (None, None, ())


def test_a_reply_is_written_as_json() -> None:
    written = json.loads(json.dumps(reading.to_recommendation(REPLY, "call-1").to_dict()))
    assert written["items"] == [
        {"rank": 1, "item_id": "a", "score": -0.5, "code_path": [3, 1], "origin": "forced", "path_items": 2}
    ]
    assert written["statistics"]["stage_times"]["total_ms"] == 1.5
    assert written["cold_start"] == "empty-history"
    event = Event("i", datetime(2026, 1, 2, tzinfo=UTC), event_id="e")
    history = reading.to_history(pb.GetHistoryResponse(events=[event.message("e")]), "call-2")
    assert history.to_dict()["events"][0]["time"] == "2026-01-02T00:00:00+00:00"
    info = pb.GetServiceInfoResponse(max_k=5, started_at=Timestamp(seconds=1), modes=[pb.MODE_STRICT])
    written = json.loads(json.dumps(reading.to_info(info, "").to_dict()))
    assert (written["max_k"], written["started_at"], written["modes"]) == (5, "1970-01-01T00:00:01Z", ["MODE_STRICT"])


class Frame:
    """Stands for pandas.DataFrame."""

    def __init__(self, rows: list[dict[str, Any]], columns: list[str]) -> None:
        self.rows, self.columns = rows, columns


def test_a_reply_is_a_table_where_pandas_is(monkeypatch: pytest.MonkeyPatch) -> None:
    """A row for each item or event, and the columns even without a row."""
    monkeypatch.setitem(sys.modules, "pandas", None)
    with pytest.raises(ImportError, match="pip install pandas"):
        reading.to_recommendation(REPLY, "").to_pandas()
    pandas = ModuleType("pandas")
    pandas.DataFrame = Frame  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "pandas", pandas)
    frame = reading.to_recommendation(REPLY, "").to_pandas()
    assert [(row["item_id"], row["recommendation_id"]) for row in frame.rows] == [("a", "r")]
    assert set(frame.columns) == set(frame.rows[0])
    table = reading.to_history(pb.GetHistoryResponse(events=[Event("i").message("e")]), "").to_pandas()
    assert set(table.columns) == set(table.rows[0])
    assert reading.to_history(pb.GetHistoryResponse(), "").to_pandas().columns == table.columns
