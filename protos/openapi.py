"""The OpenAPI document of the contract's HTTP paths, from descriptors with comments.

It describes JSON as Envoy writes it (`print_options` of atspeed/edge/envoy.yaml): field names of the contract, enums by name,
64-bit integers as text. No maintained generator of Python, npm or Debian reads `google.api.http`.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from typing import Any

from google.api import annotations_pb2
from google.protobuf.descriptor_pb2 import (
    DescriptorProto,
    EnumDescriptorProto,
    FieldDescriptorProto,
    FileDescriptorProto,
    FileDescriptorSet,
    MethodDescriptorProto,
)

Schema = dict[str, Any]

SERVICE = "RecommendationService"
STATUS = "google.rpc.Status"
DETAILS = ("google.rpc.ErrorInfo", "google.rpc.BadRequest", "google.rpc.RetryInfo")
ERRORS = {
    "400": "The request breaks rules of the contract or limits of the service.",
    "401": "The call has no token, or none that is valid.",
    "403": "The token does not allow this.",
    "404": "Nothing is stored for the user, or there is no such path.",
    "429": "The service is busy. Another try may succeed after the time of Retry-After.",
    "501": "The service runs without Redis and keeps no histories.",
    "503": "A service behind this one does not answer.",
    "504": "The time of the call is over.",
}
HEADERS = {
    "grpc-timeout": ("Time for the call, such as 500m (milliseconds) or 2S (seconds).", "^[0-9]{1,8}[HMSmun]$"),
    "x-request-id": ("Id of the call in the services' logs. The reply has it, or a new one.", None),
    "x-atspeed-track": ("Release track, canary or stable; needs a token with the scope admin.", None),
    "x-atspeed-priority": ("Priority of the requests: interactive or batch.", None),
}
_F = FieldDescriptorProto
_WELL_KNOWN: dict[str, Schema] = {
    "google.protobuf.Timestamp": {"type": "string", "format": "date-time"},
    "google.protobuf.Duration": {"type": "string", "description": "Seconds, such as 0.5s."},
    "google.protobuf.Any": {"$ref": "#/components/schemas/ErrorDetail"},
}
_SCALARS: dict[int, Schema] = {
    _F.TYPE_DOUBLE: {"type": "number", "format": "double"},
    _F.TYPE_FLOAT: {"type": "number", "format": "float"},
    _F.TYPE_INT32: {"type": "integer", "format": "int32"},
    _F.TYPE_INT64: {"type": "string", "format": "int64"},
    _F.TYPE_BOOL: {"type": "boolean"},
    _F.TYPE_STRING: {"type": "string"},
    _F.TYPE_BYTES: {"type": "string", "contentEncoding": "base64"},
}
_PLACES = {
    "messages": 4,
    "enums": 5,
    "services": 6,
}  # field numbers of FileDescriptorProto, as comments' paths have them


class Contract:
    """Messages, enums and methods of a set of files by name, with their comments."""

    def __init__(self, files: FileDescriptorSet) -> None:
        self.messages: dict[str, DescriptorProto] = {}
        self.enums: dict[str, EnumDescriptorProto] = {}
        self.methods: dict[str, MethodDescriptorProto] = {}
        self.comments: dict[str, str] = {}
        for file in files.file:
            self._add(file)

    def _add(self, file: FileDescriptorProto) -> None:
        said = {tuple(place.path): " ".join(place.leading_comments.split()) for place in file.source_code_info.location}

        def note(name: str, *path: int) -> None:
            self.comments[name] = said.get(path, "")

        def message(proto: DescriptorProto, name: str, *path: int) -> None:
            self.messages[name] = proto
            note(name, *path)
            for place, field in enumerate(proto.field):
                note(f"{name}.{field.name}", *path, 2, place)
            for place, nested in enumerate(proto.nested_type):
                message(nested, f"{name}.{nested.name}", *path, 3, place)

        for place, proto in enumerate(file.message_type):
            message(proto, f"{file.package}.{proto.name}", _PLACES["messages"], place)
        for place, enum in enumerate(file.enum_type):
            self.enums[name := f"{file.package}.{enum.name}"] = enum
            note(name, _PLACES["enums"], place)
            for number, value in enumerate(enum.value):
                note(f"{name}.{value.name}", _PLACES["enums"], place, 2, number)
        for place, service in enumerate(file.service):
            for number, method in enumerate(service.method):
                self.methods[name := f"{service.name}.{method.name}"] = method
                note(name, _PLACES["services"], place, 2, number)

    def reachable(self, names: Iterable[str]) -> set[str]:
        """Return the messages and enums that these messages hold, themselves included."""
        found: set[str] = set()
        left = list(names)
        while left:
            name = left.pop()
            if name in found or name in _WELL_KNOWN:
                continue
            found.add(name)
            left += (
                [field.type_name[1:] for field in self.messages[name].field if field.type_name]
                if (name in self.messages)
                else []
            )
        return found


def document(files: FileDescriptorSet) -> Schema:
    """Return the OpenAPI document of `SERVICE`."""
    contract = Contract(files)
    methods = {name: method for name, method in contract.methods.items() if name.startswith(f"{SERVICE}.")}
    return {
        "openapi": "3.1.0",
        "info": {
            "title": "AtSpeed Serving",
            "version": "v1",
            "summary": "Top-K recommendations from a generative recommender.",
            "description": "Unknown fields of a body are ignored, and unknown query parameters are refused. "
            "64-bit integers are text. Replies have every field, except `optional` ones and messages that are not set.",
            "license": {"name": "Apache-2.0", "identifier": "Apache-2.0"},
        },
        "servers": [{"url": "/"}],
        "security": [{}, {"bearer": []}],
        "tags": [{"name": SERVICE}, {"name": "Envoy"}],
        "paths": {**_paths(contract, methods), **_own_paths()},
        "components": {
            "schemas": _schemas(contract, methods.values()),
            "parameters": {name: _header(name) for name in HEADERS},
            "responses": {f"Error{code}": _error(code) for code in ERRORS},
            "securitySchemes": {"bearer": {"type": "http", "scheme": "bearer"}},
        },
    }


def route(method: MethodDescriptorProto) -> tuple[str, str, bool]:
    """Return a method's verb, its path and whether the message is its body."""
    rule = method.options.Extensions[annotations_pb2.http]
    verb = rule.WhichOneof("pattern")
    if verb is None or rule.body not in {"", "*"} or rule.additional_bindings:
        raise SystemExit(
            f"protos/openapi.py: {method.name} has no google.api.http option, or one that it cannot describe"
        )
    return verb, getattr(rule, verb), rule.body == "*"


