"""Envoy as it is deployed, run for real: one address in front of three orchestrators."""

from __future__ import annotations

import contextlib
import itertools
import socket
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Self

import grpc
import pytest

from atspeed.engine.bundle.catalogue import Catalogue
from atspeed.local.certificates import LocalCertificates
from atspeed.local.edge import envoy_binary
from atspeed.local.stack import LocalStack, ServiceProcess
from tests.bundles import random_history
from tests.edge import Envoy, needs_envoy, running
from tests.faults.conftest import Case
from tests.faults.load import Load
from tests.serving import (
    LIVENESS_SECONDS,
    RECOMMENDATION,
    SERVING,
    Client,
    check_health,
    ids,
    refused,
    request_of,
    until,
)

DEPLOYED = Path(__file__).parents[2] / "deploy" / "envoy"

pytestmark = needs_envoy


class Way:
    """A TCP proxy before a replica. While it is cut, it drops every connection but the first, which is the health checker's."""

    def __init__(self, address: str) -> None:
        host, _, port = address.rpartition(":")
        self._replica, self._cut = (host, int(port)), False
        self._pairs: list[tuple[socket.socket, socket.socket]] = []
        self._server = socket.create_server(("127.0.0.1", 0))
        self._threads = [threading.Thread(target=self._accept)]
        self.dropped = 0

    @property
    def address(self) -> str:
        return f"127.0.0.1:{self._server.getsockname()[1]}"

    def cut(self) -> None:
        self._cut = True
        for pair in self._pairs[1:]:
            hang_up(*pair)

    def mend(self) -> None:
        self._cut = False

    def __enter__(self) -> Self:
        self._threads[0].start()
        return self

    def __exit__(self, *_: object) -> None:
        hang_up(self._server, *itertools.chain(*self._pairs))
        for thread in self._threads:
            thread.join()
        for one in (self._server, *itertools.chain(*self._pairs)):
            one.close()

    def _accept(self) -> None:
        while True:
            try:
                near, _ = self._server.accept()
            except OSError:
                return
            if self._cut:
                self.dropped += 1
                near.close()
                continue
            try:
                pair = near, socket.create_connection(self._replica)
            except OSError:
                near.close()
                continue
            self._pairs.append(pair)
            for source, sink in (pair, pair[::-1]):
                self._threads.append(threading.Thread(target=pump, args=(source, sink)))
                self._threads[-1].start()


def pump(source: socket.socket, sink: socket.socket) -> None:
    """Pass on what comes until either end hangs up."""
    with contextlib.suppress(OSError):
        while data := source.recv(65_536):
            sink.sendall(data)
    hang_up(source, sink)


def hang_up(*ends: socket.socket) -> None:
    for end in ends:
        with contextlib.suppress(OSError):
            end.shutdown(socket.SHUT_RDWR)


@pytest.fixture(scope="module")
def replicas(bundle: Path) -> Iterator[LocalStack]:
    """Three orchestrators before one target."""
    with LocalStack(bundle, drafts=0, orchestrators=3, flags={"target": {"threads": 1}}) as stack:
        yield stack


@pytest.fixture(scope="module")
def way(replicas: LocalStack) -> Iterator[Way]:
    """To the last of them, of which Envoy is told this way alone."""
    with Way(replicas.orchestrators[-1].address) as way:
        yield way


@pytest.fixture(scope="module")
def envoy(replicas: LocalStack, way: Way, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Envoy]:
    first, second, _ = (orchestrator.address for orchestrator in replicas.orchestrators)
    with running([first, second, way.address], tmp_path_factory.mktemp("envoy")) as envoy:
        yield envoy


@pytest.fixture(scope="module")
def edge(envoy: Envoy) -> Iterator[Client]:
    """Client of Envoy without any address of a replica."""
    with Client(envoy.address) as client:
        until(lambda: healthy(client))
        yield client


def healthy(client: Client) -> bool:
    """Return true if Envoy has a replica that serves."""
    try:
        return check_health(client.channel, RECOMMENDATION) == SERVING
    except grpc.RpcError:
        return False


@pytest.fixture(scope="module")
def edge_cases(replicas: LocalStack, catalogue: Catalogue) -> list[Case]:
    histories = [random_history(catalogue, 1 + seed, seed) for seed in range(8)]
    with Client(replicas.address) as client:
        return [Case(history, client.recommend(history, k=20)) for history in histories]


