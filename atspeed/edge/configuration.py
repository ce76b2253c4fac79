"""Configuration of Envoy, from one template for all deployments.

`envoy.yaml` beside this file is the template. `contract.pb` holds the contract's descriptors, by which Envoy turns JSON into
messages, and `openapi.json` describes the paths; `make protos` writes both. `make edge` writes the configurations of
`deploy/envoy`, and `atspeed up --http` one for this machine.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from string import Template
from typing import Any

from atspeed.edge.console_routes import console_routes, untranscoded
from atspeed.security.tls import TlsFiles

FOLDER = Path(__file__).parent
"""Where the template and the two files of the contract are."""
TEMPLATE = FOLDER / "envoy.yaml"
CONTRACT = FOLDER / "contract.pb"
OPENAPI = FOLDER / "openapi.json"
SERVER_NAME = "orchestrator"
"""Name that a replica's certificate bears."""

LOCAL_HOSTS = ("localhost", "127.0.0.1", "[::1]")
"""Hosts by which a machine reaches itself."""

_ROUTE_INDENT = " " * 24
_TLS = "type.googleapis.com/envoy.extensions.transport_sockets.tls.v3"


@dataclass(frozen=True)
class Place:
    """Where one Envoy stands.

    Attributes:
        host: address that it listens on.
        port: port that it listens on; 0 for any.
        replicas: HOST:PORT of orchestrators; a host may be a name of many.
        folder: folder of `contract.pb` and `openapi.json`, as Envoy sees it.
        admin_port: port of Envoy's own state, on the loopback address; 0 for any, None without one.
        tls: certificate and key of this Envoy, for both sides, and the CA of the replicas; None without TLS.
        console: folder of the console's files, as Envoy sees it; None without the console.
        shares_port: whether another process may listen on the same port.
        hosts: the host names that are served. A deployment's Envoy serves all: its gateway checks them, and its callers show
            tokens. Without tokens, a page could point a name of its own at this address (DNS rebinding).
        more_hosts: text of the refusal that says how to add a host name.
    """

    host: str
    port: int
    replicas: Sequence[str]
    folder: Path = FOLDER
    admin_port: int | None = None
    tls: TlsFiles | None = None
    console: Path | None = None
    shares_port: bool = False
    hosts: Sequence[str] = ("*",)
    more_hosts: str = ""


def configuration(place: Place) -> str:
    """Return the configuration as YAML."""
    return Template(TEMPLATE.read_text(encoding="utf-8")).substitute(
        admin=json.dumps({} if place.admin_port is None else {"address": _socket("127.0.0.1", place.admin_port)}),
        host=place.host,
        port=place.port,
        shares_port=json.dumps(place.shares_port),
        hosts=json.dumps(list(place.hosts)),
        other_hosts="# Any name." if "*" in place.hosts else f"- {json.dumps(_other_hosts(place))}",
        folder=place.folder,
        console=_routes(console_routes(place.console)) if place.console else "# Without the console.",
        replicas=json.dumps([{"endpoint": {"address": _replica(address)}} for address in place.replicas]),
        client_tls=_transport(_client_tls(place.tls)) if place.tls else "# Without TLS.",
        replica_tls=_transport(_replica_tls(place.tls)) if place.tls else "# Without TLS.",
    )


def _routes(routes: Sequence[dict[str, Any]]) -> str:
    """Return routes as items of the template's list of routes."""
    return f"\n{_ROUTE_INDENT}".join(f"- {json.dumps(route)}" for route in routes)


def _other_hosts(place: Place) -> dict[str, Any]:
    """Return the virtual host that refuses all other names."""
    body = {"inline_string": f"host: this name is not served here; {place.more_hosts}"}
    route = {"match": {"prefix": "/"}, "direct_response": {"status": 403, "body": body}, **untranscoded()}
    return {"name": "others", "domains": ["*"], "routes": [route]}


def _socket(host: str, port: int) -> dict[str, Any]:
    return {"socket_address": {"address": host, "port_value": port}}


def _replica(address: str) -> dict[str, Any]:
    host, _, port = address.rpartition(":")
    return _socket(host.strip("[]"), int(port))


def _transport(context: dict[str, Any]) -> str:
    return f"transport_socket: {json.dumps({'name': 'envoy.transport_sockets.tls', 'typed_config': context})}"


def _client_tls(files: TlsFiles) -> dict[str, Any]:
    """Return the end that clients see."""
    common = {"alpn_protocols": ["h2", "http/1.1"], "tls_certificates": [_certificate(files)]}
    return {"@type": f"{_TLS}.DownstreamTlsContext", "common_tls_context": common}


def _replica_tls(files: TlsFiles) -> dict[str, Any]:
    """Return the end that replicas see. It shows the same certificate to a replica that asks for one."""
    name = {"san_type": "DNS", "matcher": {"exact": SERVER_NAME}}
    validation = {"trusted_ca": _file(files.ca), "match_typed_subject_alt_names": [name]}
    common = {"alpn_protocols": ["h2"], "tls_certificates": [_certificate(files)], "validation_context": validation}
    return {"@type": f"{_TLS}.UpstreamTlsContext", "sni": SERVER_NAME, "common_tls_context": common}


def _certificate(files: TlsFiles) -> dict[str, Any]:
    return {"certificate_chain": _file(files.certificate), "private_key": _file(files.key)}


def _file(path: Path | None) -> dict[str, str]:
    return {"filename": str(path)}
