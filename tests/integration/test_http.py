"""HTTP/JSON by a real Envoy before real services: every path of the OpenAPI document, errors, batches, gRPC on the same port."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import grpc
import pytest
from google.protobuf import json_format
from openapi_schema_validator import OAS31Validator

from atspeed.edge.configuration import OPENAPI
from atspeed.engine.bundle.catalogue import Catalogue
from atspeed.local.edge import LocalEdge
from atspeed.local.stack import LocalStack
from atspeed.v1 import recommendation_pb2 as pb
from tests.bundles import random_history
from tests.edge import Answer, HttpClient, needs_envoy
from tests.serving import LIVENESS_SECONDS, RECOMMENDATION, SERVING, Client, check_health, ids, refused, request_of

pytestmark = needs_envoy

DOCUMENT = json.loads(OPENAPI.read_text())
OPERATIONS = {
    operation["operationId"]: (verb.upper(), path, operation)
    for path, verbs in DOCUMENT["paths"].items()
    for verb, operation in verbs.items()
}
ODD_IDS = ["a/b", "ü x", "..", "%2F", "?k=1&x", "a+b", "#", '"', "user:events"]


@pytest.fixture(scope="module")
def edge(shared_stack: LocalStack, tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalEdge]:
    with LocalEdge([shared_stack.address], tmp_path_factory.mktemp("edge") / "edge.log") as edge:
        yield edge


@pytest.fixture
def http(edge: LocalEdge, redis_url: str) -> HttpClient:
    """A client that knows HTTP alone. Redis is empty."""
    return HttpClient(f"127.0.0.1:{edge.port}")


def quoted(user_id: str) -> str:
    """A user id as a part of a path."""
    return "".join(f"%{byte:02X}" for byte in user_id.encode())


def schema_of(part: dict[str, Any]) -> OAS31Validator:
    """Return a validator of the content of a request or a reply."""
    ((_, media),) = part["content"].items()
    return OAS31Validator({**media["schema"], "components": DOCUMENT["components"]})


def assert_described(operation_id: str, body: Any, answer: Answer) -> None:
    """Check that the document describes what was sent and what came."""
    _, _, operation = OPERATIONS[operation_id]
    if body is not None:
        schema_of(operation["requestBody"]).validate(body)
    reply = operation["responses"][str(answer.code)]
    if "$ref" in reply:
        reply = DOCUMENT["components"]["responses"][reply["$ref"].rpartition("/")[2]]
    streamed = operation_id == "RecommendBatch"
    values = answer.lines if streamed else [answer.json]
    assert len(values) == (len(body["requests"]) if streamed else 1)
    for value in values:
        schema_of(reply).validate(value)


def sample(operation_id: str, history: list[str]) -> tuple[str, Any]:
    """A path and a body with which the operation succeeds."""
    _, path, _ = OPERATIONS[operation_id]
    one = {"history": {"item_ids": history}, "k": 3, "mode": "MODE_EXACT_SAMPLING", "seed": "7"}
    bodies: dict[str, Any] = {
        "Recommend": one,
        "Explain": {"request": one, "item_ids": [history[0], "nothing"]},
        "RecommendBatch": {"requests": [one, {"k": 0}]},
        "RecordEventsBatch": {"requests": [{"user_id": "alice", "events": [{"item_id": history[0]}]}]},
        "RecordEvents": {"events": [{"item_id": history[0], "time": "2026-01-02T03:04:05.000006Z", "weight": 0.5}]},
    }
    return path.replace("{user_id}", "alice"), bodies.get(operation_id)


@pytest.mark.parametrize("operation_id", OPERATIONS)
def test_every_operation_answers_as_the_document_says(http: HttpClient, operation_id: str, history: list[str]) -> None:
    verb, _, operation = OPERATIONS[operation_id]
    path, body = sample(operation_id, history)
    answer = http(verb, path, body)
    assert answer.code == 200
    assert answer.headers["x-request-id"]
    if "content" in operation["responses"]["200"]:
        assert_described(operation_id, body, answer)


def test_the_document_has_every_method_and_no_field_twice() -> None:
    methods = {method.name for method in pb.DESCRIPTOR.services_by_name["RecommendationService"].methods}
    assert set(OPERATIONS) == methods | {"Health", "OpenApi"}
    recommend = DOCUMENT["components"]["schemas"]["RecommendRequest"]["properties"]
    assert list(recommend) == [field.name for field in pb.RecommendRequest.DESCRIPTOR.fields]
    assert "user_id" not in DOCUMENT["components"]["schemas"]["RecordEventsRequestBody"]["properties"]
    assert "user_id" in DOCUMENT["components"]["schemas"]["RecordEventsRequest"]["properties"]


def test_a_list_is_that_of_grpc(http: HttpClient, client: Client, history: list[str]) -> None:
    """Every field but times and ids, with the scores' bits."""
    answer = http("POST", "/v1/recommendations", {"history": {"item_ids": history}, "k": 20})
    reply = json_format.ParseDict(answer.json, pb.RecommendResponse())
    expected = client.recommend(history, k=20)
    assert [item.score for item in reply.items] == [item.score for item in expected.items]
    for one in (reply, expected):
        one.ClearField("statistics")
        one.ClearField("recommendation_id")
        for item in one.items:
            item.ClearField("origin")  # the second search has nodes of the first prefetched
    assert reply == expected