def _paths(contract: Contract, methods: dict[str, MethodDescriptorProto]) -> Schema:
    paths: Schema = {}
    for name, method in methods.items():
        verb, path, _ = route(method)
        paths.setdefault(path, {})[verb] = _operation(contract, name, method)
    return paths


def _operation(contract: Contract, name: str, method: MethodDescriptorProto) -> Schema:
    _, path, in_body = route(method)
    request, reply = method.input_type[1:], _ref(method.output_type[1:])
    says = contract.comments[name]
    operation: Schema = {
        "operationId": method.name,
        "tags": [SERVICE],
        "summary": re.split(r"(?<=\.) ", says)[0],
        "description": says + (" The reply is one JSON object per line." if method.server_streaming else ""),
        "parameters": [*_parameters(contract, request, path, in_body), *map(_header_ref, HEADERS)],
    }
    if in_body:
        body = {"$ref": f"#/components/schemas/{_body(request)}"} if _bound(path) else _ref(request)
        operation["requestBody"] = {"required": True, "content": _json(body)}
    answers = {code: {"$ref": f"#/components/responses/Error{code}"} for code in ERRORS}
    content = {"description": "The reply, or one of many on a line." if method.server_streaming else "The reply."}
    operation["responses"] = {"200": content | {"headers": _id_header(), "content": _json(reply)}, **answers}
    return operation


def _parameters(contract: Contract, request: str, path: str, in_body: bool) -> Iterator[Schema]:
    """Yield a parameter for each field in the path and, without a body, for the others."""
    bound = _bound(path)
    for field in contract.messages[request].field:
        if field.name in bound or not in_body:
            place = {"in": "path", "required": True} if field.name in bound else {"in": "query"}
            says = contract.comments[f"{request}.{field.name}"]
            yield {"name": field.name, **place, "description": says, "schema": _type(contract, field)}


def _body(request: str) -> str:
    """Return the name of the schema of a request without the fields that its path has."""
    return f"{_short(request)}Body"


def _bound(path: str) -> set[str]:
    return set(re.findall(r"\{(\w+)\}", path))


