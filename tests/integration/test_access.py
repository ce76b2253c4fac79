"""Every method with every kind of token, over real services that speak mutual TLS and ask for tokens."""

from __future__ import annotations

import re
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest
from google.protobuf.descriptor import MethodDescriptor
from google.rpc import error_details_pb2, status_pb2
from grpc_health.v1 import health_pb2
from grpc_reflection.v1alpha import reflection_pb2

from atspeed.engine.bundle.catalogue import Catalogue
from atspeed.local.certificates import LocalCertificates
from atspeed.local.redis_server import LocalRedis
from atspeed.local.stack import LocalStack
from atspeed.rollout.release_track import TRACK_HEADER
from atspeed.rpc.grpc_status import STATUS_HEADER
from atspeed.security.scopes import METHOD_SCOPES
from atspeed.v1 import recommendation_pb2 as pb
from atspeed.v1 import recommendation_pb2_grpc as pb_grpc
from tests.bundles import random_history
from tests.conftest import mended
from tests.issuer import AUDIENCE, ISSUER, TokenIssuer
from tests.observed import lines_of, scrape
from tests.secured import bearer, channel, outcome, path_of, rpcs, secured_stack, write_tokens
from tests.serving import LIVENESS_SECONDS

# By hand: who reads this table sees who may do what.
NEEDED = {
    "Recommend": "read",
    "RecommendBatch": "read",
    "Explain": "explain",
    "GetHistory": "read",
    "GetServiceInfo": "read",
    "RecordEvents": "write",
    "RecordEventsBatch": "write",
    "ForgetUser": "write",
    "GetModelInfo": "service",
    "Plan": "service",
    "Evaluate": "service",
}
SCOPES = ("read", "write", "explain", "admin", "service")
TOKENS = {scope: f'scopes = ["{scope}"]' for scope in SCOPES} | {
    "acme": 'scopes = ["read", "write"]\ntenants = ["acme"]',
    "operator": 'scopes = ["read", "admin"]',
    "nameless": 'scopes = ["read", "write"]\ntenants = [""]',
    "read-explains": 'scopes = ["explain"]',
    "acme-explains": 'scopes = ["explain"]\ntenants = ["acme"]',
    "nameless-explains": 'scopes = ["explain"]\ntenants = [""]',
    "expired": 'scopes = ["read", "write", "admin", "service"]\nexpires = 2020-01-01T00:00:00Z',
    "limited": 'scopes = ["read", "write"]\nrequests_per_second = 0.001\nburst = 3',
    "used-up": 'scopes = ["read"]\nrequests_per_second = 0.001\nburst = 1',
    "limited-explains": 'scopes = ["explain"]\nrequests_per_second = 0.001\nburst = 5',
    "removed": 'scopes = ["read", "write", "admin", "service"]',
}
UNAUTHENTICATED, DENIED = grpc.StatusCode.UNAUTHENTICATED, grpc.StatusCode.PERMISSION_DENIED
MODELS = {"draft": "DraftService", "target": "TargetService"}
EXPLAIN = next(method for method in rpcs() if method.name == "Explain")
RECOMMENDATION = [method for method in rpcs() if method.containing_service.name == "RecommendationService"]


@pytest.fixture(scope="module")
def certificates(tmp_path_factory: pytest.TempPathFactory) -> LocalCertificates:
    return LocalCertificates(tmp_path_factory.mktemp("certificates"))


@pytest.fixture(scope="module")
def issuer() -> TokenIssuer:
    return TokenIssuer()


def jwt_flags(keys: Path) -> dict[str, object]:
    return {"jwt-keys": keys, "jwt-issuer": ISSUER, "jwt-audience": AUDIENCE, "metrics-port": 0}