def test_both_spellings_of_a_field_and_an_enum_by_number_are_taken(http: HttpClient, history: list[str]) -> None:
    snake = http("POST", "/v1/recommendations", {"history": {"item_ids": history}, "beam_width": 30, "k": 2, "mode": 1})
    camel = http("POST", "/v1/recommendations", {"history": {"itemIds": history}, "beamWidth": 30, "k": 2, "mode": 1})
    assert snake.json["mode"] == camel.json["mode"] == "MODE_TARGET_ONLY"
    assert snake.json["items"] == camel.json["items"]
    assert snake.json["beam_width"] == camel.json["beam_width"] == 30


def test_defaults_are_printed_and_what_is_not_set_is_absent(http: HttpClient, history: list[str]) -> None:
    reply = http("POST", "/v1/recommendations", {"history": {"item_ids": history}, "k": 2}).json
    assert (reply["degraded"], reply["degraded_reasons"]) == (False, [])
    assert reply["cold_start"] == "COLD_START_UNSPECIFIED"
    assert "seed" not in reply


def test_a_history_is_recorded_read_and_forgotten(http: HttpClient, client: Client, history: list[str]) -> None:
    events = [{"item_id": item, "event_id": f"e{place}"} for place, item in enumerate(history[:2])]
    for duplicates in (0, 2):
        recorded = http("POST", "/v1/users/alice/events?tenant=", {"events": events}).json
        assert (recorded["history_length"], recorded["duplicate_events"]) == (2, duplicates)
    assert client.history("alice") == history[:2]
    read = http("GET", "/v1/users/alice/events").json["events"]
    assert [event["item_id"] for event in read] == history[:2]
    assert http("GET", "/v1/users/alice/events?tenant=other").json == {"events": []}
    assert http("DELETE", "/v1/users/alice").json == {"existed": True}
    assert http("GET", "/v1/users/alice/events").json == {"events": []}


@pytest.mark.parametrize("user_id", ODD_IDS)
def test_an_id_of_any_letters_fits_a_path(http: HttpClient, client: Client, history: list[str], user_id: str) -> None:
    assert http("POST", f"/v1/users/{quoted(user_id)}/events", {"events": [{"item_id": history[0]}]}).code == 200
    assert client.history(user_id) == history[:1]
    assert http("DELETE", f"/v1/users/{quoted(user_id)}").json == {"existed": True}


def test_a_batch_is_a_line_for_each_request(http: HttpClient, client: Client, catalogue: Catalogue) -> None:
    histories = [random_history(catalogue, 3, seed) for seed in range(4)]
    requests = [{"history": {"item_ids": one}, "k": 4} for one in histories]
    answer = http("POST", "/v1/recommendations:batch", {"requests": [*requests, {"k": 1}]})
    lines = {line["index"]: line for line in answer.lines}
    assert set(lines) == set(range(5))
    for index, one in enumerate(histories):
        items = [item["item_id"] for item in lines[index]["response"]["items"]]
        assert items == ids(client.recommend(one, k=4))
    assert lines[4]["error"]["code"] == 3
    assert "subject" in lines[4]["error"]["message"]


# Mistakes


def violations(answer: Answer) -> set[str]:
    """Fields that an error names."""
    (found,) = [one for one in answer.json["details"] if one["@type"].endswith("/google.rpc.BadRequest")]
    return {one["field"] for one in found["field_violations"]}


def test_a_request_that_breaks_rules_is_400_with_all_of_them(http: HttpClient) -> None:
    answer = http("POST", "/v1/recommendations", {"k": 0, "tolerance": -1})
    assert answer.code == 400
    assert {"k", "subject"} <= violations(answer)
    assert answer.json["details"][0]["reason"] == "INVALID_REQUEST"
    assert_described("Recommend", None, answer)


@pytest.mark.parametrize(
    ("body", "told"),
    [
        ('{"k":', "Unexpected end of string"),
        ('{"k": "x"}', "k: invalid value"),
        ('{"mode": "strict"}', "mode: invalid value"),
        ('{"history": {"item_ids": [{}]}}', "item_ids"),
        ("[]", ""),
    ],
)
def test_a_body_that_is_no_request_is_400_in_the_same_form(http: HttpClient, body: str, told: str) -> None:
    answer = http("POST", "/v1/recommendations", body)
    assert answer.code == 400
    assert answer.json["code"] == 3
    assert told in answer.json["message"]