def _schemas(contract: Contract, methods: Iterable[MethodDescriptorProto]) -> Schema:
    methods = list(methods)
    asked = contract.reachable(method.input_type[1:] for method in methods)
    answered = contract.reachable([*(method.output_type[1:] for method in methods), STATUS, *DETAILS])
    routes = {method.input_type[1:]: route(method) for method in methods}
    parted = {name: _bound(path) for name, (_, path, in_body) in routes.items() if in_body and _bound(path)}
    # Messages that are never a body or a part of one as a whole: all of their fields are parameters, or those of the path are.
    nested = {field.type_name[1:] for name in asked - contract.enums.keys() for field in contract.messages[name].field}
    never = {name for name, (_, _, in_body) in routes.items() if not in_body or name in parted} - nested
    schemas = {
        _short(name): _enum(contract, name)
        if name in contract.enums
        else _message(contract, name, set(), whole=name not in asked)
        for name in sorted((asked | answered) - never)
        if name in contract.enums or not contract.messages[name].options.map_entry
    }
    schemas |= {_body(name): _message(contract, name, bound, whole=False) for name, bound in parted.items()}
    for name in DETAILS:
        kind = {"type": "string", "const": f"type.googleapis.com/{name}"}
        schemas[_short(name)]["properties"] = {"@type": kind, **schemas[_short(name)]["properties"]}
        schemas[_short(name)]["required"] = ["@type"]
    return {**schemas, "ErrorDetail": {"anyOf": [_ref(name) for name in DETAILS]}}


def _message(contract: Contract, name: str, without: set[str], *, whole: bool) -> Schema:
    """Describe a message. whole: replies alone have it, with every field that is not `optional`."""
    message = contract.messages[name]
    fields = [field for field in message.field if field.name not in without]
    properties = {}
    for field in fields:
        says = contract.comments[f"{name}.{field.name}"]
        if field.HasField("oneof_index") and not field.proto3_optional:
            says = f"{says} At most one of `{message.oneof_decl[field.oneof_index].name}` is set."
        properties[field.name] = _type(contract, field) | ({"description": says} if says else {})
    schema: Schema = {"type": "object", "description": contract.comments[name], "properties": properties}
    if whole and (always := [field.name for field in fields if _always(field)]):
        schema["required"] = always
    return schema


def _always(field: FieldDescriptorProto) -> bool:
    """True if a reply always has the field: lists and maps, and scalars that need no presence."""
    if field.label == _F.LABEL_REPEATED:
        return True
    return field.type != _F.TYPE_MESSAGE and not field.HasField("oneof_index")


def _type(contract: Contract, field: FieldDescriptorProto) -> Schema:
    name = field.type_name[1:]
    held = contract.messages.get(name)
    if held is not None and held.options.map_entry:
        return {"type": "object", "additionalProperties": _type(contract, held.field[1])}
    one = dict(_SCALARS[field.type]) if field.type in _SCALARS else dict(_WELL_KNOWN.get(name) or _ref(name))
    return {"type": "array", "items": one} if field.label == _F.LABEL_REPEATED else one


def _enum(contract: Contract, name: str) -> Schema:
    values = [value.name for value in contract.enums[name].value]
    lines = [contract.comments[name], *(f"- `{value}`: {contract.comments[f'{name}.{value}']}" for value in values)]
    return {"type": "string", "enum": values, "description": "\n".join(lines)}


def _own_paths() -> Schema:
    """Return the paths that Envoy answers by itself."""
    health = {
        "operationId": "Health",
        "tags": ["Envoy"],
        "summary": "Health of the service, as its grpc.health.v1 says.",
        "responses": {
            "200": {"description": "An orchestrator serves."},
            "503": {"description": "None serves.", "content": _json(_ref(STATUS))},
        },
    }
    shown = {
        "operationId": "OpenApi",
        "tags": ["Envoy"],
        "summary": "This document.",
        "responses": {"200": {"description": "This document.", "content": _json({"type": "object"})}},
    }
    return {"/healthz": {"get": health}, "/openapi.json": {"get": shown}}


def _error(code: str) -> Schema:
    retry = {"Retry-After": {"description": "Seconds until another try may succeed.", "schema": {"type": "integer"}}}
    headers = _id_header() | (retry if code == "429" else {})
    return {"description": ERRORS[code], "headers": headers, "content": _json(_ref(STATUS))}


def _id_header() -> Schema:
    return {"x-request-id": {"description": "Id of the call in the services' logs.", "schema": {"type": "string"}}}


def _header(name: str) -> Schema:
    says, pattern = HEADERS[name]
    schema = {"type": "string"} | ({"pattern": pattern} if pattern else {})
    return {"name": name, "in": "header", "description": says, "schema": schema}


def _header_ref(name: str) -> Schema:
    return {"$ref": f"#/components/parameters/{name}"}


def _json(schema: Schema) -> Schema:
    return {"application/json": {"schema": schema}}


def _ref(name: str) -> Schema:
    return {"$ref": f"#/components/schemas/{_short(name)}"}


def _short(name: str) -> str:
    """Return the name without its package: atspeed.v1.Event and google.rpc.Status, both without a dot."""
    return re.sub(r"^(?:[a-z0-9]+\.)+", "", name)
