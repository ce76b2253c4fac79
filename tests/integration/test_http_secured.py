"""HTTP with TLS on both sides of a real Envoy, and bearer tokens that it passes on."""

from __future__ import annotations

import ssl
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest

from atspeed.local.certificates import LocalCertificates
from atspeed.local.edge import LocalEdge
from tests.edge import HttpClient, needs_envoy
from tests.observed import lines_of
from tests.secured import bearer, secured_stack, write_tokens
from tests.serving import LIVENESS_SECONDS, RECOMMENDATION

pytestmark = needs_envoy

TOKENS = {"reader": 'scopes = ["read"]', "acme": 'scopes = ["read"]\ntenants = ["acme"]'}


@pytest.fixture(scope="module")
def certificates(tmp_path_factory: pytest.TempPathFactory) -> LocalCertificates:
    return LocalCertificates(tmp_path_factory.mktemp("certificates"))


@pytest.fixture(scope="module")
def edge(
    bundle: Path, certificates: LocalCertificates, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[LocalEdge]:
    """Before an orchestrator that wants a certificate of its callers, and a token."""
    folder = tmp_path_factory.mktemp("secured")
    write_tokens(folder / "public.toml", TOKENS)
    with (
        secured_stack(bundle, certificates, folder, flags_of_orchestrator={"trusted-proxies": "127.0.0.1"}) as stack,
        LocalEdge([stack.address], folder / "edge.log", tls=certificates.files("edge")) as edge,
    ):
        yield edge


@pytest.fixture(scope="module")
def trust(certificates: LocalCertificates) -> ssl.SSLContext:
    return ssl.create_default_context(cafile=certificates.ca)


@pytest.fixture
def http(edge: LocalEdge, trust: ssl.SSLContext) -> HttpClient:
    return HttpClient(f"127.0.0.1:{edge.port}", trust=trust)


def header(token: str) -> str:
    ((_, value),) = bearer(token)
    return str(value)


def test_a_list_for_a_token(http: HttpClient, history: list[str]) -> None:
    body = {"history": {"item_ids": history}, "k": 3}
    answer = http("POST", "/v1/recommendations", body, authorization=header("reader"))
    assert (answer.code, len(answer.json["items"])) == (200, 3)


@pytest.mark.parametrize("headers", [{}, {"authorization": "Bearer made-up"}, {"authorization": "hush-reader"}])
def test_no_token_or_another_one_is_401(http: HttpClient, headers: dict[str, str]) -> None:
    answer = http("GET", "/v1/info", None, **headers)
    assert (answer.code, answer.json["details"][0]["reason"]) == (401, "UNAUTHENTICATED")


def test_what_a_token_does_not_allow_is_403(http: HttpClient, history: list[str]) -> None:
    """The scope of another method; another tenant, in the path's query and in the body."""
    events = {"events": [{"item_id": history[0]}]}
    writes = http("POST", "/v1/users/alice/events", events, authorization=header("reader"))
    elsewhere = http("GET", "/v1/users/alice/events?tenant=other", None, authorization=header("acme"))
    body = {"history": {"item_ids": history}, "k": 3, "tenant": "other"}
    in_body = http("POST", "/v1/recommendations", body, authorization=header("acme"))
    for answer, reason in ((writes, "PERMISSION_DENIED"), (elsewhere, "TENANT_DENIED"), (in_body, "TENANT_DENIED")):
        assert (answer.code, answer.json["details"][0]["reason"]) == (403, reason)


def test_health_and_the_document_need_no_token(http: HttpClient) -> None:
    assert http("GET", "/healthz").code == 200
    assert http("GET", "/openapi.json").code == 200


def test_plain_text_and_another_authority_get_nothing(edge: LocalEdge, tmp_path: Path) -> None:
    other = ssl.create_default_context(cafile=LocalCertificates(tmp_path).ca)
    with pytest.raises(ssl.SSLCertVerificationError):
        HttpClient(f"127.0.0.1:{edge.port}", trust=other)("GET", "/healthz")
    with pytest.raises(OSError):  # noqa: PT011 - the kind depends on when the connection ends
        HttpClient(f"127.0.0.1:{edge.port}")("GET", "/healthz")


def test_grpc_passes_with_tls_and_a_token(edge: LocalEdge, certificates: LocalCertificates) -> None:
    credentials = grpc.ssl_channel_credentials(certificates.ca.read_bytes())
    with grpc.secure_channel(f"127.0.0.1:{edge.port}", credentials) as channel:
        info: Any = channel.unary_unary(f"/{RECOMMENDATION}/GetServiceInfo")
        assert info(b"", metadata=bearer("reader"), timeout=LIVENESS_SECONDS)
        with pytest.raises(grpc.RpcError) as caught:
            info(b"", timeout=LIVENESS_SECONDS)
        assert caught.value.code() is grpc.StatusCode.UNAUTHENTICATED


def test_logs_name_the_address_that_envoy_saw_and_not_the_one_that_a_client_invents(
    edge: LocalEdge, trust: ssl.SSLContext
) -> None:
    http = HttpClient(f"127.0.0.1:{edge.port}", trust=trust, source="127.0.0.2")
    refused = http("GET", "/v1/info", None, x_forwarded_for="203.0.113.7", x_request_id="forged")
    assert refused.code == 401
    (line,) = lines_of(edge.log.parent / "orchestrator-0.log", "forged")
    assert (line["event"], line["code"], line["peer"]) == ("call", "UNAUTHENTICATED", "127.0.0.2")
    assert line["proxy"].startswith("127.0.0.1:")