@pytest.mark.parametrize("name", ["envoy.yaml", "envoy.local.yaml", "envoy.secure.yaml"])
def test_what_is_deployed_is_valid_with_the_files_that_it_names(name: str, tmp_path: Path) -> None:
    LocalCertificates(tmp_path)
    text = (DEPLOYED / name).read_text().replace("/secrets/", f"{tmp_path}/edge/").replace("/etc/envoy", str(DEPLOYED))
    (tmp_path / name).write_text(text)
    command: list[str | Path] = [envoy_binary(), "--mode", "validate", "-c", tmp_path / name]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "Deprecated" not in done.stderr


def test_a_list_and_a_refusal_pass_through(edge: Client, edge_cases: list[Case]) -> None:
    for case in edge_cases:
        assert ids(edge.recommend(case.history, k=20)) == ids(case.expected)
    with refused(grpc.StatusCode.INVALID_ARGUMENT, "k"):
        edge.recommend(edge_cases[0].history, k=0)


def test_a_batch_streams_through(edge: Client, edge_cases: list[Case]) -> None:
    results = edge.batch([request_of(case.history, k=20) for case in edge_cases])
    assert [ids(results[index].response) for index in range(8)] == [ids(case.expected) for case in edge_cases]


def test_a_replica_may_drain_or_die(replicas: LocalStack, envoy: Envoy, edge: Client, edge_cases: list[Case]) -> None:
    """Its calls go to the others, and it gets calls again when it is back."""
    drained, killed, _ = replicas.orchestrators
    with Load(edge, edge_cases) as load:
        load.goes_on()
        drained.stop()
        load.goes_on()
        drained.start()
        until(lambda: envoy.serving == 3)
        killed.kill()
        load.goes_on()
        killed.start()
    until_asked(drained, edge, edge_cases[0])
    until_asked(killed, edge, edge_cases[0])


def until_asked(replica: ServiceProcess, edge: Client, case: Case) -> None:
    """Ask for lists until this replica has made one."""
    before = replica.log.read_text().count("/Recommend")
    until(lambda: bool(edge.recommend(case.history)) and replica.log.read_text().count("/Recommend") > before)


def test_a_replica_that_is_healthy_and_cannot_be_called_is_ejected(
    replicas: LocalStack, way: Way, envoy: Envoy, edge: Client, edge_cases: list[Case]
) -> None:
    """Its health is SERVING all the time, calls to it break. Callers see no error, and it comes back when it is mended."""
    behind = replicas.orchestrators[-1]
    until(lambda: envoy.serving == 3)
    until_asked(behind, edge, edge_cases[0])
    with Load(edge, edge_cases) as load:
        way.cut()
        until(lambda: envoy.ejections("enforced_local_origin_failure_percentage") > 0)
        assert way.dropped > 0
        load.goes_on(30)
        way.mend()
        until(lambda: envoy.ejections("active") == 0)
    until_asked(behind, edge, edge_cases[0])


def test_client_errors_eject_no_replica(envoy: Envoy, edge: Client, edge_cases: list[Case]) -> None:
    """To Envoy they are server errors: one client that asked for a method that there is not took all replicas away."""
    unknown: Any = edge.channel.unary_unary(f"/{RECOMMENDATION}/Nothing")
    late: Any = edge.channel.unary_unary(f"/{RECOMMENDATION}/Recommend")
    request = request_of(edge_cases[0].history, k=20).SerializeToString()
    before = envoy.ejections("enforced_total")
    for _ in range(30):
        with pytest.raises(grpc.RpcError) as refusal:
            unknown(b"", timeout=LIVENESS_SECONDS)
        assert refusal.value.code() is grpc.StatusCode.UNIMPLEMENTED
        with pytest.raises(grpc.RpcError) as refusal:
            late(
                request, metadata=(("grpc-timeout", "1m"),)
            )  # which Envoy and the replica see to, and the client does not
        assert refusal.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED
    until(lambda: envoy.ejections("detected_consecutive_5xx") > 0)
    assert envoy.ejections("enforced_total") == before
    assert ids(edge.recommend(edge_cases[0].history, k=20)) == ids(edge_cases[0].expected)