@pytest.mark.parametrize(
    ("verb", "path", "code", "told"),
    [
        ("GET", "/v1/recommendations", 404, "/v1/recommendations"),
        ("GET", "/nothing", 404, "/nothing"),
        ("PUT", "/v1/users/alice", 404, "/v1/users/alice"),
        ("GET", "/v1/info?tenants=a", 400, "tenants"),
        ("POST", "/atspeed.v1.RecommendationService/Recommend", 404, "Recommend"),
    ],
)
def test_a_path_or_a_parameter_that_is_not_there_is_named(
    http: HttpClient, verb: str, path: str, code: int, told: str
) -> None:
    answer = http(verb, path, content_type="application/json")
    assert (answer.code, answer.json["details"]) == (code, [])
    assert told in answer.json["message"]


def test_a_path_and_a_body_that_differ_are_refused(http: HttpClient, history: list[str]) -> None:
    answer = http("POST", "/v1/users/alice/events", {"user_id": "bob", "events": [{"item_id": history[0]}]})
    assert answer.code == 400
    assert http("GET", "/v1/users/bob/events").json == {"events": []}


def test_a_user_without_a_history_is_404(http: HttpClient) -> None:
    answer = http("POST", "/v1/recommendations", {"user_id": "nobody", "k": 3})
    assert answer.code == 404
    assert answer.json["details"][0]["reason"] == "HISTORY_NOT_FOUND"
    assert violations(answer) == {"user_id"}


def test_a_deadline_in_the_header_is_kept(http: HttpClient, history: list[str]) -> None:
    body = {"history": {"item_ids": history}, "k": 20}
    late = http("POST", "/v1/recommendations", body, grpc_timeout="1u")
    assert (late.code, late.json["code"]) == (504, 4)
    assert http("POST", "/v1/recommendations", body, grpc_timeout="60S").code == 200


def test_more_than_the_service_takes_is_refused(http: HttpClient, history: list[str]) -> None:
    """Its own limit of items, and the limit of a message."""
    many = http("POST", "/v1/recommendations", {"history": {"item_ids": ["x"] * 100_000}, "k": 1})
    assert (many.code, violations(many)) == (400, {"history"})
    huge = http("POST", "/v1/recommendations", {"history": {"item_ids": ["x" * 256] * 40_000}, "k": 1})
    assert huge.code in {413, 429}
    assert huge.json["code"] == 8


# Beside JSON


def test_the_callers_request_id_is_in_the_reply_and_in_the_log(
    http: HttpClient, shared_stack: LocalStack, history: list[str]
) -> None:
    answer = http(
        "POST", "/v1/recommendations", {"history": {"item_ids": history}, "k": 1}, x_request_id="from-a-page.1"
    )
    assert answer.headers["x-request-id"] == "from-a-page.1"
    assert '"request_id": "from-a-page.1"' in shared_stack.orchestrators[0].log.read_text()


def test_grpc_passes_on_the_same_port(edge: LocalEdge, stack: LocalStack, history: list[str]) -> None:
    """Lists, refusals with details, health and methods that are not there."""
    with Client(f"127.0.0.1:{edge.port}") as client, Client(stack.address) as direct:
        assert ids(client.recommend(history, k=5)) == ids(direct.recommend(history, k=5))
        assert len(client.batch([request_of(history), request_of(history)])) == 2
        with refused(grpc.StatusCode.INVALID_ARGUMENT, "k"):
            client.recommend(history, k=0)
        assert check_health(client.channel, RECOMMENDATION) == SERVING
        nothing: Any = client.channel.unary_unary(f"/{RECOMMENDATION}/Nothing")
        with pytest.raises(grpc.RpcError) as caught:
            nothing(b"", timeout=LIVENESS_SECONDS)
        assert caught.value.code() is grpc.StatusCode.UNIMPLEMENTED


def preflight(http: HttpClient, origin: str) -> Answer:
    asked = {"access_control_request_method": "POST", "access_control_request_headers": "authorization,content-type"}
    return http("OPTIONS", "/v1/recommendations", None, origin=origin, **asked)


@pytest.mark.parametrize("origin", ["http://localhost:3000", "https://127.0.0.1", "http://127.0.0.1:8000"])
def test_pages_of_this_machine_may_call(http: HttpClient, origin: str) -> None:
    answer = preflight(http, origin)
    assert (answer.code, answer.headers["access-control-allow-origin"]) == (200, origin)
    assert {"authorization", "content-type"} <= set(answer.headers["access-control-allow-headers"].split(", "))
    assert "access-control-allow-credentials" not in answer.headers
    error = http("POST", "/v1/recommendations", {"k": 0}, origin=origin)
    assert (error.code, error.headers["access-control-allow-origin"]) == (400, origin)


@pytest.mark.parametrize("origin", ["https://shop.example", "http://localhost.example", "http://127.0.0.1.example:80"])
def test_other_pages_may_not(http: HttpClient, origin: str) -> None:
    assert "access-control-allow-origin" not in preflight(http, origin).headers
    assert "access-control-allow-origin" not in http("GET", "/v1/info", origin=origin).headers
