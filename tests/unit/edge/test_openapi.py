"""The OpenAPI document of the contract: valid, and true to the descriptors that Envoy reads."""

from __future__ import annotations

import json
from typing import Any

from google.api import annotations_pb2
from google.protobuf.descriptor_pb2 import FileDescriptorSet
from openapi_spec_validator import OpenAPIV31SpecValidator

from atspeed.edge.configuration import CONTRACT, OPENAPI

DOCUMENT: dict[str, Any] = json.loads(OPENAPI.read_text(encoding="utf-8"))
FILES = FileDescriptorSet.FromString(CONTRACT.read_bytes())


def test_the_document_is_valid() -> None:
    assert list(OpenAPIV31SpecValidator(DOCUMENT).iter_errors()) == []


def test_its_paths_are_those_of_the_contract() -> None:
    expected = set()
    for file in FILES.file:
        for method in (method for service in file.service for method in service.method):
            rule = method.options.Extensions[annotations_pb2.http]
            verb = str(rule.WhichOneof("pattern"))
            expected.add((verb, getattr(rule, verb), method.name))
    described = {
        (verb, path, operation["operationId"])
        for path, verbs in DOCUMENT["paths"].items()
        for verb, operation in verbs.items()
        if path.startswith("/v1/")
    }
    assert described == expected
    assert len(expected) == 8


def test_the_descriptors_hold_the_details_of_errors() -> None:
    """Without them Envoy could not print what an error carries."""
    held = {f"{file.package}.{message.name}" for file in FILES.file for message in file.message_type}
    assert {f"google.rpc.{name}" for name in ("Status", "ErrorInfo", "BadRequest", "RetryInfo")} <= held


def test_everything_has_a_description() -> None:
    for name, schema in DOCUMENT["components"]["schemas"].items():
        assert schema.get("description") or "anyOf" in schema, name
    for verbs in DOCUMENT["paths"].values():
        assert all(operation["summary"].endswith(".") for operation in verbs.values())