@pytest.fixture(scope="module")
def secured(
    bundle: Path,
    certificates: LocalCertificates,
    issuer: TokenIssuer,
    redis_server: LocalRedis,
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[LocalStack]:
    url = mended(redis_server)
    folder = tmp_path_factory.mktemp("secured")
    write_tokens(folder / "public.toml", TOKENS)
    (folder / "keys.json").write_text(issuer.key_set())
    with secured_stack(
        bundle, certificates, folder, redis_url=url, flags_of_orchestrator=jwt_flags(folder / "keys.json")
    ) as stack:
        yield stack


@pytest.fixture(scope="module")
def channels(secured: LocalStack, certificates: LocalCertificates) -> Iterator[dict[str, grpc.Channel]]:
    """By the service's name in the contract."""
    addresses = {
        "RecommendationService": secured.address,
        "DraftService": secured.drafts[0].address,
        "TargetService": secured.targets[0].address,
    }
    opened = {name: channel(address, certificates.client()) for name, address in addresses.items()}
    yield opened
    for one in opened.values():
        one.close()


def ended(channels: dict[str, grpc.Channel], method: MethodDescriptor, token: str | None) -> grpc.StatusCode:
    """With an empty message, which no method but GetServiceInfo and GetModelInfo likes."""
    return outcome(channels[method.containing_service.name], method, metadata=bearer(token))


def test_every_rpc_stands_in_the_table_of_scopes() -> None:
    """A new one must be entered, in `atspeed/security/scopes.py` and above."""
    ours = {path: scope for path, scope in METHOD_SCOPES.items() if path.startswith("/atspeed.")}
    assert ours == {path_of(method): NEEDED[method.name] for method in rpcs()}


@pytest.mark.parametrize("token", [None, "made-up", "expired"])
def test_without_a_valid_token_nothing_is_allowed(channels: dict[str, grpc.Channel], token: str | None) -> None:
    for method in rpcs():
        assert ended(channels, method, token) is UNAUTHENTICATED, method.full_name


@pytest.mark.parametrize("token", SCOPES)
@pytest.mark.parametrize("method", RECOMMENDATION, ids=lambda method: method.name)
def test_a_token_allows_what_its_scope_says(
    channels: dict[str, grpc.Channel], method: MethodDescriptor, token: str
) -> None:
    code = ended(channels, method, token)
    if NEEDED[method.name] == token:
        assert code in {grpc.StatusCode.OK, grpc.StatusCode.INVALID_ARGUMENT}
    else:
        assert code is DENIED


@pytest.mark.parametrize("method", [m for m in rpcs() if m not in RECOMMENDATION], ids=lambda m: m.full_name)
def test_models_are_for_services_alone(channels: dict[str, grpc.Channel], method: MethodDescriptor) -> None:
    assert ended(channels, method, "read") is DENIED
    assert ended(channels, method, "orchestrator") not in {DENIED, UNAUTHENTICATED}


@pytest.mark.parametrize("header", ["hush-read", "Basic hush-read", "Bearer", "Bearer ", "Bearer hush-read x", ""])
def test_a_header_that_is_not_a_bearer_token_is_none(channels: dict[str, grpc.Channel], header: str) -> None:
    method = next(method for method in RECOMMENDATION if method.name == "GetServiceInfo")
    on = channels["RecommendationService"]
    assert outcome(on, method, metadata=(("authorization", header),)) is UNAUTHENTICATED
    assert outcome(on, method, metadata=(*bearer("read"), *bearer("write"))) is UNAUTHENTICATED
    assert outcome(on, method, metadata=(("authorization", "bearer hush-read"),)) is grpc.StatusCode.OK


def test_a_removed_token_is_refused_from_the_next_call_on(
    channels: dict[str, grpc.Channel], secured: LocalStack
) -> None:
    method = next(method for method in RECOMMENDATION if method.name == "GetServiceInfo")
    assert ended(channels, method, "removed") is grpc.StatusCode.OK
    tokens = secured.log_folder / "public.toml"
    write_tokens(tokens, {name: rest for name, rest in TOKENS.items() if name != "removed"})
    assert ended(channels, method, "removed") is UNAUTHENTICATED
    tokens.write_text("[not toml")
    assert ended(channels, method, "read") is grpc.StatusCode.OK
    write_tokens(tokens, TOKENS)
    assert ended(channels, method, "removed") is grpc.StatusCode.OK


@pytest.mark.parametrize(
    ("token", "tenant", "allowed"),
    [
        ("read", "acme", True),
        ("acme", "acme", True),
        ("acme", "", False),
        ("acme", "other", False),
        ("nameless", "", True),
        ("nameless", "acme", False),
    ],
)
def test_a_token_may_name_its_own_tenants_only(
    channels: dict[str, grpc.Channel], catalogue: Catalogue, token: str, tenant: str, allowed: bool
) -> None:
    """In each message that names a tenant, also within a batch."""
    good = pb.RecommendRequest(history=pb.History(item_ids=random_history(catalogue, 3, 1)), k=1, tenant=tenant)
    own = pb.RecommendRequest(history=good.history, k=1, tenant="acme" if token == "acme" else "")
    user = {"user_id": "u", "tenant": tenant}
    events, own_events = (
        pb.RecordEventsRequest(user_id="u", tenant=one.tenant, events=[pb.Event(item_id="i")]) for one in (good, own)
    )
    messages = {
        "Recommend": good,
        "RecommendBatch": pb.RecommendBatchRequest(requests=[own, good]),
        "GetHistory": pb.GetHistoryRequest(**user),
        "RecordEvents": events,
        "RecordEventsBatch": pb.RecordEventsBatchRequest(requests=[own_events, events]),
        "ForgetUser": pb.ForgetUserRequest(**user),
    }
    explained = pb.ExplainRequest(request=good).SerializeToString()
    code = outcome(channels["RecommendationService"], EXPLAIN, explained, bearer(f"{token}-explains"))
    assert code is (grpc.StatusCode.OK if allowed else DENIED)
    for method in RECOMMENDATION:
        if method.name in messages and (token != "read" or NEEDED[method.name] == "read"):
            code = outcome(
                channels["RecommendationService"], method, messages[method.name].SerializeToString(), bearer(token)
            )
            assert code is (grpc.StatusCode.OK if allowed else DENIED), method.name


@pytest.mark.parametrize(
    ("token", "track", "code"),
    [
        ("read", "stable", DENIED),
        ("admin", "stable", DENIED),
        ("operator", "stable", grpc.StatusCode.OK),
        ("operator", "canary", grpc.StatusCode.FAILED_PRECONDITION),
        ("operator", "nonsense", grpc.StatusCode.INVALID_ARGUMENT),
    ],
)
def test_who_chooses_a_track_needs_two_scopes(
    channels: dict[str, grpc.Channel], catalogue: Catalogue, token: str, track: str, code: grpc.StatusCode
) -> None:
    """There is no canary here."""
    method = next(method for method in RECOMMENDATION if method.name == "Recommend")
    request = pb.RecommendRequest(history=pb.History(item_ids=random_history(catalogue, 3, 1)), k=1)
    metadata = (*bearer(token), (TRACK_HEADER, track))
    on = channels["RecommendationService"]
    assert outcome(on, method, request.SerializeToString(), metadata) is code


def test_health_is_open_and_reflection_is_not(channels: dict[str, grpc.Channel]) -> None:
    on = channels["RecommendationService"]
    check: Any = on.unary_unary(
        "/grpc.health.v1.Health/Check", response_deserializer=health_pb2.HealthCheckResponse.FromString
    )
    assert check(b"", timeout=LIVENESS_SECONDS).status == health_pb2.HealthCheckResponse.SERVING
    asked = reflection_pb2.ServerReflectionRequest(list_services="").SerializeToString()
    reflect: Any = on.stream_stream("/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo")
    assert list(reflect(iter([asked]), metadata=bearer("read"), timeout=LIVENESS_SECONDS))
    for token, code in ((None, UNAUTHENTICATED), ("write", DENIED)):
        with pytest.raises(grpc.RpcError) as refusal:
            list(reflect(iter([asked]), metadata=bearer(token), timeout=LIVENESS_SECONDS))
        assert refusal.value.code() is code


def test_a_list_comes_through_all_services(channels: dict[str, grpc.Channel], catalogue: Catalogue) -> None:
    """The orchestrator shows target and draft its certificate and its token."""
    recommend: Any = channels["RecommendationService"].unary_unary(
        "/atspeed.v1.RecommendationService/Recommend",
        request_serializer=pb.RecommendRequest.SerializeToString,
        response_deserializer=pb.RecommendResponse.FromString,
    )
    request = pb.RecommendRequest(history=pb.History(item_ids=random_history(catalogue, 5, 2)), k=3)
    reply = recommend(request, timeout=LIVENESS_SECONDS, metadata=bearer("read"))
    assert len(reply.items) == 3
    assert not reply.degraded


def test_the_log_names_callers_and_no_tokens(secured: LocalStack, channels: dict[str, grpc.Channel]) -> None:
    for method in RECOMMENDATION:
        ended(channels, method, "read")
    logs = "".join(path.read_text() for path in secured.log_folder.glob("*.log"))
    assert '"caller": "read"' in logs
    assert "hush-" not in logs


@pytest.mark.parametrize(
    ("token", "name", "code"),
    [
        (None, "GetHistory", UNAUTHENTICATED),
        ("made-up", "GetHistory", UNAUTHENTICATED),
        ("write", "GetHistory", DENIED),
        ("read", "GetHistory", grpc.StatusCode.INVALID_ARGUMENT),
        ("used-up", "GetServiceInfo", grpc.StatusCode.RESOURCE_EXHAUSTED),
        ("read", "GetServiceInfo", grpc.StatusCode.OK),
    ],
)
def test_the_log_says_from_where_a_refused_call_came(
    secured: LocalStack, channels: dict[str, grpc.Channel], token: str | None, name: str, code: grpc.StatusCode
) -> None:
    """A header that everyone can send is ignored."""
    (method,) = (method for method in RECOMMENDATION if method.name == name)
    request_id = f"{token}-{name}"
    metadata = (*bearer(token), ("x-request-id", request_id), ("x-forwarded-for", "203.0.113.7"))
    on = channels["RecommendationService"]
    if token == "used-up":
        outcome(on, method, metadata=bearer(token))
    assert outcome(on, method, metadata=metadata) is code
    (line,) = lines_of(secured.log_folder / "orchestrator-0.log", request_id)
    assert line["code"] == code.name
    assert line.get("caller") == (None if code is UNAUTHENTICATED else token)
    if code is grpc.StatusCode.OK:
        assert "peer" not in line
    else:
        assert re.fullmatch(r"127\.0\.0\.1:[0-9]+", line["peer"])


def with_token(token: str) -> tuple[tuple[str, str | bytes], ...]:
    return (("authorization", f"Bearer {token}"),)


def rpc(name: str) -> MethodDescriptor:
    (found,) = (method for method in RECOMMENDATION if method.name == name)
    return found


@pytest.mark.parametrize(
    ("claims", "code"),
    [
        ({}, grpc.StatusCode.OK),
        ({"exp": 1_700_000_000}, UNAUTHENTICATED),
        ({"aud": "another"}, UNAUTHENTICATED),
        ({"iss": "https://another.example"}, UNAUTHENTICATED),
        ({"scope": "write"}, DENIED),
        ({"tenants": ["acme"]}, DENIED),
    ],
    ids=str,
)
def test_tokens_of_an_issuer_are_valid_beside_those_of_the_file(
    channels: dict[str, grpc.Channel], issuer: TokenIssuer, claims: dict[str, Any], code: grpc.StatusCode
) -> None:
    message = pb.GetHistoryRequest(user_id="nobody").SerializeToString()
    on = channels["RecommendationService"]
    assert outcome(on, rpc("GetHistory"), message, with_token(issuer.token(**claims))) is code
    assert outcome(on, rpc("GetHistory"), message, bearer("read")) is grpc.StatusCode.OK


def test_a_token_of_another_key_is_none(channels: dict[str, grpc.Channel]) -> None:
    on = channels["RecommendationService"]
    assert outcome(on, rpc("GetServiceInfo"), metadata=with_token(TokenIssuer().token())) is UNAUTHENTICATED


def test_a_caller_beyond_its_quota_is_told_when_to_come_again_and_harms_no_other(
    channels: dict[str, grpc.Channel], secured: LocalStack
) -> None:
    stub = pb_grpc.RecommendationServiceStub(channels["RecommendationService"])
    limited: dict[str, Any] = {"metadata": bearer("limited"), "timeout": LIVENESS_SECONDS}
    with pytest.raises(grpc.RpcError) as at_once:
        list(stub.RecommendBatch(pb.RecommendBatchRequest(requests=[pb.RecommendRequest(user_id="a")] * 4), **limited))
    for _ in range(3):
        stub.GetServiceInfo(pb.GetServiceInfoRequest(), **limited)
    with pytest.raises(grpc.RpcError) as used_up:
        stub.GetServiceInfo(pb.GetServiceInfoRequest(), **limited)
    for refusal in (at_once.value, used_up.value):
        assert refusal.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        assert details(refusal)["ErrorInfo"].reason == "QUOTA_EXCEEDED"
    assert "4 requests in one call are more than the quota allows at once (3)" in (at_once.value.details() or "")
    assert "RetryInfo" not in details(at_once.value)
    assert 900 < details(used_up.value)["RetryInfo"].retry_delay.seconds <= 1000
    assert (
        outcome(channels["RecommendationService"], rpc("GetServiceInfo"), metadata=bearer("read")) is grpc.StatusCode.OK
    )


def test_an_explanation_costs_what_it_searches(channels: dict[str, grpc.Channel], catalogue: Catalogue) -> None:
    """One list without items; with items, their paths and a wider list too."""
    history = pb.History(item_ids=random_history(catalogue, 3, 1))
    asked = pb.ExplainRequest(request=pb.RecommendRequest(history=history, k=1))
    for_items = pb.ExplainRequest(request=asked.request, item_ids=[catalogue.id_of(0)])
    on, token = channels["RecommendationService"], bearer("limited-explains")
    codes = [outcome(on, EXPLAIN, one.SerializeToString(), token) for one in (asked, for_items, for_items, asked)]
    assert codes == [grpc.StatusCode.OK, grpc.StatusCode.OK, grpc.StatusCode.RESOURCE_EXHAUSTED, grpc.StatusCode.OK]


def details(error: grpc.RpcError) -> dict[str, Any]:
    """The details of an error's status, by the names of their types."""
    trailers: Any = error.trailing_metadata()
    trailer = dict(trailers)[STATUS_HEADER]
    kinds = {kind.__name__: kind for kind in (error_details_pb2.ErrorInfo, error_details_pb2.RetryInfo)}
    found = {}
    for packed in status_pb2.Status.FromString(trailer).details:
        name = packed.TypeName().rpartition(".")[2]
        found[name] = kinds[name]()
        packed.Unpack(found[name])
    return found


def test_calls_of_callers_and_ends_of_certificates_are_metrics(
    channels: dict[str, grpc.Channel], secured: LocalStack
) -> None:
    outcome(channels["RecommendationService"], rpc("GetServiceInfo"), metadata=bearer("operator"))
    metrics = scrape(secured.orchestrators[0])
    assert metrics.value("atspeed_caller_calls_total", caller="operator", method="GetServiceInfo") >= 1
    for setting in ("tls_certificate", "tls_client_ca"):
        assert metrics.value("atspeed_certificate_expiry_timestamp_seconds", setting=setting) > time.time()
